"""What a step takes when it runs: seconds and memory by section, what holds the memory, traces.

Models have the sizes of the configuration and random weights, batches are full and as long as they can be: what a step takes
depends on shapes alone, so nothing is downloaded, read or trained for it.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from engine.batch import Batch
from engine.config import Config
from engine.data.labels import Task
from engine.methods import METHODS, State
from engine.profiling.allocated import allocated
from engine.profiling.blueprints import Blueprint
from engine.profiling.rehearsal import Rehearsal
from engine.run.phase import Phase, Progress
from engine.sections import listening
from engine.telemetry.flops import FlopCounter
from engine.telemetry.meter import meter_of

WARM = 2  # steps before anything is read: they make gradients, moments and snapshots, and tune kernels
POINTS = 600  # of a timeline
ENTRIES = 200_000  # of the allocator's history


@dataclass
class Measured:
    """A step. Bytes are of the device, a CPU's memory where there is no other.

    seconds            of the median step, and its sections'; `quartiles` of all steps
    peak               the most bytes at once, by the allocator, and in which section
    holds              bytes by what they are for, when the ledger saw most (engine.profiling.ledger); they add up to `seen`
    peaks              the most bytes that the ledger saw in each section
    timeline           [event, bytes, section] of one step
    """

    name: str
    strategy: str | None
    checkpointing: str
    precision: str
    batch: int
    length: int
    micro_batch: int | None = None
    examples: int = 0  # that the student takes a step on, in a round
    seconds: float | None = None
    quartiles: tuple[float, float] | None = None
    sections: dict[str, float] = field(default_factory=dict)
    flops: int | None = None
    peak: int | None = None
    seen: int | None = None
    peak_section: str | None = None
    holds: dict[str, int] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    timeline: list[tuple[int, int, str]] = field(default_factory=list)
    error: str | None = None  # why there are no figures


class Profiling(Rehearsal):
    """The phase of the method itself on real models; `measured` is what it took.

    `steps` are timed. `traces` is a folder for the Chrome trace, and on CUDA the allocator's history, of one step.
    """

    def __init__(
        self, config: Config, task: Task, student: Blueprint, teachers: Sequence[Blueprint], device: torch.device,
        measured: Measured, steps: int, traces: Path | None,
    ):  # fmt: skip
        self.measured, self._steps, self._traces = measured, steps, traces
        super().__init__(config, task, student, teachers, device)

    def fit(self, phase: Phase) -> Progress:
        if phase.name != self.config.method.name:
            return Progress()  # only the steps of the method itself are measured
        state = phase.state
        for network in state.networks():
            network.move(self.device)
        batches, quizzes = self.batches(phase)

        def step() -> None:
            phase.method.step(state, batches, quizzes)
            state.advance(len(batches))

        self.measured.examples = sum(len(batch.labels) for batch in batches)
        for _ in range(WARM):
            step()
        self._time(step)
        self._follow(step, state, [*batches, *quizzes])
        self._trace(step)
        return Progress()

    def _time(self, step: Callable[[], None]) -> None:
        found, meter = [], meter_of(self.device)
        with listening(meter):
            for _ in range(self._steps):
                meter.take()
                started = time.perf_counter()
                step()
                sections = meter.take()  # on CUDA it waits for the step
                found.append((time.perf_counter() - started, sections))
        found.sort(key=lambda each: each[0])
        seconds = [each[0] for each in found]
        self.measured.seconds, self.measured.sections = found[len(found) // 2]
        low, _, high = quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
        self.measured.quartiles = low, high

    def _follow(self, step: Callable[[], None], state: State, batches: Sequence[Batch]) -> None:
        kind, measured = self.device.type, self.measured
        ledger = self.ledger(state, batches, timeline=POINTS)
        with ledger.following(), FlopCounter() as counter:
            step()
        measured.flops = counter.total
        measured.seen, measured.peak_section = ledger.peak(kind), ledger.peak_section(kind)
        measured.holds, measured.peaks = ledger.at_peak(kind), ledger.by_section(kind)
        measured.timeline = [tuple(point) for point in ledger.timeline(kind)]
        before = ledger.live(kind)
        del ledger
        if kind == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            step()
            torch.cuda.synchronize(self.device)
            measured.peak = torch.cuda.max_memory_allocated(self.device)
        else:
            measured.peak = before + allocated(step)

    def _trace(self, step: Callable[[], None]) -> None:
        if self._traces is None:
            return
        cuda = self.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        self._traces.mkdir(parents=True, exist_ok=True)
        with profile(activities=activities, profile_memory=True) as found, listening(_Named()):
            step()
            if cuda:
                torch.cuda.synchronize(self.device)
        found.export_chrome_trace(str(self._traces / f"{self.measured.name}.json.gz"))
        if cuda:
            torch.cuda.memory._record_memory_history(max_entries=ENTRIES)
            try:
                step()
                torch.cuda.memory._dump_snapshot(str(self._traces / f"{self.measured.name}.pickle"))
            finally:
                torch.cuda.memory._record_memory_history(enabled=None)


class _Named:
    """Sections as ranges of torch's profiler."""

    def __init__(self):
        self._open: list[record_function] = []

    def enter(self, name: str) -> None:
        self._open.append(record_function(name))
        self._open[-1].__enter__()

    def leave(self) -> None:
        self._open.pop().__exit__(None, None, None)

    def captured(self) -> Callable[[], None]:
        return lambda: None


def measure(
    config: Config, task: Task, student: Blueprint, teachers: Sequence[Blueprint], device: torch.device, steps: int,
    traces: Path | None = None,
) -> Measured:  # fmt: skip
    """A step of one configuration; where it does not fit into memory, the result says so. Raises UserError as `Rehearsal`."""
    method = config.method
    strategy = method.meta_grad if METHODS[method.method].learn_from == "quiz" else None
    optim, length = config.optim, config.data.max_length
    words = [strategy or method.name, *([method.checkpointing] if method.checkpointing != "none" else []), config.run.precision,
             *([f"micro{optim.micro_batch_size}"] if optim.micro_batch_size else []), f"{optim.batch_size}x{length}"]  # fmt: skip
    found = Measured(
        "-".join(words),
        strategy,
        method.checkpointing,
        config.run.precision,
        optim.batch_size,
        length,
        optim.micro_batch_size,
    )
    try:
        Profiling(config, task, student, teachers, device, found, steps, traces).run()
    except torch.OutOfMemoryError:
        found.error = "out of memory"
    except RuntimeError as error:  # a CPU's allocator
        if "not enough memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        found.error = "out of memory"
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found
