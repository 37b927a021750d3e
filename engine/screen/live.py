"""How far a phase is and what it costs, as a few lines that are drawn anew in place, and as one line of text.

The values are a record of `metrics.jsonl`; what is missing from it is not shown.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

REDRAWN = 4  # times a second
NARROWEST_BAR, WIDEST_BAR, MEMORY_BAR = 8, 40, 16  # columns
PACE_SECONDS = 60.0  # the time that is left follows from the pace in the last minute
NO_LOSSES = {"time", "epoch", "lr", "step_seconds", "joules_per_step", "joules_per_example"}
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")

Figure = tuple[str, str]  # what is measured, or nothing where the figure's unit says it; the figure


def losses(values: Mapping[str, float]) -> list[Figure]:
    """What the step function returned: losses, and weights of teachers."""
    return [(name.replace("_", " "), f"{value:.4f}") for name, value in values.items()
            if "/" not in name and name not in NO_LOSSES and not name.endswith("_per_second")]  # fmt: skip


def rates(values: Mapping[str, float]) -> list[Figure]:
    """Learning rate and speed."""
    found = [("lr", f"{values['lr']:.2e}")] if "lr" in values else []
    for name, unit in (("examples_per_second", "examples/s"), ("tokens_per_second", "tokens/s")):
        if name in values:
            found.append(("", f"{_grouped(values[name])} {unit}"))
    if "flops_per_second" in values:
        found.append(("", f"{_prefixed(values['flops_per_second'])}FLOP/s"))
    return found


def energy(values: Mapping[str, float]) -> list[Figure]:
    found = [("", f"{values['device/power']:.0f} W")] if "device/power" in values else []
    if "joules_per_example" in values:
        found.append(("", f"{values['joules_per_example']:.3g} J/example"))
    return found


def memory(values: Mapping[str, float], of_host: float | None) -> tuple[float, float | None] | None:
    """Bytes in use and bytes there are: of the device where it tells, else of this process in the host's memory."""
    if "device/memory_used" in values:
        return values["device/memory_used"], values.get("device/memory_total")
    if "memory/reserved" in values:  # a device without NVML: what the allocator holds of it
        return values["memory/reserved"], None
    return (values["host/resident"], of_host) if "host/resident" in values else None


def host_memory() -> float | None:
    """Bytes of memory that this process may use: of the machine, or less where a container has a limit."""
    try:
        found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
    for file in CGROUP_LIMITS:
        try:
            limit = int(Path(file).read_text())
        except (OSError, ValueError):  # no such control group, or "max"
            continue
        found = min(found, limit)
    return found if found > 0 else None


def line(values: Mapping[str, float], of_host: float | None) -> str:
    """All figures as text, for where nothing can be drawn anew."""
    found = [*losses(values), *rates(values)]
    if (bytes_ := memory(values, of_host)) is not None:
        found.append(("memory", _bytes(*bytes_)))
    return ", ".join(f"{name} {figure}".lstrip() for name, figure in [*found, *energy(values)])


class Pace:
    """Seconds until `total` steps are done, from the pace of the last minute. Not counted: steps of an earlier run."""

    def __init__(self, total: int, done: int, now: float):
        self.total = total
        self._seen: deque[tuple[float, int]] = deque([(now, done)])

    def left(self, step: int, now: float) -> float | None:
        """None where no step was taken yet."""
        self._seen.append((now, step))
        while len(self._seen) > 2 and now - self._seen[1][0] >= PACE_SECONDS:
            self._seen.popleft()
        begun, first = self._seen[0]
        return (self.total - step) * (now - begun) / (step - first) if step > first else None


class Display:
    """The lines of a phase in progress. Called each step, which only keeps what is given; drawn by a timer."""

    def __init__(self, phase: str, total: int, done: int):
        self.phase, self.total, self.step = phase, total, done
        self.values: Mapping[str, float] = {}
        self._begun = time.monotonic()
        self._pace, self._of_host = Pace(total, done, self._begun), host_memory()

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        self.step, self.values = step, values

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """As many lines as there are figures for, none wider than the console: a wrapped line could not be undrawn."""
        width, values = options.max_width, self.values
        rows = [self._progress(width), *_flowing([losses(values)], width), *self._costs(width)]
        whole = options.update(width=width, no_wrap=True, overflow="ellipsis", height=None)
        for row in rows:
            (segments, *_) = console.render_lines(row, whole, pad=False)
            yield from segments
            yield Segment.line()

    def _progress(self, width: int) -> Table:
        now = time.monotonic()
        if self.step < self.total:
            clock = f"{_clock(self._pace.left(self.step, now))} left"
        else:
            clock = f"in {_clock(now - self._begun)}"
        after = [f"{self.step}/{self.total}", clock]
        name = Text(self.phase, style="bold", no_wrap=True, overflow="ellipsis")
        name.truncate(max(1, width - sum(map(len, after)) - NARROWEST_BAR - 6), overflow="ellipsis")
        room = width - name.cell_len - sum(map(len, after)) - 6
        grid = _grid()
        grid.add_row(
            name, ProgressBar(self.total, self.step, width=max(1, min(WIDEST_BAR, room))), Text(after[0], style="green"),
            Text(after[1], style="cyan"),
        )  # fmt: skip
        return grid

    def _costs(self, width: int) -> list[Text | Table]:
        values = self.values
        used, speed, spent = memory(values, self._of_host), rates(values), energy(values)
        if used is None:
            return _flowing([speed, spent], width)
        taken, there = used
        grid = _grid()
        row = [Text("  memory", style="dim"), Text(_bytes(taken, there)), *_flowing([spent], width)]
        if there:
            colours = {"complete_style": "magenta", "finished_style": "red"}
            row.insert(1, ProgressBar(there, min(taken, there), width=MEMORY_BAR, **colours))
        grid.add_row(*row)
        return [*_flowing([speed], width), grid]


def _flowing(groups: list[list[Figure]], width: int) -> list[Text]:
    """Figures side by side in as few lines of `width` as hold them whole; a group begins a line of its own."""
    lines: list[Text] = []
    for group in groups:
        here = None
        for name, figure in group:
            piece = Text.assemble((f"{name} ", "dim") if name else "", figure)
            if here is None or here.cell_len + 3 + piece.cell_len > width:
                here = Text("  ", no_wrap=True, overflow="ellipsis")
                lines.append(here)
            elif here.cell_len > 2:
                here.append("   ")
            here.append_text(piece)
    return lines


def _grid() -> Table:
    return Table.grid(padding=(0, 2, 0, 0), pad_edge=False)


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "-:--:--"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _bytes(used: float, there: float | None) -> str:
    return f"{used / 2**30:.1f} GiB" if there is None else f"{used / 2**30:.1f} of {there / 2**30:.1f} GiB"


def _grouped(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _prefixed(value: float) -> str:
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G")):
        if value >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value / 1e6:.3g} M"
