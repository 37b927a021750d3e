"""The plot of a comparison: a row a line, its seeds as points, mean and interval, the published figure as a mark."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure

from engine.report.comparison_tables import Result, average_published, measured, number, scale_of
from engine.report.style import LIGHT, settled
from engine.report.units import arrow, printable

OURS, POINTS, PUBLISHED = (LIGHT[name] for name in ("ours", "points", "published"))


def plot(found: Result, folder: Path) -> None:
    """Write plot.svg and plot.png to `folder`; the same results make the same files."""
    figure = draw(found)
    with settled():
        figure.savefig(folder / "plot.svg", metadata={"Date": None})
        figure.savefig(folder / "plot.png", dpi=150)


def draw(found: Result, width: float = 9.0, title: bool = True) -> Figure:
    """The figure, `width` inches wide."""
    with settled():
        rows, scale = found["rows"], scale_of(found)
        figure = Figure(figsize=(width, 1.6 + 0.42 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        for y, row in enumerate(rows):
            points = [scale * figure for figure in _points(row, found["split"])]
            axes.plot(points, [y] * len(points), "o", color=POINTS, markersize=5, zorder=3)
            if row["all"]:
                mean, half = scale * row["all"]["mean"], scale * (row["all"]["interval"] or 0.0)
                axes.errorbar(mean, y, xerr=half or None, fmt="D", color=OURS, markersize=6, capsize=4, linewidth=1.5)
            if (published := average_published(row)) is not None:
                axes.plot(published, y, "x", color=PUBLISHED, markersize=8, markeredgewidth=2)
        _legend(axes, rows)
        axes.set_yticks(
            range(len(rows)), [printable(f"{row['name']}\n{arrow(row['models'])}") for row in rows], fontsize=8
        )
        axes.set_ylim(len(rows) - 0.5, -0.5)  # the first row on top, as in the table
        axes.set_xlabel(measured(found))
        if title:
            axes.set_title(printable(found["title"]), fontsize=10)
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)
    return figure


def said(found: Result) -> str:
    """The plot's figures in words, for those who cannot see it."""
    lines = []
    for row in found["rows"]:
        published = average_published(row)
        figure = number(found, row["all"]) or "no figure"
        lines.append(f"{row['name']}, {arrow(row['models'])}: {figure}" + (f", published {published:g}" if published is not None else ""))  # fmt: skip
    return f"{measured(found)}. " + "; ".join(lines) + "."


def _points(row: Result, split: str) -> list[float]:
    """A figure a seed, averaged over the row's values where all are there."""
    by_seed: dict[int, list[float]] = {}
    for cell in row["cells"]:
        by_seed.setdefault(cell["seed"], []).append(cell["figures"][split])
    return [fmean(v) for v in by_seed.values() if len(v) == len(row["values"] or [None])]


def _legend(axes, rows: list[Result]) -> None:
    """Below the plot, and only what is in it."""
    axes.plot([], [], "o", color=POINTS, markersize=5, label="a seed")
    axes.errorbar([], [], xerr=[], fmt="D", color=OURS, markersize=6, capsize=4, label="mean and 95 % interval")
    if any(average_published(row) is not None for row in rows):
        axes.plot([], [], "x", color=PUBLISHED, markersize=8, markeredgewidth=2, linestyle="none", label="published")
    axes.figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
