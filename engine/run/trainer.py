"""The only training loop. It wraps a method's step function with data, schedule, logging, validation and checkpoints."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.batch import Batch
from engine.config import RunConfig
from engine.data.batches import TrainingBatches
from engine.data.encoded import EncodedSplit
from engine.data.splits import Task
from engine.errors import UserError
from engine.methods import Method, State
from engine.models.cuda_graph import StepGraphs
from engine.models.network import Network
from engine.run import checkpoint
from engine.run.evaluation import predict, primary, score
from engine.run.interrupts import Interrupted, Interrupts
from engine.screen.console import Console
from engine.sections import section
from engine.telemetry.drift import drift, sketch
from engine.telemetry.monitor import Monitor
from engine.telemetry.telemetry import Costs, Telemetry

PATIENCE = 10  # rounds whose loss is not finite, one after the other, before a run gives up


@dataclass(frozen=True)
class Plan:
    """How long a phase is. `max_steps`, where given, overrides `epochs` in both directions."""

    batches: int  # an epoch
    epochs: int
    max_steps: int | None = None
    round_size: int = 1  # batches a step function takes at once: the pilot steps

    @property
    def steps(self) -> int:
        """Optimizer steps of the student."""
        return self.max_steps or self.batches * self.epochs

    @property
    def rounds(self) -> int:
        """Calls of the step function, which are the optimizer steps of teachers that learn. A round ends with its epoch."""
        epochs, rest = divmod(self.steps, self.batches)
        return epochs * -(-self.batches // self.round_size) + -(-rest // self.round_size)


@dataclass
class Phase:
    """One stretch of training: preparing a teacher, warming up the student, distilling it."""

    name: str
    method: Method
    state: State
    train: EncodedSplit
    validation: EncodedSplit | None  # None: nothing is chosen by it, the last weights stay
    plan: Plan
    batch_size: int
    seed: int


@dataclass
class Progress:
    """Where a phase stands: all of a checkpoint that is not a tensor."""

    step: int = 0
    examples: int = 0
    seconds: float = 0.0  # of training, validations and checkpoints left out
    skipped: int = 0  # updates that were left out, their gradient not being finite
    best_step: int = 0
    best: dict[str, float] = field(default_factory=dict)  # validation metrics at best_step
    costs: Costs = field(default_factory=Costs)

    @classmethod
    def of(cls, saved: dict[str, Any]) -> Progress:
        """From what `asdict` made of one."""
        return cls(**saved | {"costs": Costs(**saved.get("costs", {}))})

    def examples_per_second(self) -> float:
        return self.examples / self.seconds if self.seconds else 0.0


@dataclass
class _Run:
    """A phase while it is being fitted."""

    phase: Phase
    batches: TrainingBatches
    progress: Progress = field(default_factory=Progress)
    best: dict[str, Tensor] = field(default_factory=dict)  # the student's weights at progress.best_step
    names: list[str] = field(default_factory=list)  # of the n metrics
    sums: Tensor | None = (
        None  # [2, n] on the device since the last reading: sums of finite values, and how many they are
    )
    rounds: int = 0  # of this process
    bad: Tensor | None = None  # [] on the device: how many rounds it is since all values were finite
    means: dict[str, float] = field(default_factory=dict)  # what was read last
    seconds: float = 0.0  # of training, when it was read last
    starts: list[Tensor] = field(default_factory=list)  # sketches of the teachers that learn, as they were

    def crossed(self, every: int, taken: int) -> bool:
        """Whether the last `taken` steps reached a multiple of `every`."""
        return self.progress.step // every > (self.progress.step - taken) // every


class Trainer:
    """Fits phases one after another, each from its checkpoint where the interrupted run left one."""

    def __init__(self, config: RunConfig, task: Task, device: torch.device, identity: str, output: Path,
                 console: Console, monitor: Monitor, telemetry: Telemetry, interrupts: Interrupts):  # fmt: skip
        self.config, self.task, self.device, self.identity = config, task, device, identity
        self.console, self.monitor, self.telemetry, self.interrupts = console, monitor, telemetry, interrupts
        self.file = output / "checkpoint.safetensors"
        self.finished: dict[str, Progress] = {}
        self._pending: tuple[dict[str, Tensor], dict[str, Any]] | None = None
        if self.file.exists():
            self._pending = checkpoint.load(self.file)
            if self._pending[1]["identity"] != identity:
                raise UserError("--resume finds other models or data than the run began with; start a new run in another "
                                "--output.")  # fmt: skip
            self.finished = {name: Progress.of(p) for name, p in self._pending[1]["finished"].items()}

    def stands_in(self, phase_name: str) -> bool:
        """Whether the checkpoint that this run continues was saved in `phase_name`."""
        return self._pending is not None and self._pending[1]["phase"] == phase_name

    def skip(self, phase_name: str) -> None:
        """Drop a checkpoint of a phase whose result is already there."""
        if self.stands_in(phase_name):
            self._pending = None

    def fit(self, phase: Phase) -> Progress:
        """Train to the end of the plan; then the student holds the weights that were best on validation.

        Raises Interrupted, a checkpoint saved, when a signal asks for it, and UserError when the loss is not finite.
        """
        torch.manual_seed(zlib.crc32(f"{phase.seed} {phase.name}".encode()))
        for network in phase.state.networks():
            network.module.to(self.device)
        train = phase.train.only({network.encoding for network in phase.state.networks()})
        run = _Run(phase, TrainingBatches(train, phase.batch_size, phase.seed, self.device))
        if self.stands_in(phase.name):
            self._restore(run)
        self.monitor.rewind(phase.name, run.progress.step)
        progress, plan, telemetry = run.progress, phase.plan, self.telemetry
        run.seconds = progress.seconds
        run.starts = run.starts or [sketch(teacher.flat.weights) for teacher in _taught(phase)]
        step = StepGraphs(
            lambda batches, quizzes: phase.method.step(phase.state, batches, quizzes), self.device, self.config.cuda_graphs,
            say=self.console.say, forget=phase.state.forget,
        )  # fmt: skip
        self.interrupts.deferring = True
        try:
            with self.console.progress(phase.name, plan.steps, progress.step) as show, telemetry.phase(progress.costs):
                shown, started = {}, time.monotonic()
                for batches in self._rounds(run):
                    with section("data wait"):
                        quizzes = phase.state.draw()
                    with telemetry.counting():
                        values = step(batches, quizzes)
                    phase.state.advance(len(batches))
                    self._count(run, batches, values)
                    telemetry.round(
                        *(_shapes(phase.state.student.network.encoding, each) for each in (batches, quizzes))
                    )
                    finished, taken = progress.step == plan.steps, len(batches)
                    ended = finished or run.crossed(self.config.eval_steps or plan.batches, taken)
                    validate = ended and phase.validation is not None
                    log = ended or run.crossed(self.config.log_steps, taken)
                    if log:
                        self._read(run)
                    save = finished or run.crossed(self.config.checkpoint_steps, taken)
                    if save and not log and self.device.type == "cuda":
                        torch.cuda.synchronize(self.device)  # sync: a checkpoint's; what it waits for is training
                    now = time.monotonic()
                    progress.seconds, started = progress.seconds + now - started, now
                    if log:
                        shown = self._log(run)
                    show(progress.step, shown)
                    apart = time.monotonic()  # from here on it is not training
                    if validate:
                        self._validate(run)
                    stop = self.interrupts.requested
                    if stop or save:
                        self._save(run)
                    if stop:
                        break
                    started += time.monotonic() - apart
        finally:
            self.interrupts.deferring = False
        if self.interrupts.requested:  # also one that came after the last look
            raise Interrupted(self.interrupts.requested, saved=True)
        if phase.validation is not None:
            checkpoint.restore_module(phase.state.student.network.module, run.best)
        self.finished[phase.name] = progress
        return progress

    def _rounds(self, run: _Run) -> Iterator[list[Batch]]:
        """The batches of each round, to the end of the plan; `progress.step` must advance between rounds."""
        plan, progress = run.phase.plan, run.progress
        while progress.step < plan.steps:
            epoch = run.batches.epoch(*divmod(progress.step, plan.batches))
            while True:
                with section("data wait"):
                    batches = list(islice(epoch, min(plan.round_size, plan.steps - progress.step)))
                if not batches:
                    break
                yield batches

    def _count(self, run: _Run, batches: list[Batch], values: dict[str, Tensor]) -> None:
        """Book a round; metrics stay on the device until `_read`."""
        now = torch.stack(list(values.values()))
        finite = now.isfinite()
        if run.sums is None:
            run.names, run.sums = list(values), now.new_zeros(2, len(now))
        if run.bad is None:
            run.bad = now.new_zeros(())
        run.sums += torch.stack([torch.where(finite, now, 0), finite.to(now.dtype)])
        run.bad = torch.where(finite.all(), 0, run.bad + 1)
        run.rounds += 1
        run.progress.step += len(batches)
        run.progress.examples += sum(len(batch.labels) for batch in batches)

    @section("logging")
    def _read(self, run: _Run) -> None:
        """The means since the last reading: the one synchronisation of a logging step. What was not finite is not in them.

        Raises UserError where nothing but that came for a while.
        """
        phase, progress = run.phase, run.progress
        counts = [learner.skipped for learner in phase.state.learners() if learner.skipped is not None]
        found = torch.cat([run.sums.flatten(), torch.stack([run.bad, *counts])]).tolist()  # sync: logging step
        n = len(run.names)
        run.means = {name: s / k for name, s, k in zip(run.names, found[:n], found[n : 2 * n], strict=True) if k}
        run.sums = None
        bad, skipped = int(found[2 * n]), int(sum(found[2 * n + 1 :]))
        for count in counts:
            count.zero_()
        if bad >= min(PATIENCE, run.rounds):
            raise UserError(
                f"The loss of '{phase.name}' is not finite by step {progress.step}, for {bad} rounds now; lower --lr, "
                "--teacher-lr, --prepare-lr or --pilot-lr, or use --precision fp32.")  # fmt: skip
        if skipped:
            progress.skipped += skipped
            self.console.warn(
                f"{phase.name}: {skipped} update{'s' * (skipped != 1)} before step {progress.step} left out, because the gradient was not "
                f"finite ({progress.skipped} so far).")  # fmt: skip

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
        phase, progress = run.phase, run.progress
        student, metric = phase.state.student.network, primary(self.task)
        metrics = score(predict(student, phase.validation, self.device), phase.validation.labels, self.task)
        record = {f"validation/{name}": value for name, value in metrics.items()}
        for teacher, start in zip(_taught(run.phase), run.starts, strict=True):
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
        if self._pending is not None:
            return  # a lost teacher is being prepared again: the checkpoint of a later phase must outlive that
        self.telemetry.settle()
        state = run.phase.state
        tensors = checkpoint.prefixed("best", run.best) | {"random/cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            tensors["random/cuda"] = torch.cuda.get_rng_state(self.device)
        tensors |= {f"start/{k}": start for k, start in enumerate(run.starts)}
        for i, learner in enumerate(state.learners()):
            tensors |= checkpoint.prefixed(f"{i}/weights", checkpoint.module_tensors(learner.network.module))
            tensors |= checkpoint.prefixed(f"{i}/optimizer", checkpoint.optimizer_tensors(learner.optimizer))
        checkpoint.save(self.file, tensors, {
            "identity": self.identity,
            "phase": run.phase.name,
            "progress": asdict(run.progress),
            "finished": {name: asdict(p) for name, p in self.finished.items()},
            "round": state.round,
            "schedules": [learner.schedule.last_epoch for learner in state.learners()],
        })  # fmt: skip

    def _restore(self, run: _Run) -> None:
        tensors, saved = self._pending
        state = run.phase.state
        for i, learner in enumerate(state.learners()):
            checkpoint.restore_module(learner.network.module, checkpoint.under(f"{i}/weights", tensors))
            checkpoint.restore_optimizer(learner.optimizer, checkpoint.under(f"{i}/optimizer", tensors))
            learner.resume_schedule(saved["schedules"][i])
        run.best = checkpoint.under("best", tensors)
        run.progress = Progress.of(saved["progress"])
        starts = checkpoint.under("start", tensors)
        run.starts = [starts[str(k)].to(self.device) for k in range(len(starts))]
        state.round = saved["round"]
        torch.set_rng_state(tensors["random/cpu"])
        if "random/cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random/cuda"], self.device)
        self._pending = None
        self.console.say(f"Resuming '{run.phase.name}' after step {run.progress.step} of {run.phase.plan.steps}.")


def _taught(phase: Phase) -> list[Network]:
    """The teachers that learn in a phase."""
    return [] if phase.state.meta_step is None else list(phase.state.meta_step.problem.teachers)


def _shapes(encoding: str, batches: list[Batch]) -> list[tuple[int, int]]:
    """Examples and width of each, as a model of this encoding reads them."""
    return [tuple(batch.inputs[encoding]["input_ids"].shape) for batch in batches]
