"""`python -m engine.profiling --estimate`: the table of what settings need, and a command that fits."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from engine.profiling import options
from engine.profiling.estimate import Estimate, Found, Setting, cheapest, estimate, search, wider
from engine.profiling.options import Options
from engine.profiling.subject import Subject
from engine.run.output import OutputDirectory
from engine.screen.console import Console

GIB = 2**30
# short, so that the table goes into 80 columns
SHOWN = {"wts": "weights", "grad": "gradients", "opt": "optimizer", "snap": "snapshots", "act": "activations",
         "2nd": "second order"}  # fmt: skip


def run(given: Options, console: Console) -> None:
    """Estimates of the settings that were asked for and, where none of them fits, of some that need less."""
    output = None if given.output is None else OutputDirectory(given.output, "estimate", resume=False)
    config, (task, student, teachers, device, asked) = given.config, Subject.of(given, console)

    def of(setting: Setting) -> Estimate:
        told = estimate(setting.applied(config), task, student, teachers, device)
        console.say(
            f"{', '.join(_parts(setting).values())}: {told.total / GIB:.2f} GiB"
        )  # one takes seconds, many minutes
        return told

    found = search(of, asked, given.budget, wider(config, device, given.choices))
    best = None if given.budget is None else cheapest(found, given.budget)
    _show(found, given, console)
    sentence = _sentence(found, best, given)
    console.say(sentence)
    if output is not None:
        output.create()
        output.write("estimate.json", _record(found, best, given, sentence))
        output.close()
        console.say(f"Results: {output.path / 'estimate.json'}")


def _show(found: list[Found], given: Options, console: Console) -> None:
    columns = ["setting", "fits", "peak", *SHOWN, "GFLOP"]
    rows = []
    small = max(each.estimate.tensors for each in found) < GIB
    unit, named = (2**20, "MiB") if small else (GIB, "GiB")
    for each in found:
        e = each.estimate
        fits = "" if given.budget is None else "yes" if each.fits(given.budget) else "no"
        sizes = [e.total, *(e.categories[name] for name in SHOWN.values())]
        rows.append([_name(each, found), fits, *(f"{size / unit:.2f}" for size in sizes), f"{e.flops / 1e9:,.0f}"])
    console.table(columns, rows, f"Estimated peak memory in {named}, and operations of a step of the student")
    e = found[0].estimate
    console.say(
        f"Columns: peak is everything, then {', '.join(SHOWN.values())} (tangents and graphs of second derivatives). "
        "ckpt is --checkpointing; the last word is where snapshots are kept."
    )
    reserve = ", ".join(f"{name} {size / unit:.2f}" for name, size in e.reserve.items())
    phases = ", ".join(f"{name} {size / unit:.2f}" for name, size in e.phases.items())
    console.say(
        f"First row, in {named}: tensors {e.tensors / unit:.2f} (by phase: {phases}; most in section '{e.section}'); beside them "
        f"{reserve}."
    )
    console.say(f"Assumed: {'; '.join(e.assumptions)}.")


def _parts(setting: Setting) -> dict[str, str]:
    """What a setting is, in a word or two for each of its fields."""
    found = {"batch_size": f"{setting.batch_size} x {setting.max_length}", "precision": setting.precision}
    if setting.micro_batch_size is not None:
        found["micro_batch_size"] = f"micro {setting.micro_batch_size}"
    return found | {
        "meta_grad": setting.meta_grad,
        "checkpointing": f"ckpt {setting.checkpointing}",
        "snapshot_store": setting.snapshot_store,
    }


def _name(each: Found, found: list[Found]) -> str:
    """What sets it apart from the others; all of it where nothing does."""
    varied = {name for name in asdict(each.setting) if len({getattr(f.setting, name) for f in found}) > 1}
    varied |= {"batch_size"} if "max_length" in varied else set()
    parts = {name: text for name, text in _parts(each.setting).items() if name in varied}
    return ", ".join((parts or _parts(each.setting)).values())


def _sentence(found: list[Found], best: Found | None, given: Options) -> str:
    if given.budget is None:
        most = max(found, key=lambda each: each.estimate.total)
        return f"Largest: {_name(most, found)} with {most.estimate.total / GIB:.2f} GiB; give --gpu-memory to see what fits."
    room = f"{given.budget / GIB:.2f} GiB"
    if best is None:
        least = min(found, key=lambda each: each.estimate.total)
        return (f"Nothing fits into {room}; the smallest is {_name(least, found)} with {least.estimate.total / GIB:.2f} GiB. "
                "Smaller --batch-sizes or --lengths, fewer --teachers, or --teacher-params last-2 need less.")  # fmt: skip
    run = options.command(given.words, best.setting.changes(given.config))
    return f"Cheapest that fits into {room}: {_name(best, found)}, {best.estimate.total / GIB:.2f} GiB: {run}"


def _record(found: list[Found], best: Found | None, given: Options, sentence: str) -> dict[str, Any]:
    """Bytes and operations."""
    rows = [
        {"setting": asdict(each.setting), **asdict(each.estimate), "total": each.estimate.total,
         "fits": None if given.budget is None else each.fits(given.budget)}
        for each in found
    ]  # fmt: skip
    chosen = None if best is None else found.index(best)
    return {"gpu_memory": given.budget, "estimates": rows, "cheapest": chosen, "sentence": sentence}
