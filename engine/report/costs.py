"""What a step costs, by section: from the summary, or from the records of a run that is not finished."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from engine.report.load import Run
from engine.report.units import finite
from engine.sections import SECTIONS
from engine.telemetry.nvml import throttle_names

NOT_SLOWED = 0x3  # idle, and clocks that somebody set: bits of device/throttle_reasons that slow nobody down


@dataclass(frozen=True)
class Cost:
    """Of a section: seconds and joules a step, peak bytes, part of all seconds."""

    name: str
    seconds: float
    share: float
    memory: float | None
    joules: float | None


def costs(run: Run, phase: str | None) -> list[Cost]:
    """In the order of a round; empty where nothing is known."""
    told = run.telemetry(phase).get("sections") if phase is not None else None
    found = _from_summary(run, phase, told) if isinstance(told, dict) and told else _from_records(run, phase)
    total = sum(seconds for seconds, _, _ in found.values())
    names = sorted(found, key=lambda name: (SECTIONS.index(name) if name in SECTIONS else len(SECTIONS) - 1.5, name))
    return [Cost(name, found[name][0], found[name][0] / total if total else 0.0, *found[name][1:]) for name in names
            if found[name][0] or found[name][1]]  # fmt: skip


def seconds_a_step(run: Run, phase: str | None) -> float | None:
    """Training alone, as phases are timed: without evaluation and checkpoints."""
    known = run.phase(phase) or run.telemetry(phase)
    seconds, steps = finite(known.get("seconds")), finite(known.get("steps"))
    if seconds is not None and steps:
        return seconds / steps
    return _weighted(run, phase, "step_seconds")


def training(run: Run) -> float | None:
    """Seconds of the student's training in all its phases; None where one of them is not known."""
    found = [finite(run.phase(name).get("seconds")) for name in run.students()]
    return sum(found) if found and None not in found else None


def joules(run: Run, phase: str | None = None) -> float | None:
    """Of a phase, or of all phases together; None where any of them is not known."""
    if phase is not None:
        return finite(run.telemetry(phase).get("joules"))
    names = [name for name in run.phases() if run.telemetry(name)]
    found = [joules(run, name) for name in names]
    return sum(found) if found and None not in found else None


def no_energy(run: Run) -> str | None:
    """Why there are no figures of energy, in a sentence; None where there are some."""
    if any(joules(run, name) is not None for name in run.phases()):
        return None
    if any("device/power" in r or "joules_per_step" in r for r in run.records):
        return None
    cause = run.telemetry().get("cause")
    if isinstance(cause, str) and cause:
        return f"Energy and the state of the device are not known ({cause.rstrip('.')})."
    if run.finished and "telemetry" not in run.summary:
        return "This run was made without telemetry, so there are no figures of time by section, energy or device."
    return "Energy is not known."


def throttling(run: Run, phase: str | None) -> str:
    """How often the device lowered its clocks, and why; "" where that is not known."""
    steps, masks = run.series(phase, "device/throttle_reasons")
    if not masks:
        return ""
    slowed = [int(mask) & ~NOT_SLOWED for mask in masks]
    if not any(slowed):
        return "The device never lowered its clocks (throttling)."
    reasons = dict.fromkeys(name for mask in slowed for name in throttle_names(mask))
    return f"The device lowered its clocks (throttling) at {sum(map(bool, slowed))} of {len(slowed)} readings: {', '.join(reasons)}."


def _from_summary(run: Run, phase: str | None, told: dict[str, Any]) -> dict[str, tuple]:
    known = [run.telemetry(phase), run.phase(phase)]
    steps = next((n for n in (finite(entry.get("steps")) for entry in known) if n), None)
    if steps is None:
        return {}
    found = {}
    for name, entry in told.items():
        if isinstance(entry, dict):
            energy = finite(entry.get("joules"))
            found[name] = (
                (finite(entry.get("seconds")) or 0.0) / steps, finite(entry.get("memory")), None if energy is None else energy / steps
            )  # fmt: skip
    return found


def _from_records(run: Run, phase: str | None) -> dict[str, tuple]:
    found = {}
    for key in run.keys(phase):
        if key.startswith("seconds/"):
            name = key.removeprefix("seconds/")
            memory = run.series(phase, f"memory/{name}")[1]
            found[name] = (
                _weighted(run, phase, key) or 0.0,
                max(memory, default=None),
                _weighted(run, phase, f"joules/{name}"),
            )
    return found


def _weighted(run: Run, phase: str | None, key: str) -> float | None:
    """The mean over steps of what each record holds as a mean over the steps since the record before."""
    steps, values = run.series(phase, key)
    lengths = [after - before for before, after in zip(_before(run, phase, steps), steps, strict=True)]
    if not values:
        return None
    total = sum(lengths)
    return sum(n * v for n, v in zip(lengths, values, strict=True)) / total if total > 0 else fmean(values)


def _before(run: Run, phase: str | None, steps: Iterable[float]) -> list[float]:
    """The step of the logging record before each of `steps`; 0 before the first."""
    logged = sorted([0.0, *(r["step"] for r in run.records if r["phase"] == phase and "lr" in r)])
    return [logged[max(0, bisect_left(logged, step) - 1)] for step in steps]
