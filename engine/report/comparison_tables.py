"""The tables of a comparison, for the console and in Markdown, from what comparison.json holds.

Their shape is that of Table 1 of "Improving MetaDistil Framework": method, teachers -> student, figure, parameters, times
smaller; with the interval over seeds, the published figure, time and memory beside them.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

Result = dict[str, Any]  # what comparison.json holds
COSTS = ["parameters", "smaller", "time", "examples/s", "peak memory"]
ERRORS = {"mse"}  # metrics that are no fraction of one


def console_tables(found: Result) -> list[dict[str, Any]]:
    """Arguments of Console.table, one mapping a table; figures and costs apart, since one table is too wide for 80 columns."""
    columns, rows = main_table(found, short=True)
    costs = len(columns) - len(COSTS)
    differences, compared = difference_table(found)
    parts = {
        f"{found['title']}: {measured(found)}": (columns[:costs], [row[:costs] for row in rows]),
        "sizes and costs": (["row", *columns[costs:]], [[", ".join(row[:2]), *row[costs:]] for row in rows]),
        "differences, seed by seed": (["row", *differences[2:]], [[", ".join(row[:2]), *row[2:]] for row in compared]),
    }
    return [{"title": title, "columns": c, "rows": r} for title, (c, r) in parts.items() if r]


def markdown(found: Result) -> str:
    """The page of a comparison's directory."""
    return f"## {found['title']}\n\n{body(found)}"


def body(found: Result) -> str:
    """Both tables with what has to be known to read them, and the command that makes them."""
    parts = [*_markdown(*main_table(found)), "", caption(found)]
    columns, rows = difference_table(found)
    if rows:
        parts += ["", "Differences, seed by seed:", "", *_markdown(columns, rows)]
    if found["failed"]:
        parts += ["", "Failed:", "", *(f"- {entry['title']}: {entry['error']}" for entry in found["failed"])]
    return "\n".join([*parts, "", "```bash", found["command"], "```"]) + "\n"


def main_table(found: Result, short: bool = False) -> tuple[list[str], list[list[str]]]:
    """Column names and rows of text; `short` leaves the intervals of single values out."""
    values = list(dict.fromkeys(value for row in found["rows"] for value in row["values"] or []))
    published = any(row["published"] is not None for row in found["rows"])
    columns = ["method", "teachers -> student", *values, "average" if values else _metric(found)]
    columns += ["published"] * published + COSTS
    return columns, [_line(found, row, values, published, short) for row in found["rows"]]


def difference_table(found: Result) -> tuple[list[str], list[list[str]]]:
    """What rows have more or less than the row that they are compared with; only rows that share seeds with it."""
    rows = []
    for row in found["rows"]:
        if difference := row.get("difference"):
            clear = difference["interval"] is not None and abs(difference["mean"]) > difference["interval"]
            verdict = {True: "yes", False: "no"}[clear] if difference["interval"] is not None else "one seed"
            rows.append([row["name"], row["models"], row["against"], number(found, difference, signed=True),
                         str(difference["n"]), verdict])  # fmt: skip
    return ["method", "teachers -> student", "compared with", "difference", "seeds", "without 0"], rows


def caption(found: Result) -> str:
    """What the figures are, how the intervals are made, and where they were measured."""
    seeds = ", ".join(map(str, found["seeds"]))
    scale = "; the grid's small scale" * (found["scale"] == "small")
    words = [f"{_capital(measured(found))}; seed{'s' * (len(found['seeds']) > 1)} {seeds}{scale}."]
    if len(found["seeds"]) > 1:
        words.append("Mean ± t s / sqrt(n): s the standard deviation over n seeds, t the 0.975 quantile of Student's "
                     "distribution with n - 1 degrees of freedom (95 %).")  # fmt: skip
    teachers = ", ".join(map(str, found["teacher_seeds"]))
    several = ", and are the same for all seeds: the intervals hold the students' spread alone" * (
        len(found["seeds"]) > 1
    )
    words.append(f"Teachers were prepared once (seed {teachers}){several}.")
    words.append("Time is the student's training in all its stages, without the teachers' preparation; examples/s is of the "
                 "last stage.")  # fmt: skip
    if found["note"]:
        words.append(found["note"].strip())
    if found["models"]:
        words.append("Models: " + "; ".join(f"{name} is {place}" for name, place in found["models"].items()) + ".")
    if found["sizes"]:
        words.append("Examples: " + ", ".join(f"{n} {_range(*s)}" for n, s in found["sizes"].items()) + ".")
    if "embedded" in found["sources"]:
        words.append(
            "EMBEDDED DEMONSTRATION: miniatures and generated text; these figures say nothing about real models."
        )
    for machine in found["machines"]:
        device, versions = machine["device"], machine["versions"]
        threads = f", {device['threads']} thread{'s' * (device['threads'] != 1)}" * (device["device"] == "cpu")
        words.append(f"{device['name']}{threads}, torch {versions['torch']}, transformers {versions['transformers']}, "
                     f"Python {versions['python']}.")  # fmt: skip
    if found["commits"]:
        words.append("Commit " + ", ".join(_short(commit) for commit in found["commits"]) + ".")
    if found["missing"]:
        words.append(f"{found['missing']} runs have not been made yet.")
    return " ".join(words)


def measured(found: Result) -> str:
    """accuracy in % on test."""
    percent = "" if set(found["metrics"]) <= ERRORS and found["metrics"] else " in %"
    return f"{_metric(found)}{percent} on {found['split']}"


def number(found: Result, known: dict[str, Any] | None, signed: bool = False, spread: bool = True) -> str:
    """Mean ± half the interval."""
    if known is None:
        return ""
    scale = scale_of(found)
    text = f"{scale * known['mean']:{'+' * signed}.2f}"
    return text if known["interval"] is None or not spread else f"{text} ± {scale * known['interval']:.2f}"


def scale_of(found: Result) -> int:
    return 1 if found["metrics"] and set(found["metrics"]) <= ERRORS else 100


def average_published(row: Result) -> float | None:
    """The published figure of the row as a whole, which is the mean where every value has one; None where there is none."""
    given = row["published"]
    if not isinstance(given, dict):
        return given
    known = [given[value] for value in row["values"] or [] if value in given]
    return given.get("average", round(fmean(known), 2) if known and len(known) == len(row["values"]) else None)


def _line(found: Result, row: Result, values: list[str], published: bool, short: bool) -> list[str]:
    cells, columns, given = row["cells"], row.get("columns") or {}, row["published"]
    line = [row["name"], row["models"]]
    for value in values:
        text = number(found, columns.get(value), spread=not short)
        known = given.get(value) if isinstance(given, dict) else None
        line.append(text if known is None else f"{text} ({known:g})".strip())
    wanted = 1 if row["teacher"] else len(found["seeds"])
    part = f" (n = {row['all']['n']})" if row["all"] and row["all"]["n"] < wanted else ""
    line.append(number(found, row["all"]) + part)
    if published:
        line.append("" if average_published(row) is None else f"{average_published(row):g}")
    return line + [
        _same([f"{c['parameters']:,}" for c in cells]),
        _same([f"{c['times_smaller']:.2f} x" for c in cells if c.get("times_smaller")]),
        _mean(cells, "seconds", "{:.0f} s"), _mean(cells, "examples_per_second", "{:.0f}"), _memory(cells),
    ]  # fmt: skip


def _mean(cells: list[dict], key: str, form: str) -> str:
    known = [c[key] for c in cells if c.get(key)]
    return form.format(fmean(known)) if known else ""


def _memory(cells: list[dict]) -> str:
    """The highest of the runs: on the device where there is one, else resident."""
    known = [c["peak_memory"].get("device", c["peak_memory"]["host"]) for c in cells if c.get("peak_memory")]
    return f"{max(known) / 2**30:.1f} GiB" if known else ""


def _same(texts: list[str]) -> str:
    """One text where all are the same, else the first and the last: heads differ with the number of labels."""
    different = list(dict.fromkeys(texts))
    return " to ".join(different if len(different) < 3 else [different[0], different[-1]])


def _metric(found: Result) -> str:
    return "/".join(found["metrics"]) or "figure"


def _range(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _short(commit: str) -> str:
    commit, plus, changes = commit.partition("+")
    return commit[:7] + plus + changes


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _markdown(columns: list[str], rows: list[list[str]]) -> list[str]:
    lines = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
