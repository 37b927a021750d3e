"""`python -m engine.profiling` without --estimate: steps of every setting that was asked for, tables, plots and traces."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from engine.config import Config
from engine.errors import UserError
from engine.methods import METHODS
from engine.params import native
from engine.profiling import tables
from engine.profiling.blueprints import Blueprint
from engine.profiling.estimate import Setting
from engine.profiling.measure import Measured, measure
from engine.profiling.options import Options
from engine.profiling.subject import Subject
from engine.report.summary import git_commit, hardware, versions
from engine.report.units import BYTES, TIME, quantity
from engine.run import choices
from engine.run.allocator import keep_freed_memory
from engine.run.machine import suit_threads
from engine.run.output import OutputDirectory
from engine.screen.console import Console

# settings that a step's cost depends on, and that no row has of its own
SHARED = ("method", "pilot_steps", "quiz_batches", "pilot_optimizer", "teacher_params", "independent_masks", "optimizer",
          "feature_loss")  # fmt: skip


def run(given: Options, console: Console) -> None:
    """Leaves profile.json, table.md, plots and traces; what is measured is kept when the run is stopped."""
    if given.budget is not None:
        raise UserError("--gpu-memory goes with --estimate; add --estimate, or leave --gpu-memory out.")
    output = OutputDirectory(given.output, "profile", resume=False)
    task, student, teachers, _, asked = Subject.of(given, console)
    device = choices.settle_device(given.config, console.say)
    asked = [replace(each, precision=given.config.run.precision) for each in asked]
    asked, models = varied(given.config, asked), [student, *teachers]
    suit_threads(device, [model.source for model in models])
    if device.type == "cpu":
        keep_freed_memory()
    native.prepare(console.say)
    console.say(
        f"{len(asked)} setting{'s' * (len(asked) != 1)}, {given.steps} timed steps each, random weights and full batches."
    )
    output.create()
    try:
        found = _facts(given, student, teachers, device)
        for number, setting in enumerate(asked, 1):
            config = setting.applied(given.config)
            measured = measure(config, task, student, teachers, device, given.steps, output.path / "traces")
            found["rows"].append({"method": given.config.method.name, **asdict(measured)})
            output.write("profile.json", found)
            console.say(f"[{number}/{len(asked)}] {_said(found['rows'][-1], measured)}")
        output.write("table.md", tables.page(found) + "\n")
        _show(found, output.path, console)
    finally:
        output.close()


def varied(config: Config, asked: list[Setting]) -> list[Setting]:
    """Without those that differ in what this method does not have: strategies, or learning teachers to be recomputed."""
    method, own = METHODS[config.method.method], config.method
    if method.learn_from != "quiz":
        asked = [replace(each, meta_grad=own.meta_grad) for each in asked]
    if method.teachers != "learning":
        asked = [replace(each, checkpointing=own.checkpointing) for each in asked]
    return list(dict.fromkeys(asked))


def _facts(given: Options, student: Blueprint, teachers: list[Blueprint], device: torch.device) -> dict[str, Any]:
    flat = given.config.to_flat()
    return {
        "kind": "profile", "steps": given.steps, "settings": {name: flat[name] for name in SHARED},
        "models": {"student": _described(student), "teachers": [_described(each) for each in teachers]},
        "device": hardware(device), "versions": versions(), "git_commit": git_commit(), "rows": [],
    }  # fmt: skip


def _described(blueprint: Blueprint) -> dict[str, Any]:
    """Name and size; no place on this machine."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in blueprint.build().parameters())
    return {"name": blueprint.source.name, "parameters": parameters}


def _said(row: dict[str, Any], measured: Measured) -> str:
    where = f"{tables.label(row)}, {tables.shape(row)}"
    if measured.error is not None:
        return f"{where}: {measured.error}"
    return f"{where}: {quantity(measured.seconds, TIME)}, peak {quantity(measured.peak, BYTES)} in section '{measured.peak_section}'"


def _show(found: dict[str, Any], folder: Path, console: Console) -> None:
    from engine.profiling.plots import plot  # here: matplotlib takes a second

    for table in tables.tables(found):
        console.table(**table)
    console.say(tables.caption(found))
    plots = ", ".join(f"{name}.svg" for name in plot(found, folder))
    console.say(f"Results: {folder} (profile.json, table.md, {plots}, traces/ for chrome://tracing or Perfetto)")
