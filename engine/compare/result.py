"""What a comparison came to, as one mapping of plain values: comparison.json, from which tables and plot are made."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from engine.compare.grid import Cell, Grid, Row
from engine.compare.stats import estimate, paired
from engine.plugins import short_name
from engine.report.units import duration

Result = dict[str, Any]


def collect(grid: Grid, done: Sequence[tuple[Cell, dict]], failed: Sequence[tuple[Cell, str]], command: str) -> Result:
    """Rows with every cell's figures, their means and intervals, and the paired differences. Figures are fractions."""
    rows = [
        _row(grid, number, row, [(c, s) for c, s in done if c.row == number]) for number, row in enumerate(grid.rows)
    ]
    titled = {row.title: found for row, found in zip(grid.rows, rows, strict=True)}
    for row, found in zip(grid.rows, rows, strict=True):
        reference = grid.reference(row)
        if reference is not None and reference.title in titled:
            difference = paired(
                _by_seed(row, found, grid.split), _by_seed(reference, titled[reference.title], grid.split)
            )
            found["against"] = reference.title
            found["difference"] = difference and difference._asdict()
    machines: list[dict] = []
    for _, summary in done:
        machine = {key: summary[key] for key in ("device", "versions")}
        if machine not in machines:
            machines.append(machine)
    return {
        "kind": "comparison", "name": grid.name, "title": grid.title, "scale": grid.scale, "note": grid.note, "split": grid.split, "command": command,
        "seeds": grid.seeds, "teacher_seeds": sorted({cell.settings["teacher_seed"] for cell in grid.cells()}),
        "models": {name: _shown(place, layers) for name, (place, layers) in grid.places.items()},
        "metrics": list(dict.fromkeys(s["metric"] for _, s in done)),
        "sources": sorted({s["source"] for _, s in done}), "sizes": _ranges([s["sizes"] for _, s in done]),
        "commits": sorted({s["git_commit"] for _, s in done if s["git_commit"]}), "machines": machines, "rows": rows,
        "failed": [{"title": cell.title, "error": error} for cell, error in failed],
        "missing": len(grid.cells()) - len(done) - len(failed),
    }  # fmt: skip


def described(grid: Grid, cell: Cell, summary: dict) -> str:
    """A finished run in a few words."""
    found = _cell(grid.rows[cell.row], cell, summary, grid.split)
    return f"{found['metric']} {found['figures'][grid.split]:.4f} on {grid.split}, training took {duration(found['seconds'] or 0)}"


def _row(grid: Grid, number: int, row: Row, done: list[tuple[Cell, dict]]) -> Result:
    cells = [_cell(row, cell, summary, grid.split) for cell, summary in done]
    found: Result = {
        "name": row.name, "method": short_name(row.method), "models": row.models, "title": row.title, "teacher": row.show is not None,
        "values": row.values if row.each else None, "published": row.published,
        "settings": {k: v for k, v in grid.cell(number, row.values[0], grid.seeds[0]).settings.items()
                     if k not in ("teachers", "student", "data", "cache_dir", "seed")},
        "cells": cells,
    }  # fmt: skip
    if row.each:
        columns = {
            value: estimate([c["figures"][grid.split] for c in cells if c["value"] == value]) for value in row.values
        }
        found["columns"] = {value: known and known._asdict() for value, known in columns.items()}
    over_all = estimate(list(_by_seed(row, found, grid.split).values()))
    return found | {"all": over_all and over_all._asdict()}


def _cell(row: Row, cell: Cell, summary: dict, split: str) -> Result:
    """A run's figures: its student's, or those of the teacher that the row shows."""
    metric, phases = summary["metric"], summary["phases"]
    entry = summary["student"] if row.show is None else summary["teachers"][row.teachers.index(row.show)]
    found: Result = {
        "seed": cell.seed, "value": cell.value, "metric": metric,
        "figures": {split: metrics[metric] for split, metrics in entry["metrics"].items()},
        "metrics": entry["metrics"], "parameters": entry["parameters"],
    }  # fmt: skip
    if row.show is not None:
        return found | {"seconds": entry["prepared"]["seconds"] or None}
    own = {name: p for name, p in phases.items() if not name.startswith(("prepare ", "answers of "))}
    return found | {
        "times_smaller": summary["times_smaller"], "seconds": round(sum(p["seconds"] for p in own.values()), 3),
        "examples_per_second": summary["examples_per_second"], "peak_memory": summary["peak_memory"],
        "teachers_after": [t["metrics"][split][metric] for t in summary["teachers"]],
        "by_domain": entry.get("by_domain"),
    }  # fmt: skip


def _by_seed(row: Row, found: Result, split: str) -> dict[int, float]:
    """A figure a seed; of a row with several values their mean, where all of them are there."""
    by_seed: dict[int, list[float]] = {}
    for cell in found["cells"]:
        by_seed.setdefault(cell["seed"], []).append(cell["figures"][split])
    return {seed: fmean(figures) for seed, figures in by_seed.items() if len(figures) == len(row.values)}


def _shown(place: str, layers: str | None) -> str:
    """The last part of a place: no file of results names one machine's directories."""
    name = place.rstrip("/").rsplit("/", 1)[-1] if place.startswith(("/", ".", "~")) else place
    return name if layers is None else f"{name}, layers {layers}"


def _ranges(sizes: list[dict[str, int]]) -> dict[str, list[int]]:
    """Smallest and largest of each size: they differ where rows have different data."""
    names = dict.fromkeys(name for each in sizes for name in each)
    return {name: [min(found), max(found)] for name in names if (found := [e[name] for e in sizes if name in e])}
