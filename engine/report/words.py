"""A run said in plain words."""

from __future__ import annotations

from typing import Any

from engine.plugins import METHODS
from engine.report.load import Run, mapping
from engine.report.units import count, duration, enumerated, finite, metric_name, metric_words

DEMONSTRATION = (
    "This is the embedded demonstration: miniature, randomly initialised models or a generated corpus stand in for real "
    "ones. Its figures say nothing about the real models."
)
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def method_name(run: Run) -> str:
    return METHODS.known(run.method_setting).get("title") or run.method or "an unknown method"


def teachers_of(run: Run) -> list[str]:
    """Names; of a run that is not finished, as they were given."""
    if run.finished:
        return [str(entry.get("name")) for entry in run.summary.get("teachers", [])]
    taught = METHODS.known(run.method_setting).get("teachers") != "none"
    return _split(run.settings.get("teachers")) if taught else []


def student_of(run: Run) -> str:
    return str(run.summary.get("student", {}).get("name") or run.settings.get("student") or "a student")


def models(run: Run) -> str:
    """bert + bert2 → distilbert"""
    return " → ".join(filter(None, [" + ".join(teachers_of(run)), student_of(run)]))


def title(run: Run) -> str:
    teachers = teachers_of(run)
    source = f" from {enumerated(teachers)}" if teachers else ""
    return f"{student_of(run)}{source} by {method_name(run)}"


def what_was_trained(run: Run) -> str:
    """One paragraph: method, models and sizes, data, steps, machine."""
    said = [_models(run), METHODS.known(run.method_setting).get("report", ""), _data(run)]
    if run.finished:
        steps = finite(run.phase(run.method).get("steps"))
        seconds = run.summary.get("seconds")
        device = run.summary.get("device", {})
        threads = finite(device.get("threads"))
        on = f" on {device.get('name') or device.get('device')}" if device else ""
        if on and threads and str(device.get("device", "")).startswith("cpu"):
            on += f" with {threads:.0f} thread{'s' * (threads != 1)}"
        if steps is not None:
            said.append(f"The student took {count(steps)} optimizer step{'s' * (steps != 1)}{on}"
                        + (f"; the whole run took {duration(seconds)}." if finite(seconds) else "."))  # fmt: skip
    return " ".join(filter(None, said))


def in_short(run: Run) -> str:
    """One sentence: method and models."""
    return _models(run)


def standing(run: Run) -> str:
    """How far a run has come that is not finished."""
    if not run.records:
        return "Nothing has been logged yet."
    last = run.records[-1]
    _, values = run.series(last["phase"], f"validation/{run.metric}")
    found = f"The last record is of phase “{last['phase']}”, step {count(last['step'])}."
    if values:
        found += (
            f" Best validation {metric_name(run.metric)} of this phase so far: {metric_words(max(values), run.metric)}."
        )
    return found


def course(label: str, steps: list[float], values: list[float], show) -> str:
    """What a line does, for those who cannot see it; `show` makes words of a value."""
    if not values:
        return f"{label}: nothing was logged."
    label = f"{label}: " if label else ""
    if len(values) == 1:
        return f"{label}{show(values[0])} at step {count(steps[0])}."
    low, high = min(range(len(values)), key=values.__getitem__), max(range(len(values)), key=values.__getitem__)
    return (f"{label}{show(values[0])} at step {count(steps[0])}, {show(values[-1])} at step {count(steps[-1])}; "
            f"lowest {show(values[low])} at step {count(steps[low])}, highest {show(values[high])} at step "
            f"{count(steps[high])}.")  # fmt: skip


def _models(run: Run) -> str:
    method, student, teachers = method_name(run), student_of(run), teachers_of(run)
    if not run.finished:
        source = f", with the teacher{'s' * (len(teachers) != 1)} {enumerated(teachers)}" if teachers else ""
        return f"This run trains the student {student} by {method}{source}."
    entry = run.summary.get("student", {})
    size = _parameters(entry)
    said = f"The student {student}{f' ({size} parameters)' if size else ''} was trained by {method}"
    if teachers:
        sizes = list(dict.fromkeys(_parameters(t) for t in run.summary["teachers"]))
        each = f" ({sizes[0]} parameters{' each' * (len(teachers) > 1)})" if len(sizes) == 1 and sizes[0] else ""
        named = enumerated([name if each or not _parameters(t) else f"{name} ({_parameters(t)} parameters)"
                            for name, t in zip(teachers, run.summary["teachers"], strict=True)])  # fmt: skip
        number = NUMBERS[len(teachers)] if len(teachers) < len(NUMBERS) else str(len(teachers))
        said += f" with {number} teacher{'s' * (len(teachers) != 1)}, {named}{each}"
        smaller = finite(run.summary.get("times_smaller"))
        if smaller:
            than = (
                "the mean of its teachers"
                if len(sizes) > 1
                else "its teacher"
                if len(teachers) == 1
                else "each teacher"
            )
            said += f". It is {smaller:.2f} times smaller than {than}"
    return said + "."


def _data(run: Run) -> str:
    data, sizes = run.settings.get("data"), run.summary.get("sizes", {})
    if not data:
        return ""
    source = mapping(run.summary.get("sources")).get("data")
    kind = "the embedded corpus in place of " if source == "embedded" else ""
    samples = [name for name in sizes if name.startswith("train")]
    known = [f"{count(sizes[name])} for {words}" for name, words in (
        ("quiz", "the quiz"), ("validation", "validation"), ("test", "the test")) if name in sizes]  # fmt: skip
    if samples:
        more = f" (and {len(samples) - 1} further sample{'s' * (len(samples) > 2)} for teachers)" if samples[1:] else ""
        known.insert(0, f"{count(sizes[samples[0]])} training examples{more}")
    return f"Data: {kind}{data}" + (f", {enumerated(known)}." if known else ".")


def _parameters(entry: dict[str, Any]) -> str:
    return count(entry.get("parameters"))


def _split(names: Any) -> list[str]:
    return [name.strip() for name in str(names).split(",") if name.strip()] if names else []
