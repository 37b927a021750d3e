"""A table of whole runs of `engine.train`, from their summaries: a line a method and number of teachers, over seeds."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from bench.machine import describe


def collect(directories: list[str]) -> dict[str, Any]:
    """What a table needs of each run's summary.json; nothing that names the machine's folders."""
    rows = []
    for directory in directories:
        summary = json.loads((Path(directory) / "summary.json").read_text())
        settings = summary["settings"]
        rows.append({
            "method": summary["method"],
            "seed": summary["seed"],
            "teachers": [{k: t[k] for k in ("sample", "origin", "parameters", "metrics", "prepared")} for t in summary["teachers"]],
            "student": {k: summary["student"][k] for k in ("parameters", "metrics", "best_step")},
            "times_smaller": summary["times_smaller"],
            "phases": summary["phases"],
            "seconds": summary["seconds"],
            "sizes": summary["sizes"],
            "padding_waste": summary["padding_waste"],
            "peak_memory": summary["peak_memory"],
            "git_commit": summary["git_commit"],
            "hardware": summary["device"],
            "versions": summary["versions"],
            "settings": {k: v for k, v in settings.items() if k not in ("teachers", "student", "data", "output", "cache_dir")},
        })  # fmt: skip
    return {"kind": "runs", "rows": rows}


def render_runs(results: dict[str, Any]) -> str:
    """One line a kind of run: mean and spread over seeds of the student's accuracy, size, time and memory."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in results["rows"]:
        groups.setdefault((row["method"], len(row["teachers"])), []).append(row)
    lines = [
        "| method | teachers | teachers after | validation accuracy | test accuracy | parameters | times smaller | examples/s | training time | peak memory |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (method, teachers), rows in groups.items():
        phases = [row["phases"][method] for row in rows]
        lines.append(" | ".join([
            f"| {method}", str(teachers), _teachers(rows), *(_accuracy(rows, split) for split in ("validation", "test")),
            f"{rows[0]['student']['parameters']:,}",
            f"{rows[0]['times_smaller']:.2f}" if rows[0]["times_smaller"] else "",
            _range([p["examples_per_second"] for p in phases]), f"{_range([p['seconds'] for p in phases])} s",
            f"{median(row['peak_memory']['host'] for row in rows) / 2**30:.1f} GiB |",
        ]))  # fmt: skip
    first = results["rows"][0]
    seeds = sorted({row["seed"] for row in results["rows"]})
    hardware, versions, sizes = first["hardware"], first["versions"], first["sizes"]
    over = (
        f"mean ± standard deviation over seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"seed {seeds[0]}"
    )
    commits = ", ".join(sorted({(row["git_commit"] or "unknown")[:7] for row in results["rows"]}))
    most = max(results["rows"], key=lambda row: len(row["teachers"]))
    prepared = [t["prepared"] for t in most["teachers"]]
    reached = " and ".join(f"{100 * p['validation']['accuracy']:.2f} %" for p in prepared)
    took = " and ".join(f"{p['seconds']:.0f} s" for p in prepared)
    lines += [
        "",
        f"Accuracy in %, {over}; training on {sizes['train']:,} examples, "
        f"quiz {sizes['quiz']}, validation {sizes['validation']}, test {sizes['test']:,}; the teachers were prepared "
        f"once, in {took}, and reach {reached} on validation. Speed and time are the student's training alone, median and extremes; the "
        f"machine was shared with other work. Commit {commits}. {describe(hardware, versions)}",
    ]
    return "\n".join(lines)


def _accuracy(rows: list[dict[str, Any]], split: str) -> str:
    values = [100 * row["student"]["metrics"][split]["accuracy"] for row in rows]
    return f"{mean(values):.2f} ± {stdev(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"


def _teachers(rows: list[dict[str, Any]]) -> str:
    """Mean validation accuracy of the teachers as the run left them: lower than prepared where teaching cost them."""
    values = [100 * t["metrics"]["validation"]["accuracy"] for row in rows for t in row["teachers"]]
    return f"{mean(values):.2f}" if values else ""


def _range(values: list[float]) -> str:
    """Median, and the extremes where there are several."""
    return f"{median(values):.0f}" + (f" ({min(values):.0f}-{max(values):.0f})" if len(values) > 1 else "")
