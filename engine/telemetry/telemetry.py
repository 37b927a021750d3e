"""What the steps of a phase cost, for the log and the summary."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from engine.sections import listening
from engine.telemetry.flops import FlopRate, FlopRecord
from engine.telemetry.meter import Meter, meter_of
from engine.telemetry.sampler import Sampler

APART = ("evaluation", "checkpoint")  # sections outside of steps, whose time does not count as training
WATCHED, EVERY = 3, 64  # rounds of a phase whose memory is read by section: the first ones, then one in so many

Shapes = Sequence[tuple[int, int]]  # examples and width of batches


@dataclass
class Costs:
    """Of a phase, summed over its steps. Seconds, peak bytes and joules by section; joules None where nothing measures them."""

    tokens: int = 0  # that the student read in its training batches, padding included
    flops: float | None = None
    joules: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    energy: dict[str, float] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        sections = {
            name: {"seconds": round(seconds, 4), "memory": self.memory.get(name), "joules": self.energy.get(name)}
            for name, seconds in self.seconds.items()
        }
        return {"sections": sections, "tokens": self.tokens, "flops": self.flops, "joules": self.joules}


class Telemetry:
    """A meter of sections and a sampler of the device, over all phases of a run. Switched off, it counts tokens alone.

    `flops` asks for floating-point operations, of which the first step of a phase is counted, operation by operation.
    """

    def __init__(self, device: torch.device, on: bool = True, flops: bool = True):
        self.device, self.on, self._flops = device, on, flops
        self.meter: Meter = meter_of(device) if on else Meter()
        self.sampler = Sampler(device, lambda: self.meter.section) if on else None
        self._phase = _Window(Costs())

    @property
    def cause(self) -> str | None:
        """Why nothing is known of the device, or None."""
        return self.sampler.cause if self.on else "no NVML: --telemetry is off"

    def described(self) -> dict[str, Any] | None:
        """The device that is sampled."""
        return self.sampler.device if self.on else None

    def peak(self) -> dict[str, int]:
        """The most bytes that were allocated on the device, where its allocator counts: readings by section start it anew."""
        peak = self.meter.peak()
        return {} if peak is None else {"device": peak}

    @contextmanager
    def phase(self, costs: Costs):
        """Sections in the body are measured, and booked to `costs` by `values` and at the end."""
        self._phase = _Window(costs)
        if not self.on:
            yield
            return
        self.sampler.start()
        self.sampler.window()  # what was sampled before does not belong to this phase
        self.meter.take()
        with listening(self.meter):
            try:
                yield
            finally:
                self.meter.watch(False)
        self.settle()
        self.meter.memory = {}

    def counting(self):
        """For the first step of a phase, whose floating-point operations are counted; those of others follow from it."""
        window = self._phase
        if not (self.on and self._flops) or window.rate is not None or window.counter is not None:
            return nullcontext()
        window.counter = FlopRecord()
        return window.counter

    def round(self, batches: Shapes, quizzes: Shapes) -> None:
        """Book what a round of these batches was; it costs no time and no synchronisation."""
        window, costs, shapes = self._phase, self._phase.costs, [*batches, *quizzes]
        tokens, examples = sum(b * width for b, width in batches), sum(b for b, _ in batches)
        window.tokens += tokens
        window.examples += examples
        window.steps += len(batches)
        costs.tokens += tokens
        if not self.on:
            return
        window.unpaid_steps += len(batches)
        window.unpaid_examples += examples
        if window.counter is not None and window.counter.complete and window.rate is None:
            window.rate = FlopRate(window.counter, shapes)
        if window.rate is not None:
            flops = window.rate.of(shapes)
            window.flops += flops
            costs.flops = (costs.flops or 0.0) + flops
        window.rounds += 1
        self.meter.watch(window.rounds < WATCHED or window.rounds % EVERY == 0)

    def settle(self) -> None:
        """Book everything up to now, as a checkpoint needs it."""
        if not self.on:
            return
        window, costs, taken, sampled = self._phase, self._phase.costs, self.meter.take(), self.sampler.window()
        memory = sampled.resident if self.meter.peak() is None else self.meter.memory
        for peaks in (window.memory, costs.memory):
            peaks |= {name: max(peak, peaks.get(name, 0)) for name, peak in memory.items()}
        for totals in (window.seconds, window.unpaid, costs.seconds):
            _add(totals, taken)
        window.uncovered += sum(taken.values())
        window.sampled |= sampled.values
        if sampled.joules is not None:
            self._pay(window, sampled.joules, sampled.seconds)

    def values(self, seconds: float) -> dict[str, float]:
        """For the log: what the steps since it was last asked took, given the `seconds` of training in them."""
        self.settle()
        window, found = self._phase, {}
        if seconds:
            found = {"examples_per_second": window.examples / seconds, "tokens_per_second": window.tokens / seconds}
            if window.rate is not None:
                found["flops_per_second"] = window.flops / seconds
        if self.on and window.steps:
            found["step_seconds"] = seconds / window.steps
            found |= {f"seconds/{n}": s / window.steps for n, s in window.seconds.items() if n not in APART}
        found |= {f"memory/{name}": peak for name, peak in window.memory.items()} | window.sampled
        if self.on and self.device.type == "cuda":
            found["memory/allocated"] = torch.cuda.memory_allocated(self.device)
            found["memory/reserved"] = torch.cuda.memory_reserved(self.device)
        window.clear()
        return found

    def _pay(self, window: _Window, joules: float, seconds: float) -> None:
        """Divide energy by the time of the sections, as if power were constant: counters tell no section's own."""
        costs, total = window.costs, sum(window.unpaid.values())
        # samples lag behind: joules end before `unpaid` does, and the first ones may begin before the phase
        share = min(1.0, window.uncovered / seconds)
        joules, window.uncovered = joules * share, window.uncovered - share * seconds
        shares = {name: joules * s / total for name, s in window.unpaid.items()} if total else {}
        training = {name: j for name, j in shares.items() if name not in APART}
        spent, steps, examples = sum(training.values()), window.unpaid_steps, window.unpaid_examples
        costs.joules = (costs.joules or 0.0) + spent
        _add(costs.energy, shares)
        if steps:
            window.sampled |= {"joules_per_step": spent / steps, "joules_per_example": spent / examples}
            window.sampled |= {f"joules/{name}": j / steps for name, j in training.items()}
        window.unpaid, window.unpaid_steps, window.unpaid_examples = {}, 0, 0

    def close(self) -> None:
        if self.sampler is not None:
            self.sampler.close()


@dataclass
class _Window:
    """A phase, and what came since its last record."""

    costs: Costs
    rounds: int = 0
    counter: FlopRecord | None = None
    rate: FlopRate | None = None
    # since the last record
    tokens: int = 0
    examples: int = 0
    steps: int = 0
    flops: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    sampled: dict[str, float] = field(default_factory=dict)
    # of steps whose energy is not known yet, since a counter is slower than a short window
    uncovered: float = 0.0  # seconds of the phase that no joules cover
    unpaid: dict[str, float] = field(default_factory=dict)
    unpaid_steps: int = 0
    unpaid_examples: int = 0

    def clear(self) -> None:
        self.tokens = self.examples = self.steps = 0
        self.flops = 0.0
        self.seconds, self.memory, self.sampled = {}, {}, {}


def _add(totals: dict[str, float], more: dict[str, float]) -> None:
    for name, value in more.items():
        totals[name] = totals.get(name, 0.0) + value
