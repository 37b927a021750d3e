"""What lies in the directories of runs and comparisons: read with care, since a run may be killed while it writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from engine.errors import UserError
from engine.plugins import short_name
from engine.report.units import finite

SHAPES: dict[str, type] = {"settings": dict, "teachers": list, "student": dict, "phases": dict, "metrics": dict,
                           "telemetry": dict, "warnings": list, "notes": list, "sizes": dict, "versions": dict, "device": dict,
                           "peak_memory": dict, "task": dict}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A run's directory. `summary` is empty of one that is not finished; `problems` says what could not be read."""

    folder: Path
    summary: dict[str, Any]
    settings: dict[str, Any]
    records: list[dict[str, Any]]
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.folder.name or str(self.folder)

    @property
    def finished(self) -> bool:
        return bool(self.summary)

    @property
    def method(self) -> str:
        return short_name(self.method_setting)

    @property
    def method_setting(self) -> str:
        """As --method takes it: a name, or the path of a file."""
        return str(self.settings.get("method") or self.summary.get("method") or "")

    @property
    def metric(self) -> str:
        """What the student was chosen by; of a run that is not finished, what its validations have of it."""
        known = self.summary.get("metric") or self.settings.get("metric")
        if known not in (None, "auto"):
            return str(known)
        keys = (key for record in self.records for key in record if key.startswith("validation/"))
        return next(keys, "validation/accuracy").removeprefix("validation/")

    def phases(self) -> list[str]:
        """In the order in which they were run."""
        names = [*(r["phase"] for r in self.records)]
        return list(dict.fromkeys([*self.summary.get("phases", {}), *names]))

    def main(self) -> str | None:
        """The phase that distils the student; of a run that is not so far, the one it stands in."""
        phases = self.phases()
        return self.method if self.method in phases else phases[-1] if phases else None

    def keys(self, phase: str | None) -> list[str]:
        """What its records hold, in order of appearance."""
        return list(dict.fromkeys(key for r in self.records if r["phase"] == phase for key in r))

    def students(self) -> list[str]:
        """The phases that train the student: those that prepare teachers, or keep their answers, are left out."""
        return [name for name in self.phases() if not name.startswith(("prepare ", "answers of "))]

    def series(self, phase: str | None, key: str) -> tuple[list[float], list[float]]:
        """Steps and values; what is no finite number is left out."""
        found = [(r["step"], finite(r.get(key))) for r in self.records if r["phase"] == phase]
        kept = [(step, value) for step, value in found if value is not None]
        return [step for step, _ in kept], [value for _, value in kept]

    def phase(self, name: str | None) -> dict[str, Any]:
        """What the summary holds of a phase; empty where that is nothing."""
        return mapping(mapping(self.summary.get("phases")).get(name))

    def telemetry(self, phase: str | None = None) -> dict[str, Any]:
        """The summary's, or that of one phase; empty where there is none."""
        found = self.summary.get("telemetry") or {}
        return found if phase is None else mapping(mapping(found.get("phases")).get(phase))


@dataclass(frozen=True)
class Comparison:
    folder: Path
    found: dict[str, Any]
    runs: list[Run]
    problems: list[str]


def read(given: str | Path) -> Run | Comparison:
    """A directory of a run or of a comparison; raises UserError for anything else."""
    folder = Path(given).expanduser()
    remedy = "give a directory that engine.train or engine.compare wrote"
    names = _guarded(folder, folder, lambda: _names(folder, remedy))
    if "comparison.json" in names:
        return _comparison(folder)
    if not names & {"summary.json", "config.yaml"}:
        raise UserError(f"{folder} is no run, because it has neither summary.json nor config.yaml; {remedy}.")
    return _run(folder, names)


def _names(folder: Path, remedy: str) -> set[str]:
    if not folder.exists():
        raise UserError(f"{folder} does not exist; {remedy}.")
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; {remedy}, such as {folder.parent}.")
    return {entry.name for entry in folder.iterdir()}


def _run(folder: Path, names: set[str]) -> Run:
    problems: list[str] = []
    summary = _json(folder / "summary.json", "remove the file to see the run as one that is not finished, or run it again"
                    ) if "summary.json" in names else {}  # fmt: skip
    for key, shape in SHAPES.items():
        if summary.get(key) is not None and not isinstance(summary[key], shape):
            raise UserError(f"{folder / 'summary.json'} is damaged: {key!r} is not what a run writes; run it again.")
        if shape is list and key in summary:
            summary[key] = summary[key] or []
    if not all(
        isinstance(entry, dict) for entry in [*summary.get("teachers", []), *(summary.get("phases") or {}).values()]
    ):
        raise UserError(f"{folder / 'summary.json'} is damaged: its teachers or phases are not what a run writes; run it again.")  # fmt: skip
    summary = {key: value for key, value in summary.items() if value is not None or key not in SHAPES}
    settings = summary.get("settings")
    if settings is None:
        settings = _settings(folder / "config.yaml") if "config.yaml" in names else {}
    records = []
    if "metrics.jsonl" in names:
        records = _records(folder / "metrics.jsonl", problems)
    else:
        problems.append(f"{folder / 'metrics.jsonl'} is missing, so there are no curves.")
    return Run(folder, summary, settings, records, problems)


def _comparison(folder: Path) -> Comparison:
    found = _json(folder / "comparison.json", "run the comparison's command again, which keeps finished runs")
    rows = found.get("rows")
    if not isinstance(rows, list) or not {"title", "seeds", "metrics", "split", "command"} <= found.keys():
        raise UserError(f"{folder / 'comparison.json'} is damaged: it has no rows; run the comparison's command again.")
    runs, problems, cells = [], [], folder / "cells"
    directories = _guarded(cells, cells, lambda: sorted(cells.iterdir()) if cells.is_dir() else [])
    for directory in directories:
        if directory.is_dir() and ((directory / "summary.json").exists() or (directory / "config.yaml").exists()):
            try:
                one = read(directory)
            except UserError as e:
                problems.append(str(e))
                continue
            if isinstance(one, Run):
                runs.append(one)
                problems += [p for p in one.problems if one.finished and "missing" not in p]
    return Comparison(folder, found, runs, problems)


def _json(file: Path, remedy: str) -> dict[str, Any]:
    text = _guarded(file, file.parent, file.read_bytes)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as e:
        place = f" in line {e.lineno}" if isinstance(e, json.JSONDecodeError) else ""
        raise UserError(f"{file} is damaged{place}; {remedy}.") from e
    if not isinstance(found, dict) or not found:
        raise UserError(f"{file} is damaged: it holds no mapping; {remedy}.")
    return found


def _settings(file: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(_guarded(file, file.parent, file.read_bytes))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as e:
        raise UserError(f"{file} is no YAML file of settings; start the run again.") from e
    if not isinstance(found, dict):
        raise UserError(f"{file} holds no settings; start the run again.")
    return {str(key): value for key, value in found.items()}


def _records(file: Path, problems: list[str]) -> list[dict[str, Any]]:
    """The records in whole lines. What a killed run left of its last line is left out; a damaged line before is a problem."""
    lines = _guarded(file, file.parent, file.read_bytes).split(b"\n")
    records, damaged = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        record = _record(line)
        if record is not None:
            records.append(record)
        elif number < len(lines):  # the last one has no end of line
            damaged.append(number)
    if damaged:
        shown = ", ".join(map(str, damaged[:5])) + (f" and {len(damaged) - 5} more" if len(damaged) > 5 else "")
        problems.append(f"{file}, line{'s' * (len(damaged) > 1)} {shown}: damaged, and left out of curves and sums.")
    return records


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    good = isinstance(found, dict) and isinstance(found.get("phase"), str) and finite(found.get("step")) is not None
    return found if good else None


def _guarded(path: Path, folder: Path, action: Callable[[], Any]) -> Any:
    """What `action` returns; raises UserError where the system does not let it."""
    try:
        return action()
    except OSError as e:
        raise UserError(
            f"{path} cannot be read ({e.strerror}); make {folder} readable, or give another directory."
        ) from e


def mapping(value: Any) -> dict[str, Any]:
    """What is read from a file may be anything: `value` where it is a mapping, else an empty one."""
    return value if isinstance(value, dict) else {}
