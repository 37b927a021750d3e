"""Results of benchmarks, as pytest-benchmark writes them, and how those of several runs and machines come together.

A file under bench/results/ holds one subject's rows (bench_<subject>.py). It has pytest-benchmark's form, so its commands
read it; a row that an earlier run measured has the machine of that run in its `extra_info`. Groups are compared within themselves, so they are
replaced whole: a run of some of them leaves the others.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Results = dict[str, Any]  # what pytest-benchmark writes: machine_info, commit_info, benchmarks, datetime, version
KEPT = ("group", "name", "fullname", "param", "params", "extra_info")


def read(file: Path) -> Results:
    return json.loads(file.read_text())


def subject_of(name: str) -> str:
    """Of a module or of a test: `bench/bench_time_machine.py::test_it[row]` and `bench.bench_time_machine` give time-machine."""
    module = name.partition("::")[0].removesuffix(".py").replace("/", ".").rpartition(".")[2]
    return module.removeprefix("bench_").replace("_", "-")


def by_subject(results: Results) -> dict[str, Results]:
    """A run's results a subject, without what would make them long."""
    found: dict[str, Results] = {}
    for row in results["benchmarks"]:
        mine = found.setdefault(subject_of(row["fullname"]), results | {"benchmarks": []})
        stats = {name: value for name, value in row["stats"].items() if name != "data"}  # the rounds, one by one
        mine["benchmarks"].append({name: row[name] for name in KEPT} | {"stats": stats})
    return found


def joined(old: Results, new: Results) -> Results:
    """Two files' rows, the groups of the new one in place of what the old one has of them on the same kind of device."""
    measured = {_place(row) for row in new["benchmarks"]}
    kept = [
        row | {"extra_info": {"machine": old["machine_info"]} | row["extra_info"]}
        for row in old["benchmarks"] if _place(row) not in measured
    ]  # fmt: skip
    return new | {"benchmarks": kept + new["benchmarks"]}


def _place(row: dict[str, Any]) -> tuple[str, str]:
    return row["extra_info"]["device"], row["group"]


def merge(files: list[Path], folder: Path) -> list[str]:
    """Take the results of these files into the folder; the subjects that were there, in order.

    Raises ValueError for results of miniatures.
    """
    subjects = {}
    for file in files:
        results = read(file)
        if results.get("small"):
            raise ValueError(f"{file} was measured with --small, and says nothing that is worth keeping.")
        for subject, found in by_subject(results).items():
            ours = folder / f"{subject}.json"
            together = joined(read(ours), found) if ours.exists() else found
            ours.parent.mkdir(parents=True, exist_ok=True)
            ours.write_text(json.dumps(together, indent=1) + "\n")
            subjects[subject] = None
    return sorted(subjects)


def rows(results: Results) -> list[dict[str, Any]]:
    """What tables are made of: each row's `extra_info`, its group, and in seconds its median, quartiles and extremes."""
    return [
        {"machine": results["machine_info"]} | row["extra_info"] | {"group": row["group"]} | _times(row["stats"])
        for row in results["benchmarks"]
    ]  # fmt: skip


def _times(stats: dict[str, Any]) -> dict[str, float]:
    names = {"seconds": "median", "lower": "q1", "upper": "q3", "fastest": "min", "slowest": "max"}
    return {ours: stats[theirs] for ours, theirs in names.items() if theirs in stats}
