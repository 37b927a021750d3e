"""`python -m engine.profiling`: read the command line, estimate, show what it came to."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from engine.console import Console
from engine.errors import UserError
from engine.profiling import options
from engine.profiling.options import Options

if TYPE_CHECKING:
    from engine.profiling.blueprints import Blueprint
    from engine.profiling.estimate import Found, Setting

GIB = 2**30
# short, so that the table goes into 80 columns
SHOWN = {"wts": "weights", "grad": "gradients", "opt": "optimizer", "snap": "snapshots", "act": "activations",
         "2nd": "second order"}  # fmt: skip
MINIATURES = (
    "The figures are of miniature models and say nothing about the real ones; leave --source embedded out for those."
)


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 2 for bad input."""
    console = Console()
    try:
        given = options.parse(sys.argv[1:] if argv is None else argv)
        if not given.estimate:
            raise UserError("python -m engine.profiling predicts memory with --estimate; add it.")
        run_estimate(given, console)
        return 0
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


def run_estimate(given: Options, console: Console) -> None:
    """The table of the settings that were asked for, and a command that fits."""
    output = None
    if given.output is not None:
        from engine.output import OutputDirectory

        output = OutputDirectory(given.output, "profiling", resume=False)
    from engine.data.labels import Task  # what follows imports torch and transformers
    from engine.hub import Hub
    from engine.profiling.blueprints import blueprints
    from engine.profiling.estimate import cheapest, estimate, search, settings, wider

    config = given.config
    device = _device(config.run.device)
    names = tuple(map(str, range(given.classes))) if given.classes > 1 else ()
    task = Task("classification" if names else "regression", names, False)
    student, teachers = blueprints(config, task, Hub(config.models.source))
    _announce(config, student, teachers, console)
    asked = settings(config, **given.choices)
    _check_lengths([student, *teachers], asked)
    found = search(
        lambda setting: estimate(setting.applied(config), task, student, teachers, device), asked, given.budget,
        wider(config, device, given.choices),
    )  # fmt: skip
    best = None if given.budget is None else cheapest(found, given.budget)
    _show(found, given, console)
    sentence = _sentence(found, best, given)
    console.say(sentence)
    if output is not None:
        output.create()
        output.write("estimate.json", _record(found, best, given, sentence))
        output.close()
        console.say(f"Results: {output.path / 'estimate.json'}")


def _device(given: str):
    import torch

    if given == "auto":
        given = "cuda" if torch.cuda.is_available() else "cpu"
    if given.split(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"--device is {given!r}; it must be auto, cpu or cuda.")
    return torch.device("cuda", 0) if given.startswith("cuda") else torch.device("cpu")


def _announce(config, student: Blueprint, teachers: list[Blueprint], console: Console) -> None:
    from engine.methods import METHODS

    models = [student, *(teachers if METHODS[config.method.method].teachers != "none" else [])]
    if any(each.source.kind == "embedded" for each in models):
        console.banner("EMBEDDED DEMONSTRATION", MINIATURES)
    for note in dict.fromkeys(each.note for each in models if each.note):
        console.say(f"Note: {note}.")


def _check_lengths(models: list[Blueprint], asked) -> None:
    for each in models:
        for setting in asked:
            if each.longest is not None and setting.max_length > each.longest:
                raise UserError(f"{each.source.given} reads at most {each.longest} tokens, and --lengths (--max-length) is "
                                f"{setting.max_length}; give {each.longest} or fewer.")  # fmt: skip


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
    console.table(columns, rows, f"Estimated memory at the peak in {named}, and operations of a step of the student")
    e = found[0].estimate
    console.say(
        f"Columns: {', '.join(SHOWN.values())} (tangents and graphs of second derivatives); ckpt is --checkpointing."
    )
    reserve = ", ".join(f"{name} {size / unit:.2f}" for name, size in e.reserve.items())
    phases = ", ".join(f"{name} {size / unit:.2f}" for name, size in e.phases.items())
    console.say(
        f"First row: tensors {e.tensors / unit:.2f} {named} (by phase: {phases}; most in section '{e.section}'), reserve {reserve}."
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
        return f"Largest: {_name(most, found)} with {most.estimate.total / GIB:.2f} GiB; --gpu-memory says what fits."
    room = f"{given.budget / GIB:.2f} GiB"
    if best is None:
        least = min(found, key=lambda each: each.estimate.total)
        return (f"Nothing fits {room}; the least is {_name(least, found)} with {least.estimate.total / GIB:.2f} GiB. Smaller "
                "--batch-sizes, --lengths, fewer --teachers or --teacher-params last-2 need less.")  # fmt: skip
    run = options.command(given.words, best.setting.changes(given.config))
    return f"Cheapest that fits {room}: {_name(best, found)}, {best.estimate.total / GIB:.2f} GiB: {run}"


def _record(found: list[Found], best: Found | None, given: Options, sentence: str) -> dict[str, Any]:
    """Bytes and operations."""
    rows = [
        {"setting": asdict(each.setting), **asdict(each.estimate), "total": each.estimate.total,
         "fits": None if given.budget is None else each.fits(given.budget)}
        for each in found
    ]  # fmt: skip
    chosen = None if best is None else found.index(best)
    return {"gpu_memory": given.budget, "estimates": rows, "cheapest": chosen, "sentence": sentence}


if __name__ == "__main__":
    sys.exit(main())
