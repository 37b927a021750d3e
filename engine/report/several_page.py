"""The page of several runs side by side, and that of a comparison."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any
from urllib.parse import quote

from engine.report import curves
from engine.report.comparison_plot import draw, said
from engine.report.comparison_tables import COSTS, EXCLUDES, difference_table, main_table, measured, remarks
from engine.report.costs import costs, joules, training
from engine.report.layout import Cell, Section, Table, without_empty
from engine.report.load import Comparison, Run, mapping
from engine.report.run_page import embedded, tiles
from engine.report.settings import differing, shown
from engine.report.svg import inline
from engine.report.units import (
    BYTES,
    ENERGY,
    TIME,
    arrow,
    capital,
    column,
    count,
    duration,
    enumerated,
    finite,
    metric_header,
    metric_value,
    rate,
)
from engine.report.words import DEMONSTRATION, in_short, method_name, models, standing, teachers_of
from engine.sections import SECTIONS

WIDTH = 7.2  # inches of the plot
MOST = 24  # runs that are overlaid: more lines than that nobody can tell apart


def side_by_side(runs: Sequence[Run], file: Path) -> dict[str, Any]:
    """What the template gets for several runs; links are from `file`."""
    labels = labels_of(runs)
    settings = [[name, *map(shown, values)] for name, values in differing(runs).items()]
    charts, keys = curves.together(runs[:MOST], labels[:MOST])
    sections = [
        Section("results", "Results", tables=[_results(runs, labels)]),
        Section("settings", "Settings that differ", tables=[
            Table("differing", "Settings that differ between the runs", ["setting", *labels], settings, left=1 + len(runs)),
        ] if settings else (), paragraphs=() if settings else ["The runs have the same settings."]),
        Section("curves", "Curves of the student", charts=charts, keys=keys, paragraphs=_cut(runs)),
        Section("costs", "Time by section of the step", tables=[_section_times(runs, labels, "the last phase of each run")]),
    ]  # fmt: skip
    return {
        "title": f"{len(runs)} runs side by side", "subtitle": "", "kind": "several", "lead": "",
        "demonstration": _demonstration(runs), "unfinished": "", "tiles": [],
        "problems": [problem for run in runs for problem in run.problems], "sections": [s for s in sections if s],
        "runs": [_short(run, label, number, file) for number, (run, label) in enumerate(zip(runs, labels, strict=True), 1)],
    }  # fmt: skip


def comparison(one: Comparison, file: Path) -> dict[str, Any]:
    """What the template gets for a comparison."""
    found, labels = one.found, labels_of(one.runs)
    columns, *rows = _arrows(*main_table(found))
    figures = len(columns) - COSTS
    compared, *differences = _arrows(*difference_table(found))
    learning = [run for run in one.runs if not _shows_teacher(run)]
    named = [_row(run) for run in learning]
    charts, keys = curves.together(learning[:MOST], named[:MOST])
    costly = [[", ".join(row[:2]), *row[figures:]] for row in rows if any(row[figures:])]
    sections = [
        Section("results", "Results", tables=[
            Table("figures", capital(measured(found)), columns[:figures], [row[:figures] for row in rows], left=2),
            Table("differences", "Paired differences, seed by seed", compared, differences, left=3,
                  note=f"{EXCLUDES}.") if differences else None,
        ], plot=inline(draw(found, WIDTH, title=False), "plot", said(found)) if rows else ""),
        Section("costs", "Sizes and costs", tables=[
            without_empty(Table("cost-table", "Sizes and costs of the rows", ["row", *columns[figures:]], costly)),
        ] if costly else ()),
        Section("curves", "Curves of the student", paragraphs=_cut(learning),
                charts=charts, keys=keys),
        Section("sections", "Time by section of the step", tables=[
            _section_times(learning, named, "the last phase, mean over seeds"),
        ]),
        Section("remarks", "What the figures are", texts=remarks(found)),
        Section("commands", "Commands", commands=[
            ("Run or continue this comparison", str(found["command"])),
            ("Make this page again", f"python -m engine.report {one.folder}"),
        ]),
    ]  # fmt: skip
    failed = [f"{entry['title']} failed: {entry['error']}" for entry in found.get("failed", [])]
    return {
        "title": found["title"], "subtitle": one.folder.name, "kind": "comparison", "lead": _lead(found),
        "demonstration": DEMONSTRATION if "embedded" in found.get("sources", []) else "",
        "unfinished": f"{found['missing']} runs have not been made yet." if found.get("missing") else "", "tiles": [],
        "problems": [*one.problems, *failed], "sections": [section for section in sections if section],
        "runs": [_short(run, label, number, file) for number, (run, label) in enumerate(zip(one.runs, labels, strict=True), 1)],
    }  # fmt: skip


def labels_of(runs: Sequence[Run]) -> list[str]:
    """A name for each run: its directory's, with as many of the directories above as tell them apart."""
    parts = [run.folder.resolve().parts for run in runs]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        labels = ["/".join(p[-depth:]) for p in parts]
        if len(set(labels)) == len(labels):
            return labels
    return ["/".join(p) for p in parts]


def _results(runs: Sequence[Run], labels: Sequence[str]) -> Table:
    metrics = list(dict.fromkeys(run.metric for run in runs))
    joule, energies = column([joules(run) for run in runs], ENERGY)
    memory, peaks = column([_peak(run) for run in runs], BYTES)
    rows = []
    for number, (run, label, peak, energy) in enumerate(zip(runs, labels, peaks, energies, strict=True), 1):
        student, main = run.summary.get("student", {}), run.phase(run.method)
        splits, smaller = mapping(student.get("metrics")), finite(run.summary.get("times_smaller"))
        figures = [metric_value(mapping(splits.get(split)).get(m), m) if m == run.metric else "" for m in metrics
                   for split in ("validation", "test")]  # fmt: skip
        rows.append([Cell(label, href=f"#run-{number}"), f"{method_name(run)}: {models(run)}", *figures, count(student.get("parameters")),
                     f"{smaller:.2f} ×" if smaller else "", duration(training(run)) if run.finished else "not finished",
                     rate(main.get("examples_per_second")), peak, energy])  # fmt: skip
    measures = [f"{split} {metric_header(m)}" for m in metrics for split in ("validation", "test")]
    costly = ["parameters", "smaller", "training time", "examples/s", f"peak memory, {memory}", joule]
    columns = ["run", "method, models", *measures, *costly]
    note = "Figures are the student's; examples/s are of its last phase, training time is of all its phases."
    return without_empty(Table("side-by-side", "The runs side by side", columns, rows, left=2, note=note))


def _section_times(runs: Sequence[Run], labels: Sequence[str], words: str) -> Table | None:
    """A column a label, with the mean of its runs: seconds a step of each section of the last phase."""
    found: dict[str, list[dict[str, float]]] = {}
    for run, label in zip(runs, labels, strict=True):
        if one := {cost.name: cost.seconds for cost in costs(run, run.main())}:
            found.setdefault(label, []).append(one)
    if not found:
        return None
    named = dict.fromkeys(name for each in found.values() for one in each for name in one)
    names = [*(name for name in SECTIONS if name in named), *sorted(set(named) - set(SECTIONS))]
    means = [{name: fmean(one.get(name, 0.0) for one in each) for name in names} for each in found.values()]
    totals, most = [sum(one.values()) for one in means], max(max(one.values()) for one in means)
    unit, texts = column([*(one[name] or None for name in names for one in means), *totals], TIME, figures=4)
    rows, width = [], len(means)
    for place, name in enumerate(names):
        cells = zip(texts[place * width : (place + 1) * width], means, strict=True)
        rows.append([name, *(Cell(text, bar=one[name] / most if most else None) for text, one in cells)])
    rows.append(["whole step", *texts[-width:]])
    caption = f"{unit} per step, by section, in {words}"
    return Table("section-times", caption, ["section", *found], rows, strong=[len(rows) - 1])


def _short(run: Run, label: str, number: int, file: Path) -> dict[str, Any]:
    """A run in a few lines, with a link to its own page where that is there."""
    own = run.folder / "report.html"
    link = quote(os.path.relpath(own, file.parent)) if own.is_file() else ""
    seed = f"seed {run.settings['seed']}" if "seed" in run.settings else ""
    said, facts = in_short(run), tiles(run)
    if _shows_teacher(run):
        said, facts = f"Prepares and measures {enumerated(teachers_of(run))}; the student takes a single step.", []
    return {"name": f"run-{number}", "label": label, "link": link, "seed": seed, "words": said,
            "unfinished": "" if run.finished else standing(run), "tiles": facts}  # fmt: skip


def _row(run: Run) -> str:
    """What the seeds of a row have in common in the names of their directories."""
    return re.sub(r"(-seed-\d+)?-[0-9a-f]{10}$", "", run.name)


def _shows_teacher(run: Run) -> bool:
    """Whether it serves a row that shows a teacher: the student takes one step, and its figures mean nothing."""
    return run.settings.get("max_steps") == 1


def _arrows(columns: list[str], rows: list[list[str]]) -> list[list[str]]:
    """The columns and then the rows, with arrows as they are printed."""
    return [[arrow(text) for text in row] for row in (columns, *rows)]


def _peak(run: Run) -> float | None:
    peak = run.summary.get("peak_memory", {})
    return finite(peak.get("device", peak.get("host")))


def _lead(found: dict[str, Any]) -> str:
    seeds = found["seeds"]
    note = (found.get("note") or "").strip()
    number = f"{len(found['rows'])} row{'s' * (len(found['rows']) != 1)}, {len(seeds)} seed{'s' * (len(seeds) != 1)}"
    interval = ", mean and 95 % interval" * (len(seeds) > 1)
    return f"{number}: {measured(found)}{interval}. {note}".strip()


def _demonstration(runs: Sequence[Run]) -> str:
    some = [embedded(run) for run in runs]
    if not any(some):
        return ""
    mixed = "" if all(some) else "Some of these runs are demonstrations; do not compare them with the others. "
    return mixed + DEMONSTRATION


def _cut(runs: Sequence[Run]) -> list[str]:
    return [f"The charts show the first {MOST} of {len(runs)} runs."] if len(runs) > MOST else []
