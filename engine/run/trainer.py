"""The only training loop. It wraps a method's step function with data, schedule, logging, validation and checkpoints."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import torch

from engine.batch import Batch
from engine.config import RunConfig
from engine.data.batches import TrainingBatches
from engine.data.splits import Task
from engine.errors import UserError
from engine.models.cuda_graph import StepGraphs
from engine.run import checkpoint
from engine.run.evaluation import predict, primary, score
from engine.run.interrupts import Interrupted, Interrupts
from engine.run.phase import Phase, Plan, Progress
from engine.run.resume import Resume, Standing
from engine.screen.console import Console
from engine.sections import section
from engine.telemetry.drift import drift, sketch
from engine.telemetry.monitor import Monitor
from engine.telemetry.telemetry import Telemetry

BELOW_EPS = 0.9  # share of a meta-gradient below its optimizer's eps from which on there is a warning
PATIENCE = 10  # rounds whose loss is not finite, one after the other, before a run gives up


@dataclass
class _Run(Standing):
    """A phase while it is trained, with what a checkpoint does not hold."""

    batches: TrainingBatches | None = None
    means: dict[str, float] = field(default_factory=dict)  # what was read last
    seconds: float = 0.0  # of training, when it was read last
    warned: set[str] = field(default_factory=set)  # teachers whose meta-gradients are too small


class _Due(NamedTuple):
    """What follows a round."""

    log: bool
    validate: bool
    save: bool


@dataclass
class Trainer:
    """Fits phases one after another, each from its checkpoint where the interrupted run left one."""

    config: RunConfig
    task: Task
    device: torch.device
    resume: Resume
    console: Console
    monitor: Monitor
    telemetry: Telemetry
    interrupts: Interrupts

    def fit(self, phase: Phase) -> Progress:
        """Train to the end of the plan; then the student holds the weights that were best on validation.

        Raises Interrupted, a checkpoint saved, when a signal asks for it, and UserError when the loss is not finite.
        """
        run = self._begin(phase)
        self.interrupts.deferring = True
        try:
            self._train(run)
        finally:
            self.interrupts.deferring = False
        if self.interrupts.requested:  # also one that came after the last look
            raise Interrupted(self.interrupts.requested, saved=True)
        for teacher, share, eps in _below_eps(run):
            self.console.say(
                f"Teacher {teacher}: {share:.1%} of its last meta-gradients below its optimizer's eps of {eps:g}."
            )
        if phase.validation is not None:
            checkpoint.restore_module(phase.state.student.network.module, run.best)
        self.resume.finished[phase.name] = run.progress
        return run.progress

    def _begin(self, phase: Phase) -> _Run:
        """The phase at its first step, or where its checkpoint was saved."""
        torch.manual_seed(zlib.crc32(f"{phase.seed} {phase.name}".encode()))
        networks = list(phase.state.networks())
        for network in networks:
            network.move(self.device)
        train = phase.train.only({network.encoding for network in networks})
        run = _Run(phase, batches=TrainingBatches(train, phase.batch_size, phase.seed, self.device))
        if self.resume.stands_in(phase.name):
            self.resume.restore(run, self.device)
            self.console.say(f"Resuming '{phase.name}' after step {run.progress.step} of {phase.plan.steps}.")
        self.monitor.rewind(phase.name, run.progress.step)
        run.seconds = run.progress.seconds
        run.starts = run.starts or [sketch(teacher.flat.weights) for teacher in phase.learning_teachers()]
        return run

    def _train(self, run: _Run) -> None:
        """Round by round, to the end of the plan or until a signal asks for a stop."""
        phase, progress, telemetry = run.phase, run.progress, self.telemetry
        encoding = phase.state.student.network.encoding
        step = StepGraphs(
            lambda batches, quizzes: phase.method.step(phase.state, batches, quizzes), self.device, self.config.cuda_graphs,
            say=self.console.say, forget=phase.state.forget,
        )  # fmt: skip
        with (
            self.console.progress(phase.name, phase.plan.steps, progress.step) as show,
            telemetry.phase(progress.costs),
        ):
            shown, started = {}, time.monotonic()
            for batches in _rounds(run.batches, phase.plan, progress):
                with section("data wait"):
                    quizzes = phase.state.draw()
                with telemetry.counting():
                    values = step(batches, quizzes)
                phase.state.advance(len(batches))
                run.tally.add(values)
                progress.step += len(batches)
                progress.examples += sum(len(batch.labels) for batch in batches)
                telemetry.round(*(_shapes(encoding, each) for each in (batches, quizzes)))
                due = self._due(run, len(batches))
                if due.log:
                    self._read(run)
                elif due.save and self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)  # sync: a checkpoint's; what it waits for is training
                now = time.monotonic()
                progress.seconds, started = progress.seconds + now - started, now
                if due.log:
                    shown = self._log(run)
                show(progress.step, shown)
                apart = time.monotonic()  # from here on it is not training
                if due.validate:
                    self._validate(run)
                stop = self.interrupts.requested
                if stop or due.save:
                    self._save(run)
                if stop:
                    break
                started += time.monotonic() - apart

    def _due(self, run: _Run, taken: int) -> _Due:
        """What is to be done after the last `taken` steps."""
        progress, plan, config = run.progress, run.phase.plan, self.config
        finished = progress.step == plan.steps
        ended = finished or progress.crossed(config.eval_steps or plan.batches, taken)
        return _Due(
            log=ended or progress.crossed(config.log_steps, taken),
            validate=ended and run.phase.validation is not None,
            save=finished or progress.crossed(config.checkpoint_steps, taken),
        )

    @section("logging")
    def _read(self, run: _Run) -> None:
        """Read the means; raises UserError where losses have not been finite for a while."""
        phase, progress = run.phase, run.progress
        run.means, bad, skipped = run.tally.read(phase.state.learners())
        if bad >= min(PATIENCE, run.tally.rounds):
            raise UserError(
                f"The loss of '{phase.name}' was not finite in the last {bad} rounds, up to step {progress.step}; lower --lr, "
                "--teacher-lr, --prepare-lr or --pilot-lr, or use --precision fp32.")  # fmt: skip
        if skipped:
            progress.skipped += skipped
            self.console.warn(
                f"{phase.name}: {skipped} update{'s' * (skipped != 1)} up to step {progress.step} left out because the gradient was not finite "
                f"({progress.skipped} so far).")  # fmt: skip

        for teacher, share, eps in _below_eps(run):
            if share > BELOW_EPS and teacher not in run.warned:
                run.warned.add(teacher)
                self.console.warn(
                    f"{phase.name}: {share:.1%} of teacher {teacher}'s meta-gradient, up to step {progress.step}, is below its "
                    f"optimizer's eps of {eps:g}, so that its steps are smaller than --teacher-lr and shrink with --pilot-lr; "
                    "give a higher --pilot-lr.")  # fmt: skip

    @section("logging")
    def _log(self, run: _Run) -> dict[str, float]:
        """Write what was read; returns it."""
        progress, phase, means = run.progress, run.phase, run.means
        costs = self.telemetry.values(progress.seconds - run.seconds)
        run.seconds = progress.seconds
        student, *others = phase.state.learners()
        rates = {"lr": student.rate()} | {f"lr/{learner.network.name}": learner.rate() for learner in others}
        epoch = round(progress.step / phase.plan.batches, 4)
        values = {"time": round(time.time(), 3), "epoch": epoch, **means, **rates, **costs}
        self.monitor.log(phase.name, progress.step, values)
        return values

    @section("evaluation")
    def _validate(self, run: _Run) -> None:
        """Measure the student, and keep its weights where they are the best so far."""
        phase, progress = run.phase, run.progress
        student, metric = phase.state.student.network, primary(self.task)
        metrics = score(predict(student, phase.validation, self.device), phase.validation.labels, self.task)
        record = {f"validation/{name}": value for name, value in metrics.items()}
        for teacher, start in zip(phase.learning_teachers(), run.starts, strict=True):
            gone = drift(start, sketch(teacher.flat.weights)).item()  # sync: as predict's
            if math.isfinite(gone):  # of weights that were not all zero
                record[f"drift/{teacher.name}"] = gone
        self.monitor.log(phase.name, progress.step, record)
        better = not progress.best or metrics[metric] > progress.best[metric]
        if better:
            progress.best, progress.best_step = metrics, progress.step
            # sync: a validation has just waited for the device anyway
            run.best = {n: t.detach().cpu().clone() for n, t in checkpoint.module_tensors(student.module).items()}
        note = "" if better else f" (best {progress.best[metric]:.4f} at step {progress.best_step})"
        self.console.say(f"{phase.name}: step {progress.step}, validation {metric} {metrics[metric]:.4f}{note}")

    @section("checkpoint")
    def _save(self, run: _Run) -> None:
        if self.resume.pending is not None:
            return  # a lost teacher is being prepared again: the checkpoint of a later phase must outlive that
        self.telemetry.settle()
        self.resume.save(run, self.device)


def _rounds(batches: TrainingBatches, plan: Plan, progress: Progress) -> Iterator[list[Batch]]:
    """The batches of each round, to the end of the plan; `progress.step` must advance between rounds."""
    while progress.step < plan.steps:
        epoch = batches.epoch(*divmod(progress.step, plan.batches))
        while True:
            with section("data wait"):
                taken = list(islice(epoch, min(plan.round_size, plan.steps - progress.step)))
            if not taken:
                break
            yield taken


def _below_eps(run: _Run) -> Iterator[tuple[str, float, float]]:
    """Of each teacher whose meta-gradients are watched: its name, the share that was read last, and its optimizer's eps."""
    for learner in run.phase.state.learners():
        name = learner.network.name
        if f"below_eps/{name}" in run.means:
            yield name, run.means[f"below_eps/{name}"], learner.optimizer.param_groups[0]["eps"]


def _shapes(encoding: str, batches: list[Batch]) -> list[tuple[int, int]]:
    """Examples and width of each, as a model of this encoding reads them."""
    return [tuple(batch.inputs[encoding]["input_ids"].shape) for batch in batches]
