"""Seconds and device memory by section of a step (engine.sections).

Time is the host's clock on a CPU, and events in the stream on a CUDA device, read when a logging step has waited for it anyway.
A step that is replayed as a CUDA graph runs no Python: its events are nodes of the graph, whose last replay says how the time
of the replays before it is to be divided. torch.profiler tells the same from a record of every kernel, which costs too much to
be always on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

OTHER = "other"
MOST_MARKS = 8192  # between two readings; further ones are read on the way


class Meter:
    """Listens to sections. `take` gives the seconds since it was last asked, which add up to the time between."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._stack = [OTHER]
        self._seconds: dict[str, float] = {}
        self._since = clock()
        self.memory: dict[str, int] = {}  # peak bytes by section, where the device's allocator tells
        self.watching = False

    @property
    def section(self) -> str:
        """What is running now; any thread may ask."""
        return self._stack[-1]

    def enter(self, name: str) -> None:
        self._mark()
        self._stack.append(name)

    def leave(self) -> None:
        self._mark()
        self._stack.pop()

    def captured(self) -> Callable[[], None]:
        return lambda: None

    def watch(self, on: bool) -> None:
        """Whether memory is read at every section's end from now on, which takes some time itself."""
        self.watching = on

    def take(self) -> dict[str, float]:
        """Seconds by section, and the clock starts anew."""
        self._mark()
        taken, self._seconds = self._seconds, {}
        return taken

    def peak(self) -> int | None:
        """Most bytes allocated on the device since the meter was made; None where no allocator counts."""
        return None

    def _mark(self) -> None:
        """The section that was running until now ends here, or begins again."""
        now = self._clock()
        name = self._stack[-1]
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now


@dataclass(eq=False)
class _Recording:
    """The marks of a captured step: events that every replay sets anew."""

    marks: list[tuple[Any, str]]
    seconds: dict[str, float] = field(default_factory=dict)  # of the last replay that was read

    def read(self) -> dict[str, float]:
        found: dict[str, float] = {}
        try:
            for (before, _), (event, name) in zip(self.marks, self.marks[1:], strict=False):
                found[name] = found.get(name, 0.0) + before.elapsed_time(event) / 1000
        except RuntimeError:  # a replay is on its way: what the one before it took is as good
            return self.seconds
        if min(found.values(), default=0.0) < 0:  # some events are of a replay on its way, some of the one before it
            return self.seconds
        self.seconds = found
        return found


class CudaMeter(Meter):
    """Times by events in the current stream. `cuda` stands for `torch.cuda` in tests."""

    def __init__(self, device: torch.device, cuda: Any = torch.cuda):
        self.device, self._cuda = device, cuda
        self._pool: list[Any] = []
        self._marks: list[tuple[Any, str] | _Recording] = []
        self._recording: list[tuple[Any, str]] = []
        self._peak = 0
        super().__init__()
        self._mark()

    def captured(self) -> Callable[[], None]:
        """To be called after a capture; the result after each of its replays."""
        recording, self._recording = _Recording(self._recording), []
        return lambda: self._marks.append(recording)

    def take(self) -> dict[str, float]:
        self._mark()
        self._marks[-1][0].synchronize()  # sync: asked for by a logging step, which has waited already
        self._settle(len(self._marks))
        taken, self._seconds = self._seconds, {}
        return taken

    def peak(self) -> int:
        self._peak = max(self._peak, self._cuda.max_memory_allocated(self.device))
        return self._peak

    def watch(self, on: bool) -> None:
        if on and not self.watching:
            self._read_peak()  # of all that was not watched, and of no section
        self.watching = on

    def _mark(self) -> None:
        name = self._stack[-1]
        if self._cuda.is_current_stream_capturing():
            if self._recording or self.watching:
                self._watch(name)
            else:  # where the capture begins
                self._read_peak()
            event = self._cuda.Event(enable_timing=True, external=True)
            try:
                event.record()
            except RuntimeError:  # the capture is broken, which whoever captures is about to say
                self._recording = []
                return
            self._recording.append((event, name))
            return
        if self._recording:  # of a capture that broke off
            self._recording = []
        if self.watching:
            self._watch(name)
        event = self._pool.pop() if self._pool else self._cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((event, name))
        if len(self._marks) > MOST_MARKS:
            middle = next(
                (i for i in range(MOST_MARKS // 2, 0, -1) if not isinstance(self._marks[i], _Recording)), None
            )
            if middle is not None:
                self._marks[middle][0].synchronize()  # sync: the device is not thousands of marks behind
                self._settle(middle + 1)

    def _watch(self, name: str) -> None:
        self.memory[name] = max(self.memory.get(name, 0), self._read_peak())

    def _read_peak(self) -> int:
        """Since it was read last."""
        peak = self._cuda.max_memory_allocated(self.device)
        self._peak = max(self._peak, peak)
        self._cuda.reset_peak_memory_stats(self.device)
        return peak

    def _settle(self, count: int) -> None:
        """Book the first `count` marks, the last of which has been reached; it stays, the time after it begins there."""
        marks, before, replays = self._marks[:count], None, []
        inside = {id(m): m.read() for m in dict.fromkeys(m for m in marks if isinstance(m, _Recording))}
        for mark in marks:
            if isinstance(mark, _Recording):
                replays.append(inside[id(mark)])
                continue
            event, name = mark
            if before is not None:
                self._book(before.elapsed_time(event) / 1000, name, replays)
                self._pool.append(before)
            before, replays = event, []
        self._marks = [marks[-1], *self._marks[count:]]

    def _book(self, span: float, name: str, replays: list[dict[str, float]]) -> None:
        inside: dict[str, float] = {}
        for replay in replays:
            for section, seconds in replay.items():
                inside[section] = inside.get(section, 0.0) + seconds
        known = sum(inside.values())
        scale = min(1.0, span / known) if known else 0.0
        for section, seconds in inside.items():
            self._seconds[section] = self._seconds.get(section, 0.0) + scale * seconds
        self._seconds[name] = self._seconds.get(name, 0.0) + span - scale * known


def meter_of(device: torch.device) -> Meter:
    return CudaMeter(device) if device.type == "cuda" else Meter()
