"""Numbers as people read them: a unit for a whole column, three figures, thousands apart.

humanize and pint format one number at a time; a column needs one unit and as many decimals in each of its cells.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

Units = tuple[tuple[float, str], ...]  # size of each unit, ascending, and its name
TIME: Units = ((1e-6, "µs"), (1e-3, "ms"), (1.0, "s"))
BYTES: Units = ((1.0, "B"), (2.0**10, "KiB"), (2.0**20, "MiB"), (2.0**30, "GiB"))
ENERGY: Units = ((1e-6, "µJ"), (1e-3, "mJ"), (1.0, "J"), (1e3, "kJ"), (1e6, "MJ"))
FLOPS: Units = ((1e6, "MFLOP/s"), (1e9, "GFLOP/s"), (1e12, "TFLOP/s"), (1e15, "PFLOP/s"))
WORK: Units = ((1e6, "MFLOP"), (1e9, "GFLOP"), (1e12, "TFLOP"), (1e15, "PFLOP"), (1e18, "EFLOP"))
PLAIN: Units = ((1.0, ""),)

METRICS = {"accuracy": "accuracy", "f1": "F1", "matthews": "Matthews", "pearson": "Pearson", "spearman": "Spearman",
           "mse": "MSE"}  # fmt: skip


LARGEST = 1e100  # nothing that is measured here comes near; axes to 1e308 cannot be drawn


def finite(value: Any) -> float | None:
    """The number that `value` is; None for everything else, for nan, infinities and what is beyond LARGEST."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if abs(number) <= LARGEST else None  # which nan is not either


def unit_of(values: Sequence[float | None], units: Units) -> tuple[float, str]:
    """The largest unit that the largest of `values` is at least one of."""
    largest = max((abs(v) for v in values if v is not None), default=0.0)
    return next((unit for unit in reversed(units) if largest >= unit[0]), units[0])


def decimals(largest: float, figures: int = 3) -> int:
    """How many decimals show so many figures of `largest`; at most three."""
    if largest <= 0:
        return 0
    return min(3, max(0, figures - 1 - math.floor(math.log10(largest))))


def column(values: Sequence[float | None], units: Units, figures: int = 3) -> tuple[str, list[str]]:
    """The unit of a column and its texts, with so many figures of the largest and the decimals of that for all; "" for None,
    "< 0.1" for what would be shown as 0."""
    size, name = unit_of(values, units)
    scaled = [None if v is None else v / size for v in values]
    places = decimals(max((abs(v) for v in scaled if v is not None), default=0.0), figures)
    return name, [_placed(v, places) for v in scaled]


def quantity(value: float | None, units: Units) -> str:
    """12.3 ms; "" for None."""
    if value is None:
        return ""
    name, (text,) = column([value], units)
    return f"{text} {name}".rstrip()


def count(value: Any) -> str:
    """12,345; "" for what is no number."""
    number = finite(value)
    return "" if number is None else f"{number:,.0f}"


def rate(value: Any) -> str:
    """A rate a second with three figures, thousands apart."""
    number = finite(value)
    return "" if number is None else f"{number:,.{decimals(abs(number))}f}"


def duration(seconds: Any) -> str:
    """23 s, 4 min 5 s, 3 h 12 min, 2 d 3 h; "" for what is no number."""
    number = finite(seconds)
    if number is None:
        return ""
    if number < 59.5:
        return quantity(number, TIME) if number else "0 s"
    whole = round(number)
    for size, name, below, less in ((86_400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // below
            return f"{whole // size} {name}" + (f" {rest} {less}" if rest else "")
    return f"{whole} s"


def metric_name(metric: str) -> str:
    return METRICS.get(metric, metric)


def metric_header(metric: str) -> str:
    """As on the console: accuracy in %, everything else as it is."""
    return f"{metric_name(metric)}, %" if metric == "accuracy" else metric_name(metric)


def metric_value(value: Any, metric: str) -> str:
    number = finite(value)
    if number is None:
        return ""
    return f"{100 * number:.2f}" if metric == "accuracy" else f"{number:.4f}"


def metric_words(value: Any, metric: str) -> str:
    text = metric_value(value, metric)
    return f"{text} %" if text and metric == "accuracy" else text


def printable(text: str) -> str:
    """`text` without control characters and lone surrogates, which neither HTML nor SVG can hold."""
    text = text.encode("utf-8", "replace").decode()
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffe\uffff]", "\ufffd", text)


def arrow(text: str) -> str:
    """bert → distilbert for "bert -> distilbert", where more than ASCII can be shown."""
    return text.replace(" -> ", " → ")


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def enumerated(names: Sequence[str]) -> str:
    """a, b and c"""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""


def _placed(value: float | None, places: int) -> str:
    if value is None:
        return ""
    text = f"{value:,.{places}f}"
    if value and not text.strip("-0.,"):
        return f"< {10.0**-places:.{places}f}" if value > 0 else f"> -{10.0**-places:.{places}f}"
    return text
