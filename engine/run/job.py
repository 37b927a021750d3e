"""One job from configuration to exported student: set up, staged, closed with what it leaves behind."""

from __future__ import annotations

from contextlib import closing
from typing import Any

from torch import Tensor

from engine.config import Config
from engine.data.batches import training_rows
from engine.errors import UserError
from engine.methods import METHODS
from engine.models import teacher_params
from engine.models.features import detach
from engine.report import cards, pages, tables
from engine.report.summary import hardware, peak_memory, summarise
from engine.report.words import DEMONSTRATION
from engine.run.evaluation import by_domain, predict, primary, score
from engine.run.interrupts import Interrupts
from engine.run.output import OutputDirectory
from engine.run.setup import Setup
from engine.run.stages import Stages
from engine.run.teachers import Member, Teacher
from engine.run.trainer import Progress, Trainer
from engine.screen.console import Console
from engine.telemetry import trackers
from engine.telemetry.monitor import Monitor
from engine.telemetry.telemetry import Telemetry

FALLEN = 0.05  # a loss of the primary metric worth a warning


class Job:
    """Builds everything on construction, so that bad input is known before the output directory exists."""

    def __init__(self, config: Config, console: Console):
        self.trackers = trackers.chosen(config.telemetry)  # first: it takes no time to say that one cannot be had
        self.config, self.console, self.setup = config, console, Setup(config, console)
        self.task, self.device = self.setup.task, self.setup.device
        self.telemetry = Telemetry(
            self.device, config.telemetry.telemetry == "on", flops=not config.run.compile
        )  # a counted step would not be compiled

    def run(self, output: OutputDirectory, interrupts: Interrupts) -> None:
        """All stages. Raises Interrupted when a signal stops it."""
        setup = self.setup
        told = {"settings": self.config.to_flat(), "say": self.console.say, "warn": self.console.warn}
        with Monitor(output.path, self.trackers, **told) as monitor, closing(self.telemetry):
            self.trainer = Trainer(
                self.config.run,
                self.task,
                self.device,
                setup.identity(),
                output.path,
                self.console,
                monitor,
                self.telemetry,
                interrupts,
            )
            self.stages = Stages(setup, self.trainer)
            self.stages.run()

    def close(self, output: OutputDirectory, seconds: float, command: str) -> None:
        """Measure every model once on validation and test, export, write the summary, show the table."""
        for member in self.setup.teachers:
            detach(member.network.module)  # what it learned for its student's sake alone is not exported
        teachers = [self._measure(teacher.member)[0] | _preparation(teacher) for teacher in self.stages.teachers]
        student, logits = self._measure(self.setup.student)
        student["best_step"] = self.trainer.finished[self.config.method.method].best_step
        if METHODS[self.config.method.method].teachers == "learning":
            self._warn_of_fallen(teachers)
        if self.stages.learned_weights is not None:
            weights = self.stages.learned_weights.module().tolist()  # sync: the training is over
            for entry, weight in zip(teachers, weights, strict=True):
                entry["weight"] = round(weight, 6)
        summary = self._summary(teachers, student, seconds) | {"command": command, "warnings": self.console.warnings}
        data = f"{self.config.data.data} ({self.setup.splits.source}); " + ", ".join(
            f"{k} {v}" for k, v in summary["sizes"].items()
        )
        for teacher, entry in zip(self.stages.teachers, teachers, strict=True):
            folder = output.path / "teachers" / entry["name"]
            card = cards.model_card(summary, entry, "a teacher", data)
            with teacher_params.merged(teacher.member.network.module):
                cards.export(teacher.member.network.module, teacher.member.tokenizer, folder, card)
        card = cards.model_card(summary, student, "the student", data)
        cards.export(self.setup.student.network.module, self.setup.student.tokenizer, output.path / "student", card)
        for split, values in logits.items():
            file = output.path / "predictions" / f"{split}.jsonl"
            cards.write_predictions(file, getattr(self.setup.splits, split), values, self.task)
        output.write("summary.json", summary)
        self.trainer.file.unlink(missing_ok=True)
        if summary["source"] == "embedded":
            self.console.banner("EMBEDDED DEMONSTRATION", DEMONSTRATION)
        if self.setup.compiled is not None:
            graphs, taken = self.setup.compiled.spent()
            self.console.say(f"torch.compile: {graphs} graphs in {taken:.0f} s, which the times of this run include.")
        self.console.say(f"Results: {output.path} ({seconds:.0f} s)")
        self.console.table(**tables.closing_table(summary))
        if (domains := tables.domain_table(summary)) is not None:
            self.console.table(**domains)
        self._write_page(output)

    def _write_page(self, output: OutputDirectory) -> None:
        """Last of all: a run whose page cannot be written is finished all the same."""
        try:
            file, problems = pages.write([output.path], None)
        except UserError as e:
            self.console.warn(str(e))
            return
        for problem in problems:
            self.console.warn(problem)
        self.console.say(f"Report: {file}")

    def _warn_of_fallen(self, teachers: list[dict[str, Any]]) -> None:
        """Meta-updates that ruin a teacher show in the student's figures late or never; say it."""
        metric = primary(self.task)
        for entry in teachers:
            before, after = entry["prepared"]["validation"][metric], entry["metrics"]["validation"][metric]
            if before - after > FALLEN:
                self.console.warn(
                    f"teacher {entry['name']} fell from {metric} {before:.4f} to {after:.4f} while it taught; lower "
                    "--teacher-lr, or warm the student up first (--student-warmup-epochs 1).")  # fmt: skip

    def _measure(self, member: Member) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Name, source, parameters and metrics of a model, and its logits, by split."""
        network, splits = member.network, {"validation": self.setup.encoded.validation, "test": self.setup.encoded.test}
        network.module.to(self.device)
        logits = {name: predict(network, split, self.device) for name, split in splits.items()}
        metrics = {name: score(z, splits[name].labels, self.task) for name, z in logits.items()}
        with teacher_params.merged(network.module):  # adapters are not part of what is exported
            size = network.size()
        entry = {"name": network.name, "source": member.source.describe(), "parameters": size, "metrics": metrics}
        if self.task.domains:
            entry["by_domain"] = {name: by_domain(z, splits[name], self.task) for name, z in logits.items()}
        return entry, logits

    def _summary(self, teachers: list[dict[str, Any]], student: dict[str, Any], seconds: float) -> dict[str, Any]:
        phases = {
            f"prepare {t.member.network.name}": t.progress for t in self.stages.teachers if t.origin != "as given"
        }
        for member, answers in zip(self.setup.teachers, self.stages.answers, strict=False):  # none where none are kept
            phases[f"answers of {member.network.name}"] = Progress(examples=len(answers), seconds=answers.seconds)
        phases |= self.trainer.finished
        train, optim = self.setup.encoded.train[0], self.config.optim
        batches = training_rows(train.widths, optim.batch_size, self.config.run.seed, epoch=0)
        sizes = {f"train{'' if i == 0 else i + 1}": len(sample) for i, sample in enumerate(self.setup.splits.train)}
        return summarise(
            self.config, self.task, primary(self.task),
            {"data": self.setup.splits.source, "student": self.setup.student.source.kind,
             "teachers": [member.source.kind for member in self.setup.teachers]},
            teachers, student,
            {name: {"seconds": round(p.seconds, 3), "steps": p.step, "skipped": p.skipped,
                    "examples_per_second": round(p.examples_per_second(), 2)} for name, p in phases.items()},
            telemetry={
                "cause": self.telemetry.cause, "device": self.telemetry.described(),
                "phases": {name: {"steps": p.step, "seconds": round(p.seconds, 3), **p.costs.summary()} for name, p in phases.items()},
            },
            seconds=round(seconds, 3), padding_waste=round(train.padding_waste(batches), 4),
            peak_memory=peak_memory(self.device) | self.telemetry.peak(), device=hardware(self.device),
            sizes=sizes | {name: len(getattr(self.setup.splits, name)) for name in ("quiz", "validation", "test")},
            notes=self.setup.splits.notes,
        )  # fmt: skip


def _preparation(teacher: Teacher) -> dict[str, Any]:
    progress = teacher.progress
    prepared = {"validation": progress.best, "best_step": progress.best_step, "seconds": round(progress.seconds, 3)}
    return {"origin": teacher.origin, "sample": teacher.member.source.sample, "prepared": prepared}
