"""What the tables of several benchmarks share. A row is what `records.rows` makes of a benchmark's result."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

from bench.machine import describe

Row = dict[str, Any]
Peers = dict[str, Row]  # the rows of a group by what each is of
NOT_YET = "Not yet measured on a GPU."


def by_device(rows: list[Row], render: Callable[[str, list[Row]], str]) -> str:
    """A table for each kind of device, by `render(title, rows)`, and a sentence where none is a GPU."""
    parts = []
    for device, title in (("cuda", "On a GPU"), ("cpu", "On a CPU")):
        if here := [row for row in rows if row["device"] == device]:
            parts.append(render(title, here))
        elif device == "cuda":
            parts.append(NOT_YET)
    return "\n\n".join(parts)


def peers(rows: list[Row]) -> list[Peers]:
    """Rows by group."""
    found: dict[str, Peers] = {}
    for row in rows:
        found.setdefault(row["group"], {})[row["row"]] = row
    return list(found.values())


def machines(rows: list[Row]) -> str:
    """Each machine that rows were measured on, a sentence."""
    return " ".join(dict.fromkeys(describe(**row["machine"]) for row in rows))


def spread(rows: list[Row]) -> str:
    apart = [100 * (row["upper"] - row["lower"]) / row["seconds"] for row in rows]
    return f"quartiles lie {median(apart):.0f} % of the median apart ({max(apart):.0f} % at most)"


def worst(rows: list[Row], by: str) -> str:
    """The largest error for each value of `by`, float32 first."""
    kinds = sorted({row[by] for row in rows}, reverse=True)
    return " and ".join(f"{max(row['error'] for row in rows if row[by] == kind):.0e} ({kind})" for kind in kinds)


def left_out(rows: list[Row]) -> dict[tuple[str, str], None]:
    """What has no time, and why: each once, in order."""
    return {found: None for row in rows for found in row.get("left_out", {}).items()}


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"
