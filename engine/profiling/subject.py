"""What a command line of engine.profiling is about: a task, models without weights, a device."""

from __future__ import annotations

from typing import NamedTuple

import torch

from engine.data.labels import Task
from engine.errors import UserError
from engine.hub import Hub
from engine.methods import METHODS
from engine.profiling.blueprints import Blueprint, blueprints
from engine.profiling.estimate import Setting, settings
from engine.profiling.options import Options
from engine.screen.console import Console

MINIATURES = (
    "The models are miniatures, so the figures say nothing about the real ones; leave --source embedded out for those."
)


class Subject(NamedTuple):
    """`settings` are those that were asked for; `teachers` none where the method has none."""

    task: Task
    student: Blueprint
    teachers: list[Blueprint]
    device: torch.device
    settings: list[Setting]

    @classmethod
    def of(cls, given: Options, console: Console) -> Subject:
        """Raises UserError for models that nothing is known of, and for lengths that they cannot read."""
        config, classes = given.config, tuple(map(str, range(given.classes))) if given.classes > 1 else ()
        device = _device(config.run.device)
        task = Task("classification" if classes else "regression", classes, False)
        student, teachers = blueprints(config, task, Hub(config.models.source))
        if METHODS[config.method.method].teachers == "none":
            teachers = []
        _announce([student, *teachers], console)
        asked = settings(config, **given.choices)
        _check_lengths([student, *teachers], asked)
        return cls(task, student, teachers, device, asked)


def _device(given: str) -> torch.device:
    if given == "auto":
        given = "cuda" if torch.cuda.is_available() else "cpu"
    if given.split(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"--device is {given!r}; it must be auto, cpu or cuda.")
    return torch.device("cuda", 0) if given.startswith("cuda") else torch.device("cpu")


def _announce(models: list[Blueprint], console: Console) -> None:
    if any(each.source.kind == "embedded" for each in models):
        console.banner("EMBEDDED DEMONSTRATION", MINIATURES)
    for note in dict.fromkeys(each.note for each in models if each.note):
        console.say(f"Note: {note}.")


def _check_lengths(models: list[Blueprint], asked: list[Setting]) -> None:
    for each in models:
        for setting in asked:
            if each.longest is not None and setting.max_length > each.longest:
                raise UserError(f"{each.source.given} reads at most {each.longest} tokens, and --lengths (--max-length) is "
                                f"{setting.max_length}; give {each.longest} or fewer.")  # fmt: skip
