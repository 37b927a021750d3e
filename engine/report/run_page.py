"""The page of one run."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from engine.report import curves
from engine.report.charts import Chart
from engine.report.costs import costs, joules, no_energy, seconds_a_step, throttling, training
from engine.report.layout import Cell, Section, Table, without_empty
from engine.report.load import Run, mapping
from engine.report.settings import commands, shown, sorted_out
from engine.report.units import (
    BYTES,
    ENERGY,
    FLOPS,
    TIME,
    column,
    count,
    duration,
    finite,
    metric_header,
    metric_name,
    metric_value,
    metric_words,
    quantity,
    rate,
)
from engine.report.words import DEMONSTRATION, standing, title, what_was_trained

PREPARED = "validation, as prepared"
ACRONYMS = {"uuid": "UUID", "mig": "MIG", "pcie": "PCIe", "cuda": "CUDA"}


def content(run: Run) -> dict[str, Any]:
    """What the template gets."""
    sections = [
        Section("results", "Results", tables=[results(run), by_domain(run)]),
        Section("curves", "Curves", charts=_curves(run)),
        _cost_section(run),
        Section("device", "Energy and device", _device_words(run), charts=curves.device(run)),
        Section("machine", "Machine and versions", facts=machine(run)),
        Section("remarks", "Remarks", texts=[str(note) for note in run.summary.get("notes", [])]),
        _settings_section(run),
        Section("commands", "Commands", commands=commands(run)),
    ]  # fmt: skip
    return {
        "title": title(run), "subtitle": _subtitle(run), "kind": "run", "lead": what_was_trained(run),
        "demonstration": DEMONSTRATION if embedded(run) else "", "unfinished": "" if run.finished else standing(run),
        "problems": [*run.problems, *map(str, run.summary.get("warnings", []))], "tiles": tiles(run),
        "sections": [section for section in sections if section],
    }  # fmt: skip


def embedded(run: Run) -> bool:
    return run.summary.get("source") == "embedded" or (not run.finished and run.settings.get("source") == "embedded")


def results(run: Run) -> Table | None:
    """Every model's metrics on validation and test; of teachers that learned also those from before."""
    if not run.finished:
        return None
    entries = [*((t, "teacher") for t in run.summary.get("teachers", [])), (run.summary.get("student", {}), "student")]
    measured = [_measured(entry) for entry, _ in entries]
    metrics = list(
        dict.fromkeys([run.metric, *(m for splits in measured for values in splits.values() for m in values)])
    )
    rows, strong = [], []
    for (entry, role), splits in zip(entries, measured, strict=True):
        for place, (split, values) in enumerate(splits.items()):
            if role == "student" and split == "test":
                strong.append(len(rows))
            name = "" if place else f"{entry.get('name', role)} ({role})"
            figures = [metric_value(values.get(m), m) for m in metrics]
            rows.append([name, split, *figures, "" if place else count(entry.get("parameters"))])
    if not rows:
        return None
    columns = ["model", "measured on", *map(metric_header, metrics), "parameters"]
    taught = any(PREPARED in splits for splits in measured)
    note = (
        "“As prepared”: the best validation of a teacher's own training, before it taught the student."
        if taught
        else ""
    )
    return Table("results-table", "Figures of every model", columns, rows, left=2, strong=strong, note=note)


def by_domain(run: Run) -> Table | None:
    entries = [*run.summary.get("teachers", []), run.summary.get("student", {})]
    tests = [(entry, mapping(mapping(entry.get("by_domain")).get("test"))) for entry in entries]
    names = list(tests[-1][1])
    if len(names) < 2:
        return None
    rows = []
    for entry, test in tests:
        values = [finite(mapping(test.get(name)).get(run.metric)) for name in names]
        mean = None if None in values else sum(values) / len(values)
        rows.append([entry.get("name", "student"), *(metric_value(value, run.metric) for value in [*values, mean])])
    caption = f"{metric_header(run.metric)}, on the test set by domain"
    return Table("domains", caption, ["model", *names, "mean"], rows, strong=[len(rows) - 1])


def tiles(run: Run) -> list[tuple[str, str, str]]:
    """The figures that people look for first: what, how much, beside what."""
    if not run.finished:
        return []
    metric, student, teachers = run.metric, run.summary.get("student", {}), run.summary.get("teachers", [])
    test = _splits(student).get("test", {}).get(metric)
    beside = ", ".join(metric_words(_splits(t).get("test", {}).get(metric), metric) for t in teachers)
    plural = "s" * (len(teachers) != 1)
    smaller, peak = finite(run.summary.get("times_smaller")), run.summary.get("peak_memory", {})
    where = "device" if "device" in peak else "host"
    main = run.phase(run.method)
    energy = joules(run)
    found = [
        (f"{metric_name(metric)} on test", metric_words(test, metric), f"teacher{plural} {beside}" if beside else ""),
        ("times smaller", f"{smaller:.2f}" if smaller else "", f"{count(student.get('parameters'))} parameters"),
        ("training of the student", duration(training(run)), f"{rate(main.get('examples_per_second'))} examples/s"),
        ("peak memory", quantity(finite(peak.get(where)), BYTES), f"of the {where}"),
        ("energy", quantity(energy, ENERGY), f"{energy / 3600:.3g} Wh, all phases" if energy else ""),
    ]  # fmt: skip
    return [tile for tile in found if tile[1]]


def section_table(run: Run, phase: str) -> Table | None:
    """Time, memory and energy of a step by section."""
    found = costs(run, phase)
    if not found:
        return None
    total, energy = sum(c.seconds for c in found), [c.joules for c in found]
    whole = None if None in energy else sum(energy)
    unit, times = column([*(c.seconds for c in found), total], TIME, figures=4)
    memory, peaks = column(
        [*(c.memory for c in found), max((c.memory for c in found if c.memory), default=None)], BYTES
    )
    joule, used = column([*energy, whole], ENERGY)
    most = max(c.share for c in found)
    rows = [[c.name, times[i], Cell(f"{100 * c.share:.1f} %", bar=c.share / most if most else None), peaks[i], used[i]]
            for i, c in enumerate(found)]  # fmt: skip
    rows.append(["whole step", times[-1], "100.0 %", peaks[-1], used[-1]])
    columns = ["section", f"{unit} per step", "share", f"peak memory, {memory}", f"{joule} per step"]
    notes, a_step = [], seconds_a_step(run, phase)
    if {"evaluation", "checkpoint"} & {c.name for c in found}:
        notes.append("The time of evaluations and checkpoints is divided among all steps.")
        if a_step is not None:
            notes.append(f"Without them a step takes {quantity(a_step, TIME)}.")
    if str(run.summary.get("device", {}).get("device", "")).startswith("cpu") and any(c.memory for c in found):
        notes.append("Memory is the resident memory of the process, sampled during the step.")
    if whole is not None:
        notes.append("Energy is divided among sections by their time, as if power were constant.")
    return without_empty(Table(f"sections-{run.phases().index(phase)}", f"By section of the step: {phase}", columns, rows,
                               strong=[len(rows) - 1], note=" ".join(notes)))  # fmt: skip


def phase_table(run: Run) -> Table | None:
    """Steps, time and rates of every phase."""
    rows, phases = [], run.phases()
    timed = {name: run.phase(name) | run.telemetry(name) for name in phases}
    joule, energies = column([joules(run, name) for name in phases], ENERGY)
    flops, speeds = column([_per_second(timed[name], "flops") for name in phases], FLOPS)
    for name, energy, speed in zip(phases, energies, speeds, strict=True):
        known = timed[name]
        steps = known.get("steps", max((r["step"] for r in run.records if r["phase"] == name), default=None))
        a_step = seconds_a_step(run, name)
        rows.append([name, count(steps), duration(known.get("seconds")), quantity(a_step, TIME) if steps else "",
                     rate(known.get("examples_per_second") or _last(run, name, "examples_per_second")),
                     rate(_per_second(known, "tokens") or _last(run, name, "tokens_per_second")), speed, energy])  # fmt: skip
    columns = [
        "phase",
        "steps",
        "training time",
        "time per step",
        "examples/s",
        "tokens/s",
        f"{flops}, estimated",
        joule,
    ]
    note = "Training time is without evaluations and checkpoints. Tokens are those that the student reads, padding included."
    return without_empty(Table("phases", "Phases of the run", columns, rows, note=note)) if rows else None


def machine(run: Run) -> list[tuple[str, str]]:
    """Hardware, versions, commit: each with its name."""
    found, device, versions = [], run.summary.get("device", {}), run.summary.get("versions", {})
    if device:
        threads = count(device.get("threads"))
        known = f", {threads} thread{'s' * (threads != '1')}" if threads else ""
        found.append(("device", f"{device.get('name')} ({device.get('device')}{known})"))
    told = run.telemetry().get("device")
    if isinstance(told, dict):
        known = {key: value for key, value in told.items() if value not in (None, "", False, device.get("name"))}
        found += [
            (ACRONYMS.get(key, str(key)), "yes" if value is True else shown(value)) for key, value in known.items()
        ]
    for where, size in run.summary.get("peak_memory", {}).items():
        found.append((f"peak memory, {where}", quantity(finite(size), BYTES)))
    waste = finite(run.summary.get("padding_waste"))
    if waste is not None:
        found.append(("padding", f"{100 * waste:.1f} % of the tokens of training batches"))
    if run.settings.get("precision"):
        found.append(("precision", str(run.settings["precision"])))
    found += [(str(name), str(version)) for name, version in versions.items()]
    if run.summary.get("git_commit"):
        commit, plus, changes = str(run.summary["git_commit"]).partition("+")
        found.append(("commit", commit[:12] + plus + changes))
    return found


def setting_rows(values: dict[str, Any]) -> list[list[str]]:
    return [[name, shown(value)] for name, value in values.items()]


def _curves(run: Run) -> list[Chart]:
    """The student's first, then what became of its teachers, then how these were prepared."""
    learning = [*curves.validation(run), *curves.losses(run)]
    preparing = [each for each in learning if each.name.endswith(curves.PREPARING)]
    teachers = [each for each in (curves.drift(run), curves.teacher_weights(run)) if each]
    return [*(each for each in learning if each not in preparing), *teachers, *preparing]


def _cost_section(run: Run) -> Section:
    main = run.main()
    others = [(f"By section of the step: {name}", table) for name in run.phases() if name != main
              if (table := section_table(run, name))]  # fmt: skip
    charts = [*curves.throughput(run), curves.memory(run)]
    tables = [section_table(run, main) if main else None, phase_table(run)]
    return Section("costs", "Time and memory", tables=tables, charts=[c for c in charts if c], folded=others)


def _device_words(run: Run) -> list[str]:
    energy, main = joules(run), run.main()
    said = [no_energy(run) or "", throttling(run, main)]
    if energy is not None:
        said.insert(0, f"All phases together took {quantity(energy, ENERGY)} ({energy / 3600:.3g} Wh).")
    examples = run.series(main, "joules_per_example")[1]
    if examples:
        said.append(f"At the end of the last phase an example took {quantity(examples[-1], ENERGY)}.")
    return [" ".join(filter(None, said))] if any(said) else []


def _settings_section(run: Run) -> Section:
    found = sorted_out(run.settings)
    given = [[name, shown(value), shown(default)] for name, (value, default) in found.given.items()]
    tables = (
        [Table("given", "Settings that differ from their defaults", ["setting", "value", "default"], given, left=3)]
        if given
        else []
    )
    folded = [(words, Table(name, words, ["setting", "value"], setting_rows(values), left=2)) for name, words, values in (
        ("chosen", "Defaults that follow from the method, the models and the data", found.chosen),
        ("defaults", "All other settings, at their defaults", found.rest)) if values]  # fmt: skip
    return Section("settings", "Settings", tables=tables, folded=folded)


def _subtitle(run: Run) -> str:
    times = [value for value in (finite(r.get("time")) for r in run.records) if value is not None and 0 < value < 1e11]
    when = datetime.fromtimestamp(max(times), UTC).strftime("%-d %B %Y, %H:%M UTC") if times else ""
    return " · ".join(filter(None, [run.name, f"seed {run.settings['seed']}" if "seed" in run.settings else "", when]))


def _measured(entry: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Metrics by split, and those of a teacher before it taught where they are others."""
    splits, before = _splits(entry), mapping(mapping(entry.get("prepared")).get("validation"))
    after = splits.get("validation", {})
    return splits if all(after.get(m) == value for m, value in before.items()) else {PREPARED: before} | splits


def _splits(entry: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found = entry.get("metrics")
    return {str(k): v for k, v in found.items() if isinstance(v, dict)} if isinstance(found, dict) else {}


def _per_second(known: dict[str, Any], key: str) -> float | None:
    amount, seconds = finite(known.get(key)), finite(known.get("seconds"))
    return amount / seconds if amount and seconds else None


def _last(run: Run, phase: str, key: str) -> float | None:
    values: Sequence[float] = run.series(phase, key)[1]
    return values[-1] if values else None
