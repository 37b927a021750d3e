"""Lines over steps: what was logged as dots, a moving mean as the line, and both said in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from engine.report.style import LIGHT, series, settled
from engine.report.svg import inline
from engine.report.units import PLAIN, Units, count, quantity, unit_of
from engine.report.words import course

SIZE = (4.5, 2.55)  # inches; a phone shows it at about its size, a desktop half as large again
MOST = 400  # points that are drawn of a line; more do not fit into its pixels
STEPS = [1, 2, 2.5, 5, 10]  # of ticks
SMOOTHED = 40  # values from which on a line is a moving mean


@dataclass(frozen=True)
class Line:
    """Values over steps. `color` and `dashes` follow from its place in the chart unless `index` says another."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    index: int | None = None
    smooth: bool = True


@dataclass(frozen=True)
class Level:
    """A horizontal line: what is compared with."""

    label: str
    value: float
    index: int | None = None


@dataclass(frozen=True)
class Key:
    """A row of the legend, which stands in the page and not in the drawing."""

    label: str
    color: str
    dashes: str
    dots: bool = False

    @classmethod
    def of(cls, label: str, index: int, dots: bool = False) -> Key:
        """Of the line of this number."""
        color, dashes = series(index)
        return cls(label, color, " ".join(f"{1.5 * d:g}" for d in dashes), dots)


@dataclass(frozen=True)
class Chart:
    """What the template shows: a title, the drawing, its legend and its caption."""

    name: str
    title: str
    svg: str
    keys: list[Key]
    caption: str
    words: str = field(default="")


def chart(
    name: str, title: str, lines: Sequence[Line], levels: Sequence[Level] = (), *, units: Units = PLAIN, percent: bool = False,
    y: str = "", note: str = "", from_zero: bool = False, show: Callable[[float], str] | None = None, logged: str = "",
) -> Chart | None:  # fmt: skip
    """A chart, or None where nothing was logged.

    name: unique on the page; y: what is measured, without its unit; note: a sentence for the caption; logged: what a logged
    value is, as in "the mean of 20 steps".
    """
    lines = [line for line in lines if line.values]
    if not lines:
        return None
    scale, unit = (0.01, "%") if percent else unit_of([max(map(abs, line.values)) for line in lines], units)
    show = show or (lambda value: f"{100 * value:.2f} %" if percent else quantity(value, units) if units is not PLAIN else f"{value:.4g}")  # fmt: skip
    keys, window = [], 0
    with settled():
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.add_subplot()
        for place, line in enumerate(lines):
            key, smoothed = _draw(axes, line, place if line.index is None else line.index, scale)
            keys.append(key)
            window = max(window, smoothed)
        for place, level in enumerate(levels, len(lines)):
            keys.append(_level(axes, level, place if level.index is None else level.index, scale))
        axes.set_xlabel("step")
        if y or unit:  # above the axis: nobody has to turn their head
            axes.set_title(
                f"{y}, {unit}" if y and unit else y or unit, loc="left", color=LIGHT["muted"], fontsize=8.5, pad=5
            )
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=STEPS))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
        axes.ticklabel_format(useOffset=False)
        axes.grid(axis="y")
        axes.spines["left"].set_visible(False)
        axes.set_xlim(left=0)
        _y_limits(axes, from_zero)
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            if max(abs(low), abs(high)) >= 1000:
                short = max(abs(low), abs(high)) >= 1e7
                axis.set_major_formatter(StrMethodFormatter("{x:g}" if short else "{x:,.0f}"))
    said = [course(line.label, line.steps, line.values, show) for line in lines]
    said += [f"{level.label}: {show(level.value)} throughout." for level in levels]
    words = f"{title}. " + " ".join(said)
    dots = _caption(window, logged, max(len(line.values) for line in lines))
    alone = course("", lines[0].steps, lines[0].values, show) if len(lines) == 1 else ""
    caption = " ".join(filter(None, [alone, note, dots]))
    return Chart(name, title, inline(figure, name, words), keys if len(keys) > 1 else [], caption, words)


def moving_mean(values: Sequence[float], window: int) -> list[float]:
    """Centred means over `window` values, fewer at the ends: half a window to either side of each, as far as there are any."""
    half, sums = window // 2, [0.0]  # sums from the start: np.convolve would cost window times as much
    for value in values:
        sums.append(sums[-1] + value)
    found = []
    for i in range(len(values)):
        low, high = max(0, i - half), min(len(values), i + half + 1)
        found.append((sums[high] - sums[low]) / (high - low))
    return found


def thinned(length: int) -> int:
    """Every how many values one is drawn."""
    return math.ceil(length / MOST)


def _draw(axes, line: Line, index: int, scale: float) -> tuple[Key, int]:
    """Its row of the legend, and how many values its moving mean is over, 0 without one."""
    color, dashes = series(index)
    values = [value / scale for value in line.values]
    window = len(values) // 20 * 2 + 1 if line.smooth and len(values) >= SMOOTHED else 0
    every = thinned(len(values))
    if window:
        axes.plot(line.steps[::every], values[::every], "o", color=LIGHT[color], markersize=1.6, alpha=0.35,
                  markeredgewidth=0)  # fmt: skip
        values = moving_mean(values, window)
    marker = {"marker": "o", "markersize": 3.0} if len(values) < 30 and not window else {}
    ends = [*range(0, len(values), every)]
    if ends[-1] != len(values) - 1:
        ends.append(len(values) - 1)
    axes.plot([line.steps[i] for i in ends], [values[i] for i in ends], color=LIGHT[color], linewidth=1.5,
              dashes=dashes or (None, None), **marker)  # fmt: skip
    return Key.of(line.label, index, bool(marker)), window


def _level(axes, level: Level, index: int, scale: float) -> Key:
    color, _ = series(index)
    axes.axhline(level.value / scale, color=LIGHT[color], linewidth=1.1, dashes=(3.0, 2.0))
    return Key(level.label, color, "4.5 3")


def _y_limits(axes, from_zero: bool) -> None:
    low, high = axes.get_ylim()
    if from_zero:
        axes.set_ylim(0, 1.04 * high if high > 0 else 1)
    elif high - low < 1e-9 * max(1.0, abs(high)):
        axes.set_ylim(low - 0.5, high + 0.5)


def _caption(window: int, logged: str, length: int) -> str:
    if not window:
        return ""
    every = thinned(length)
    some = f" (one of {every} is drawn)" if every > 1 else ""
    each = f", each {logged}" if logged else ""
    return f"Dots are the logged values{each}{some}; lines are moving means over {count(window)} values."
