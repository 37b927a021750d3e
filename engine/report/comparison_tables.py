"""The tables of a comparison, for the console and in Markdown, from what comparison.json holds.

Their shape is that of Table 1 of "Improving MetaDistil Framework": method, teachers -> student, figure, parameters, times
smaller; with the interval over seeds, the published figure, time and memory beside them.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

from engine.report.markdown import markdown_table
from engine.report.units import BYTES, PLAIN, TIME, capital, column
from engine.report.words import DEMONSTRATION

Result = dict[str, Any]  # what comparison.json holds
COSTS = 5  # columns of sizes and costs, the last ones
ERRORS = {"mse"}  # metrics that are no fraction of one
EXCLUDES = "“excludes 0”: whether the 95 % interval of the difference excludes zero"


def console_tables(found: Result) -> list[dict[str, Any]]:
    """Arguments of Console.table, one mapping a table; figures and costs apart, since one table is too wide for 80 columns."""
    columns, rows = main_table(found, short=True)
    costs = len(columns) - COSTS
    differences, compared = difference_table(found)
    parts = {
        f"{found['title']}: {measured(found)}": (columns[:costs], [row[:costs] for row in rows]),
        "Sizes and costs": (["row", *columns[costs:]], [[", ".join(row[:2]), *row[costs:]] for row in rows]),
        f"Differences, seed by seed; {EXCLUDES}": (
            ["row", *differences[2:]],
            [[", ".join(row[:2]), *row[2:]] for row in compared],
        ),
    }
    return [{"title": title, "columns": c, "rows": r} for title, (c, r) in parts.items() if r]


def markdown(found: Result) -> str:
    """The page of a comparison's directory."""
    return f"## {found['title']}\n\n{body(found)}"


def body(found: Result) -> str:
    """Both tables with what has to be known to read them, and the command that makes them."""
    parts = [*markdown_table(*main_table(found)), "", " ".join(remarks(found))]
    columns, rows = difference_table(found)
    if rows:
        parts += ["", f"Differences, seed by seed ({EXCLUDES}):", "", *markdown_table(columns, rows)]
    if found["failed"]:
        parts += ["", "Failed:", "", *(f"- {entry['title']}: {entry['error']}" for entry in found["failed"])]
    return "\n".join([*parts, "", "```bash", found["command"], "```"]) + "\n"


def main_table(found: Result, short: bool = False) -> tuple[list[str], list[list[str]]]:
    """Column names and rows of text; `short` leaves the intervals of single values out."""
    values = list(dict.fromkeys(value for row in found["rows"] for value in row["values"] or []))
    published = any(row["published"] is not None for row in found["rows"])
    columns = ["method", "teachers -> student", *values, "average" if values else _metric(found)]
    names, costs = _costs(found["rows"])
    columns += ["published"] * published + names
    rows = zip(found["rows"], costs, strict=True)
    return columns, [[*_figures(found, row, values, published, short), *cost] for row, cost in rows]


def difference_table(found: Result) -> tuple[list[str], list[list[str]]]:
    """What rows have more or less than the row that they are compared with; only rows that share seeds with it."""
    rows = []
    for row in found["rows"]:
        if difference := row.get("difference"):
            clear = difference["interval"] is not None and abs(difference["mean"]) > difference["interval"]
            verdict = {True: "yes", False: "no"}[clear] if difference["interval"] is not None else "one seed"
            rows.append([row["name"], row["models"], row["against"], number(found, difference, signed=True),
                         str(difference["n"]), verdict])  # fmt: skip
    return ["method", "teachers -> student", "compared with", "difference", "seeds", "excludes 0"], rows


def remarks(found: Result) -> list[str]:
    """What the figures are, how the intervals are made, and where they were measured: a remark each."""
    return [*_of_figures(found), *_of_runs(found)]


def _of_figures(found: Result) -> list[str]:
    several = len(found["seeds"]) > 1
    seeds = ", ".join(map(str, found["seeds"]))
    scale = "; the grid's small scale" * (found["scale"] == "small")
    said = [f"{capital(measured(found))}; seed{'s' * several} {seeds}{scale}."]
    if several:
        said.append("Figures are means with 95 % intervals, m ± t s / sqrt(n): m is the mean and s the standard deviation of n "
                    "seeds, t the 0.975 quantile of Student's distribution with n - 1 degrees of freedom.")  # fmt: skip
    teachers = ", ".join(map(str, found["teacher_seeds"]))
    shared = " and serve all seeds, so the intervals show the spread of the students alone" * several
    said.append(f"Teachers were prepared once (seed {teachers}){shared}.")
    said.append("Time is the training of the student in all its stages, without the preparation of the teachers; examples/s "
                "is of the last stage.")  # fmt: skip
    return said


def _of_runs(found: Result) -> list[str]:
    said = [found["note"].strip()] if found["note"] else []
    if found["models"]:
        said.append("Models: " + "; ".join(f"{name} is {place}" for name, place in found["models"].items()) + ".")
    if found["sizes"]:
        said.append("Examples: " + ", ".join(f"{n} {_range(*s)}" for n, s in found["sizes"].items()) + ".")
    if "embedded" in found["sources"]:
        said.append(f"EMBEDDED DEMONSTRATION. {DEMONSTRATION}")
    for machine in found["machines"]:
        device, versions = machine["device"], machine["versions"]
        threads = f", {device['threads']} thread{'s' * (device['threads'] != 1)}" * (device["device"] == "cpu")
        said.append(f"{device['name']}{threads}, torch {versions['torch']}, transformers {versions['transformers']}, "
                    f"Python {versions['python']}.")  # fmt: skip
    if found["commits"]:
        said.append("Commit " + ", ".join(_short(commit) for commit in found["commits"]) + ".")
    if found["missing"]:
        said.append(f"{found['missing']} runs have not been made yet.")
    return said


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


def _figures(found: Result, row: Result, values: list[str], published: bool, short: bool) -> list[str]:
    columns, given = row.get("columns") or {}, row["published"]
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
    return line


def _costs(rows: list[Result]) -> tuple[list[str], list[list[str]]]:
    """Column names, each with its unit, and a line a row."""
    second, times = column([_mean(row["cells"], "seconds") for row in rows], TIME)
    _, speeds = column([_mean(row["cells"], "examples_per_second") for row in rows], PLAIN)
    byte, peaks = column([_memory(row["cells"]) for row in rows], BYTES)
    lines = []
    for row, *measured_costs in zip(rows, times, speeds, peaks, strict=True):
        parameters = _same([f"{cell['parameters']:,}" for cell in row["cells"]])
        smaller = _same([f"{cell['times_smaller']:.2f} x" for cell in row["cells"] if cell.get("times_smaller")])
        lines.append([parameters, smaller, *measured_costs])
    time, memory = (f"{name}, {unit}" * any(texts) or name for name, unit, texts in
                    (("time", second, times), ("peak memory", byte, peaks)))  # fmt: skip
    return ["parameters", "smaller", time, "examples/s", memory], lines


def _mean(cells: list[dict], key: str) -> float | None:
    known = [c[key] for c in cells if c.get(key)]
    return fmean(known) if known else None


def _memory(cells: list[dict]) -> int | None:
    """The highest of the runs: on the device where there is one, else resident."""
    known = [c["peak_memory"].get("device", c["peak_memory"]["host"]) for c in cells if c.get("peak_memory")]
    return max(known, default=None)


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
