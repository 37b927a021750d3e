"""The charts of one run, and those of several in one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from engine.report.charts import Chart, Key, Level, Line, chart
from engine.report.load import Run, mapping
from engine.report.units import BYTES, ENERGY, finite, metric_name, metric_words, rate
from engine.report.words import teachers_of

LOSSES = ("loss", "quiz_loss", "pilot_loss", "teacher_loss")
PREPARE, PREPARING = "prepare ", "-prepare"  # how phases, and charts, of the teachers' preparation are named


def losses(run: Run) -> list[Chart]:
    """One chart a phase of the student, and one for the teachers' preparation."""
    made = []
    preparing = [name for name in run.phases() if name.startswith(PREPARE)]
    lines = [Line(name.removeprefix(PREPARE), *run.series(name, "loss")) for name in preparing]
    made.append(chart("loss-prepare", "Loss: preparation of the teachers", lines, logged=_logged(run)))
    for number, name in enumerate(run.students()):
        known = [key for key in run.keys(name) if key in LOSSES or key.endswith("_loss")]
        known.sort(key=lambda key: LOSSES.index(key) if key in LOSSES else len(LOSSES))
        # the pilot's loss is nearly the real step's: dotted, so that both are seen
        lines = [Line(key.replace("_", " "), *run.series(name, key), index=place + 16 * (key == "pilot_loss"))
                 for place, key in enumerate(known)]  # fmt: skip
        made.append(chart(f"loss-{number}", f"Loss: {name}", lines, logged=_logged(run)))
    return [one for one in made if one]


def validation(run: Run) -> list[Chart]:
    """The student's metric by step beside its teachers' level, and the teachers' own course."""
    metric, made = run.metric, []
    for number, name in enumerate(run.students()):
        line = Line("student", *run.series(name, f"validation/{metric}"), smooth=False)
        made.append(_of_metric(f"validation-{number}", f"Validation {metric_name(metric)}: {name}", [line], metric,
                               _levels(run, metric)))  # fmt: skip
    lines = [Line(name.removeprefix(PREPARE), *run.series(name, f"validation/{metric}"), smooth=False)
             for name in run.phases() if name.startswith(PREPARE)]  # fmt: skip
    made.append(
        _of_metric(
            "validation-prepare", f"Validation {metric_name(metric)}: preparation of the teachers", lines, metric
        )
    )
    return [one for one in made if one]


def drift(run: Run) -> Chart | None:
    """How far meta-updates have moved each teacher."""
    phase, names = run.main(), [key for key in run.keys(run.main()) if key.startswith("drift/")]
    lines = [Line(key.removeprefix("drift/"), *run.series(phase, key), smooth=False) for key in names]
    return chart(
        "drift", "Drift of the teachers", lines, y="drift", from_zero=True, percent=True,
        note="Distance of each teacher's weights from their start, relative to the norm of the start: ‖θ − θ₀‖ / ‖θ₀‖.",
    )  # fmt: skip


def teacher_weights(run: Run) -> Chart | None:
    phase, names = run.main(), teachers_of(run)
    lines = []
    for key in run.keys(phase):
        number = key.removeprefix("weight_")
        if key.startswith("weight_") and number.isdigit():
            known = 0 < int(number) <= len(names)
            lines.append(Line(names[int(number) - 1] if known else key, *run.series(phase, key), smooth=False))
    if all(len(set(line.values)) < 2 for line in lines):
        return None  # given, not learned
    return chart("weights", "Weight of each teacher in the mean of the logits", lines, from_zero=True)


def throughput(run: Run) -> list[Chart]:
    phase, per_second = run.main(), lambda value: f"{value:,.0f} per second"
    made = [
        chart("examples", "Examples per second", [Line("examples", *run.series(phase, "examples_per_second"))], y="examples/s",
              from_zero=True, show=per_second),
        chart("tokens", "Tokens per second", [Line("tokens", *run.series(phase, "tokens_per_second"))], y="tokens/s",
              from_zero=True, show=per_second, note="Tokens that the student reads, padding included."),
    ]  # fmt: skip
    return [one for one in made if one]


def memory(run: Run) -> Chart | None:
    names = {"memory/allocated": "allocated", "memory/reserved": "reserved by the allocator", "device/memory_used": "used on the device",
             "device/memory_process": "used by this process", "host/resident": "resident in host memory"}  # fmt: skip
    phase = run.main()
    lines = [Line(label, *run.series(phase, key), smooth=False) for key, label in names.items()]
    return chart("memory", "Memory over time", lines, units=BYTES, from_zero=True)


def device(run: Run) -> list[Chart]:
    """Power, energy, use and state of the device, where they are known."""
    phase = run.main()

    def one(
        name: str,
        title: str,
        labels: dict[str, str],
        unit: str,
        scale: float = 1.0,
        levels: Sequence[Level] = (),
        note: str = "",
        smooth: bool = True,
    ):
        lines = []
        for key, label in labels.items():
            steps, values = run.series(phase, key)
            lines.append(Line(label, steps, [value * scale for value in values], smooth=smooth))
        return chart(name, title, lines, levels, y=unit, from_zero=True, note=note,
                     show=lambda value: f"{rate(value)} {unit}")  # fmt: skip

    limits = run.series(phase, "device/power_limit")[1]
    whole = "The run had a part of a GPU (MIG); power is that of the whole GPU." if _mig(run) else ""
    made = [
        one("power", "Power", {"device/power": "power"}, "W", note=whole,
            levels=[Level("limit", limits[-1])] if limits else []),
        chart("energy", "Energy per step", [Line("energy", *run.series(phase, "joules_per_step"))], units=ENERGY, from_zero=True),
        one("use", "Use of the device", {"device/utilization": "GPU", "device/memory_utilization": "its memory"}, "%"),
        one("cpu", "Use of the processor", {"host/cpu": "this process"}, "cores", 0.01),
        one("clocks", "Clocks", {"device/sm_clock": "SM", "device/memory_clock": "memory"}, "MHz", smooth=False),
        one("temperature", "Temperature", {"device/temperature": "GPU"}, "°C", smooth=False),
        one("pcie", "PCIe", {"device/pcie_tx": "to the host", "device/pcie_rx": "from the host"}, "GB/s", 1e-9, smooth=False),
    ]  # fmt: skip
    return [each for each in made if each]


def together(runs: Sequence[Run], labels: Sequence[str]) -> tuple[list[Chart], list[Key]]:
    """Validation, loss and examples a second of several runs' last phases, and one legend for all. Runs of one label, which
    are the seeds of a row, look the same."""
    known = list(dict.fromkeys(labels))
    indices, made = [known.index(label) for label in labels], []
    for metric in dict.fromkeys(run.metric for run in runs):
        lines = [Line(label, *run.series(run.main(), f"validation/{metric}"), index=index, smooth=False)
                 for run, label, index in zip(runs, labels, indices, strict=True) if run.metric == metric]  # fmt: skip
        made.append(_of_metric(f"together-{len(made)}", f"Validation {metric_name(metric)}", lines, metric))
    for name, title, key in (
        ("loss", "Loss", "loss"),
        ("quiz", "Quiz loss", "quiz_loss"),
        ("speed", "Examples per second", "examples_per_second"),
    ):
        lines = [Line(label, *run.series(run.main(), key), index=index)
                 for run, label, index in zip(runs, labels, indices, strict=True)]  # fmt: skip
        made.append(chart(f"together-{name}", title, lines, from_zero=key == "examples_per_second"))
    return [replace(one, keys=[]) for one in made if one], [Key.of(label, index) for index, label in enumerate(known)]


def _of_metric(name: str, title: str, lines: list[Line], metric: str, levels: Sequence[Level] = ()) -> Chart | None:
    return chart(
        name, title, lines, levels, percent=metric == "accuracy", show=lambda value: metric_words(value, metric)
    )


def _levels(run: Run, metric: str) -> list[Level]:
    """What each teacher reached on the same validation set when it was prepared."""
    found = []
    for place, entry in enumerate(run.summary.get("teachers", []), 1):
        value = finite(mapping(mapping(entry.get("prepared")).get("validation")).get(metric))
        if value is not None:
            found.append(Level(f"teacher {entry.get('name')}, as prepared", value, place))
    if run.finished:
        return found
    for place, name in enumerate([n for n in run.phases() if n.startswith(PREPARE)], 1):
        values = run.series(name, f"validation/{metric}")[1]
        if values:
            found.append(Level(f"teacher {name.removeprefix(PREPARE)}, as prepared", max(values), place))
    return found


def _logged(run: Run) -> str:
    steps = run.settings.get("log_steps")
    return f"the mean of up to {steps} steps" if isinstance(steps, int) and steps > 1 else ""


def _mig(run: Run) -> bool:
    found = run.telemetry().get("device")
    return isinstance(found, dict) and bool(found.get("mig"))
