"""Step 8: measure every model, export it, write the summary, show the table."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from engine.data.batches import training_rows
from engine.errors import UserError
from engine.methods import METHODS
from engine.models import teacher_params
from engine.models.features import detach
from engine.report import cards, pages, tables
from engine.report.summary import hardware, peak_memory, summarise
from engine.report.words import DEMONSTRATION
from engine.run.evaluation import by_domain, predict, primary, score
from engine.run.members import Member
from engine.run.output import OutputDirectory
from engine.run.phase import Progress
from engine.run.setup import Setup
from engine.run.stages import Stages
from engine.run.teachers import Teacher
from engine.screen.console import Console
from engine.telemetry.telemetry import Telemetry

FALLEN = 0.05  # a loss of the primary metric worth a warning


def close(
    setup: Setup, stages: Stages, telemetry: Telemetry, output: OutputDirectory, seconds: float, command: str
) -> None:
    """Leave the results of stages that have run in `output`. `seconds` are the run's, `command` is what was typed."""
    for network in setup.models.taught():
        detach(network.module)  # what it learned for its student's sake alone is not exported
    teachers = [_measure(setup, teacher.member)[0] | _preparation(teacher) for teacher in stages.teachers]
    student, logits = _measure(setup, setup.models.student)
    student["best_step"] = stages.trainer.resume.finished[setup.config.method.name].best_step
    if METHODS[setup.config.method.method].teachers == "learning":
        _warn_of_fallen(setup, teachers)
    if stages.learned_weights is not None:
        weights = stages.learned_weights.module().tolist()  # sync: the training is over
        for entry, weight in zip(teachers, weights, strict=True):
            entry["weight"] = round(weight, 6)
    summary = _summary(setup, stages, telemetry, teachers, student, seconds)
    summary |= {"command": command, "warnings": setup.console.warnings}
    _export(setup, stages.teachers, summary, output)
    for split, values in logits.items():
        file = output.path / "predictions" / f"{split}.jsonl"
        cards.write_predictions(file, getattr(setup.examples.splits, split), values, setup.task)
    output.write("summary.json", summary)
    output.checkpoint.unlink(missing_ok=True)
    _show(setup, summary, output, seconds)
    _write_page(output, setup.console)


def _measure(setup: Setup, member: Member) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Name, source, parameters and metrics of a model, and its logits, by split."""
    network, task, encoded = member.network, setup.task, setup.examples.encoded
    splits = {"validation": encoded.validation, "test": encoded.test}
    network.move(setup.device)
    logits = {name: predict(network, split, setup.device) for name, split in splits.items()}
    metrics = {name: score(z, splits[name].labels, task) for name, z in logits.items()}
    with teacher_params.merged(network.module):  # adapters are not part of what is exported
        size = network.size()
    entry = {"name": network.name, "source": member.source.describe(), "parameters": size, "metrics": metrics}
    if task.domains:
        entry["by_domain"] = {name: by_domain(z, splits[name], task) for name, z in logits.items()}
    return entry, logits


def _preparation(teacher: Teacher) -> dict[str, Any]:
    progress = teacher.progress
    prepared = {"validation": progress.best, "best_step": progress.best_step, "seconds": round(progress.seconds, 3)}
    return {"origin": teacher.origin, "sample": teacher.member.source.sample, "prepared": prepared}


def _warn_of_fallen(setup: Setup, teachers: list[dict[str, Any]]) -> None:
    """Warn of teachers that meta-updates have ruined: the student's figures show it late or never."""
    metric = primary(setup.task)
    for entry in teachers:
        before, after = entry["prepared"]["validation"][metric], entry["metrics"]["validation"][metric]
        if before - after > FALLEN:
            setup.console.warn(
                f"teacher {entry['name']} fell from {metric} {before:.4f} to {after:.4f} while it taught; lower "
                "--teacher-lr, or warm the student up first (--student-warmup-epochs 1).")  # fmt: skip


def _summary(
    setup: Setup, stages: Stages, telemetry: Telemetry, teachers: list[dict[str, Any]], student: dict[str, Any], seconds: float
) -> dict[str, Any]:  # fmt: skip
    config, splits, models, phases = setup.config, setup.examples.splits, setup.models, _phases(setup, stages)
    train = setup.examples.encoded.train[0]
    batches = training_rows(train.widths, config.optim.batch_size, config.run.seed, epoch=0)
    sizes = {f"train{'' if i == 0 else i + 1}": len(sample) for i, sample in enumerate(splits.train)}
    return summarise(
        config, setup.task, primary(setup.task),
        {"data": splits.source, "student": models.student.source.kind,
         "teachers": [member.source.kind for member in models.teachers]},
        teachers, student,
        {name: {"seconds": round(p.seconds, 3), "steps": p.step, "skipped": p.skipped,
                "examples_per_second": round(p.examples_per_second(), 2)} for name, p in phases.items()},
        telemetry={
            "cause": telemetry.cause, "device": telemetry.described(),
            "phases": {name: {"steps": p.step, "seconds": round(p.seconds, 3), **p.costs.summary()} for name, p in phases.items()},
        },
        seconds=round(seconds, 3), padding_waste=round(train.padding_waste(batches), 4),
        peak_memory=peak_memory(setup.device) | telemetry.peak(), device=hardware(setup.device),
        sizes=sizes | {name: len(getattr(splits, name)) for name in ("quiz", "validation", "test")}, notes=splits.notes,
    )  # fmt: skip


def _phases(setup: Setup, stages: Stages) -> dict[str, Progress]:
    """All that took time, in the order of the run; kept answers count as a phase without steps."""
    found = {f"prepare {t.member.network.name}": t.progress for t in stages.teachers if t.origin != "as given"}
    for network, answers in zip(setup.models.taught(), stages.answers, strict=False):  # none where none are kept
        found[f"answers of {network.name}"] = Progress(examples=len(answers), seconds=answers.seconds)
    return found | stages.trainer.resume.finished


def _export(setup: Setup, teachers: list[Teacher], summary: dict[str, Any], output: OutputDirectory) -> None:
    """Every model as a directory that transformers reads, with a card."""
    sizes = ", ".join(f"{name} {size}" for name, size in summary["sizes"].items())
    data = f"{setup.config.data.data} ({setup.examples.splits.source}); {sizes}"
    for teacher, entry in zip(teachers, summary["teachers"], strict=True):
        module, card = teacher.member.network.module, cards.model_card(summary, entry, "a teacher", data)
        with teacher_params.merged(module):
            cards.export(module, teacher.member.tokenizer, output.path / "teachers" / entry["name"], card)
    student, card = setup.models.student, cards.model_card(summary, summary["student"], "the student", data)
    cards.export(student.network.module, student.tokenizer, output.path / "student", card)


def _show(setup: Setup, summary: dict[str, Any], output: OutputDirectory, seconds: float) -> None:
    console = setup.console
    if summary["source"] == "embedded":
        console.banner("EMBEDDED DEMONSTRATION", DEMONSTRATION)
    if setup.models.compiled is not None:
        graphs, taken = setup.models.compiled.spent()
        console.say(f"torch.compile: {graphs} graphs in {taken:.0f} s; the times of this run include these seconds.")
    console.say(f"Results: {output.path} ({seconds:.0f} s)")
    console.table(**tables.closing_table(summary))
    if (domains := tables.domain_table(summary)) is not None:
        console.table(**domains)


def _write_page(output: OutputDirectory, console: Console) -> None:
    """Last of all: a run whose page cannot be written is finished all the same."""
    try:
        file, problems = pages.write([output.path], None)
    except UserError as e:
        console.warn(str(e))
        return
    for problem in problems:
        console.warn(problem)
    console.say(f"Report: {file}")
