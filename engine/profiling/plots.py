"""The plots of a profile: time by section, memory over a step, memory against length; each as SVG and PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from engine.profiling.tables import in_order, label, shape, shapes
from engine.report.style import LIGHT, series, settled
from engine.report.units import BYTES, TIME, unit_of
from engine.sections import SECTIONS

# Neighbours in a round are far apart in hue; the same section has one colour in every plot.
COLORS = {
    "data wait": "#d5dbe1", "teacher forward": "#4c8fd0", "pilot": "#e08a2e", "quiz": "#4aa56c", "rewind": "#8a6d3b",
    "JVP": "#a35db5", "teacher update": "#1f4e79", "real step": "#c94f4f", "optimizer": "#3aa5b5", "logging": "#c9b23a",
    "evaluation": "#7b8794", "checkpoint": "#55606d", "other": "#b3bcc8",
}  # fmt: skip
DPI = 150


def plot(found: dict[str, Any], folder: Path) -> list[str]:
    """Write them to `folder`; the names of the files, without their ends. The same results make the same files."""
    done = in_order([row for row in found["rows"] if row["error"] is None])
    if not done:
        return []
    drawn = {"time": _time(done), "memory": _memory(done)}
    if len({row["length"] for row in done}) > 1:
        drawn["lengths"] = _lengths(done)
    with settled():
        for name, figure in drawn.items():
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            figure.savefig(folder / f"{name}.png", dpi=DPI)
    return list(drawn)


def _time(rows: Sequence[dict[str, Any]]) -> Figure:
    """A bar a setting, cut into its sections."""
    size, unit = unit_of([row["seconds"] for row in rows], TIME)
    with settled():
        figure = Figure(figsize=(9, 1.5 + 0.34 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        used = [name for name in SECTIONS if any(row["sections"].get(name) for row in rows)]
        for y, row in enumerate(rows):
            left = 0.0
            for name in used:
                width = row["sections"].get(name, 0.0) / size
                axes.barh(y, width, left=left, color=COLORS[name], height=0.72)
                left += width
        _names(axes, rows)
        axes.set_xlabel(f"time of a step, {unit}")
        axes.grid(axis="x")
        for name in used:
            axes.barh(0, 0, color=COLORS[name], label=name)
        figure.legend(loc="outside lower center", ncols=6, frameon=False)
        figure.suptitle("Time of a step by section", fontsize=10)
    return figure


def _memory(rows: Sequence[dict[str, Any]]) -> Figure:
    """Live bytes over the allocations of a step, a panel a setting of the largest shape, coloured by section."""
    largest = max(rows, key=lambda row: row["batch"] * row["length"])
    rows = [row for row in rows if shape(row) == shape(largest) and row["timeline"]]
    size, unit = unit_of([row["peak"] for row in rows], BYTES)
    across = 2 if len(rows) > 1 else 1
    down = -(-len(rows) // across)
    with settled():
        figure = Figure(figsize=(9, 1.3 + 1.9 * down), layout="constrained")
        panels = figure.subplots(down, across, sharey=True, squeeze=False)
        used: dict[str, None] = {}
        for axes, row in zip(panels.flat, rows, strict=False):
            for name, events, values in _stretches(row["timeline"]):
                axes.fill_between(events, [v / size for v in values], color=COLORS[name], linewidth=0, step="post")
                used[name] = None
            axes.set_title(label(row), loc="left", fontsize=8.5, color=LIGHT["text"])
            axes.set_xticks([])
            axes.set_xlabel("allocations and frees, in order")
            axes.set_ylim(0)
            axes.grid(axis="y")
        for axes in list(panels.flat)[len(rows) :]:
            axes.set_visible(False)
        figure.supylabel(f"live memory, {unit}", fontsize=8.5, color=LIGHT["muted"])
        for name in sorted(used, key=SECTIONS.index):
            panels[0, 0].fill_between([], [], color=COLORS[name], label=name)
        figure.legend(loc="outside lower center", ncols=6, frameon=False)
        figure.suptitle(f"Memory during a step by section, {shape(largest)}", fontsize=10)
    return figure


def _stretches(timeline: Sequence[Sequence]) -> list[tuple[str, list[int], list[int]]]:
    """Points of one section after the other; each ends where the next one begins."""
    found: list[tuple[str, list[int], list[int]]] = []
    for event, value, name in timeline:
        if found and found[-1][0] != name:
            found[-1][1].append(event)
            found[-1][2].append(found[-1][2][-1])
        if not found or found[-1][0] != name:
            found.append((name, [], []))
        found[-1][1].append(event)
        found[-1][2].append(value)
    return found


def _lengths(rows: Sequence[dict[str, Any]]) -> Figure:
    """Peak memory against length, a line a setting, a panel a batch size."""
    size, unit = unit_of([row["peak"] for row in rows], BYTES)
    batches = sorted({row["batch"] for row in rows})
    with settled():
        figure = Figure(figsize=(max(5.0, 4.5 * len(batches)), 3.6), layout="constrained")
        panels = figure.subplots(1, len(batches), sharey=True, squeeze=False)[0]
        names = list(dict.fromkeys(map(label, rows)))
        for axes, batch in zip(panels, batches, strict=True):
            for i, name in enumerate(names):
                points = sorted(
                    (r["length"], r["peak"] / size) for r in rows if label(r) == name and r["batch"] == batch
                )
                color, dashes = series(i)
                axes.plot(*zip(*points, strict=True), "o", ls="-" if not dashes else (0, dashes), color=LIGHT[color], ms=4,
                          label=name if batch == batches[0] else None)  # fmt: skip
            axes.set_title(f"batch {batch}", loc="left", fontsize=8.5)
            axes.set_xlabel("tokens an example")
            axes.set_xticks(sorted({r["length"] for r in rows}))
            axes.set_ylim(0)
            axes.grid()
        panels[0].set_ylabel(f"peak memory, {unit}")
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
        figure.suptitle("Peak memory of a step by length", fontsize=10)
    return figure


def _names(axes, rows: Sequence[dict[str, Any]]) -> None:
    several = len(shapes(rows)) > 1
    axes.set_yticks(range(len(rows)), [f"{label(row)}, {shape(row)}" if several else label(row) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
