"""The tables of a profile, for the console and in Markdown, from what profile.json holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.plugins import short_name
from engine.profiling.ledger import CATEGORIES
from engine.report.markdown import markdown_table
from engine.report.units import BYTES, TIME, WORK, Units, decimals, rate, unit_of
from engine.sections import SECTIONS

Table = dict[str, Any]  # what Console.table takes
ACROSS = 4  # settings beside each other, as they fit into 80 columns


def label(row: dict[str, Any]) -> str:
    """exact; exact, checkpointing both; kd, micro-batch 8"""
    parts = [row["strategy"] or row["method"]]
    if row["checkpointing"] != "none":
        parts.append(f"checkpointing {row['checkpointing']}")
    if row["micro_batch"]:
        parts.append(f"micro-batch {row['micro_batch']}")
    return ", ".join(parts)


def shape(row: dict[str, Any]) -> str:
    return f"{row['batch']} x {row['length']}"


def shapes(rows: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(map(shape, rows)))


def in_order(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One shape together, small ones first."""
    return sorted(rows, key=lambda row: (row["batch"] * row["length"], row["length"]))


def tables(found: dict[str, Any], across: int | None = ACROSS) -> list[Table]:
    """All of them: what steps take; then, shape by shape, time and memory by section and what holds the memory, with at most
    so many settings beside each other."""
    rows = in_order(found["rows"])
    done = [row for row in rows if row["error"] is None]
    result = [steps(rows)]
    for each in shapes(done):
        same = [row for row in done if shape(row) == each]
        for start in range(0, len(same), across or len(same)):
            part = same[start : start + (across or len(same))]
            result += [times(part, each), memory(part, each), holders(part, each)]
    return result


def steps(rows: Sequence[dict[str, Any]]) -> Table:
    """A row a setting; "of exact" compares with the first row of the same shape."""
    done = [row for row in rows if row["error"] is None]
    (second, time), (byte, space) = (
        unit_of([row[key] for row in done], units) for key, units in (("seconds", TIME), ("peak", BYTES))
    )
    flop, work = unit_of([row["flops"] for row in done], WORK)
    base, first = f"of {_name(rows[0])}", {}
    columns = ["strategy", "shape", f"time, {time}", base, "ex/s", work, f"peak, {space}", base]
    lines = []
    for row in rows:
        line = [_name(row), shape(row)]
        if row["error"] is not None:
            lines.append([*line, row["error"], *[""] * 5])
            continue
        reference = first.setdefault(shape(row), row)
        lines.append([
            *line, _figures(row["seconds"] / second), _part(row, reference, "seconds"), rate(row["examples"] / row["seconds"]),
            _figures(row["flops"] / flop), _figures(row["peak"] / byte), _part(row, reference, "peak"),
        ])  # fmt: skip
    if not any(line[3] for line in lines):  # nothing to compare
        columns, *lines = ([*line[:3], *line[4:7]] for line in (columns, *lines))
    return {"title": "What a step takes", "columns": columns, "rows": lines, "words": 2}


def times(rows: Sequence[dict[str, Any]], shown: str) -> Table:
    """A row a section, with its share; they add up to the step."""
    (size, unit), whole = _unit([row["seconds"] for row in rows], TIME), [row["seconds"] for row in rows]
    places = decimals(max(whole) / size)
    used = [name for name in SECTIONS if any(row["sections"].get(name) for row in rows)]

    def cell(row: dict[str, Any], name: str) -> str:
        seconds = row["sections"].get(name)
        return "" if not seconds else f"{seconds / size:,.{places}f} ({100 * seconds / row['seconds']:.0f} %)"

    lines = [[name, *(cell(row, name) for row in rows)] for name in used]
    lines.append(["whole step", *(f"{seconds / size:,.{places}f}" for seconds in whole)])
    return _table(f"Time by section of the step, {unit}, {shown}", "section", rows, lines)


def memory(rows: Sequence[dict[str, Any]], shown: str) -> Table:
    """The most that was in use in each section."""
    used = [name for name in SECTIONS if any(row["peaks"].get(name) for row in rows)]
    wanted = [*([row["peaks"].get(name) for row in rows] for name in used), [row["peak"] for row in rows]]
    return _in_bytes("Highest memory by section", "section", [*used, "whole step"], wanted, rows, shown)


def holders(rows: Sequence[dict[str, Any]], shown: str) -> Table:
    """What the memory is for when most of it is in use."""
    used = [name for name in CATEGORIES if any(row["holds"].get(name) for row in rows)]
    wanted = [
        *([row["holds"].get(name) for row in rows] for name in used),
        [sum(row["holds"].values()) for row in rows],
    ]
    return _in_bytes("What holds the memory at its peak", "for", [*used, "all"], wanted, rows, shown)


def _in_bytes(
    title: str, first: str, names: Sequence[str], wanted: Sequence[Sequence[int | None]], rows: Sequence[dict], shown: str
) -> Table:  # fmt: skip
    size, unit = _unit([value for line in wanted for value in line], BYTES)
    places = decimals(max(value or 0 for line in wanted for value in line) / size)
    lines = [
        [name, *("" if value is None else f"{value / size:,.{places}f}" for value in line)]
        for name, line in zip(names, wanted, strict=True)
    ]
    return _table(f"{title}, {unit}, {shown}", first, rows, lines)


def _unit(values: Sequence[float | None], units: Units) -> tuple[float, str]:
    """A thousandth of what most are: what a small section takes is to show."""
    return unit_of([(value or 0) / 16 for value in values], units)


def _table(title: str, first: str, rows: Sequence[dict[str, Any]], lines: list[list[str]]) -> Table:
    return {"title": title, "columns": [first, *map(_name, rows)], "rows": lines, "words": 1}


def page(found: dict[str, Any], largest: bool = False) -> str:
    """All of it in Markdown; section by section of the `largest` shape alone, where that is asked for."""
    parts, several = [], tables(found, across=None)
    for table in [several[0], *several[-3:]] if largest else several:
        parts += [f"{table['title']}:", "\n".join(markdown_table(table["columns"], table["rows"]))]
    return "\n\n".join([*parts, caption(found)])


def caption(found: dict[str, Any]) -> str:
    """What was measured, on what, and what the figures are."""
    settings, models, device = found["settings"], found["models"], found["device"]
    teachers = "; ".join(_model(model) for model in models["teachers"])
    threads = f", {device['threads']} thread{'s' * (device['threads'] != 1)}" * (device["device"] == "cpu")
    apart = max((abs(row["seen"] / row["peak"] - 1) for row in found["rows"] if row["peak"]), default=0.0)
    return (
        f"Method {short_name(settings['method'])}, {', '.join(dict.fromkeys(row['precision'] for row in found['rows']))}; "
        + (f"teachers: {teachers}; " if teachers else "")
        + f"student: {_model(models['student'])}. Times are those of the median of {found['steps']} steps, without the wait for "
        "data; memory is the most that torch's allocator had given out at once, and what the ledger of tensors saw of it was "
        f"within {100 * apart:.1f} %. "
        + ("Steps run eagerly, without CUDA graphs. " if device["device"] != "cpu" else "")
        + f"{device['name']}{threads}, torch {found['versions']['torch']}, "
        f"Python {found['versions']['python']}."
    )


def _model(model: dict[str, Any]) -> str:
    return f"{model['name']} ({model['parameters']:,} parameters)"


def _name(row: dict[str, Any]) -> str:
    """The label, so that a narrow column can break it."""
    return label(row).replace("_", " ")


def _figures(value: float) -> str:
    return f"{value:,.{decimals(value)}f}"


def _part(row: dict[str, Any], base: dict[str, Any], key: str) -> str:
    return "" if row is base or not base[key] else f"{row[key] / base[key]:.2f}"
