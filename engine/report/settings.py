"""The settings of a run: which were given, which followed from method and models, and the commands that repeat it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.config import Config
from engine.report.load import Run

PLACES = {"output", "resume", "cache_dir"}  # where a run lies: no part of what it does
BELONGS_TO_COMPARISON = {"method", "seed"}


@dataclass(frozen=True)
class Settings:
    """Name to (value, default) where the run differs; `chosen`, whose default follows from method, models and data."""

    given: dict[str, tuple[Any, Any]]
    chosen: dict[str, Any]
    rest: dict[str, Any]


def sorted_out(settings: dict[str, Any]) -> Settings:
    defaults = Config().to_flat()
    given, chosen, rest = {}, {}, {}
    for name, value in settings.items():
        if name in PLACES:
            continue
        if name not in defaults or (defaults[name] is not None and value != defaults[name]):
            given[name] = (value, defaults.get(name))
        elif defaults[name] is None and value is not None:
            chosen[name] = value
        else:
            rest[name] = value
    return Settings(given, chosen, rest)


def differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Name to the value of each run, of the settings in which they differ; None where a run lacks one."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name not in PLACES)
    found = {name: [run.settings.get(name) for run in runs] for name in names}
    return {name: values for name, values in found.items() if any(value != values[0] for value in values)}


def commands(run: Run) -> list[tuple[str, str]]:
    """What each command is for, and the command."""
    folder = str(run.folder)
    found = []
    if not run.finished:
        found.append(("Continue the run", _joined("engine.train", ["--resume", "--output", folder])))
    if isinstance(run.summary.get("command"), str):
        found.append(("The command that started the run", run.summary["command"]))
    found.append(
        ("Repeat the run from its settings file", _joined("engine.train", ["--config", f"{folder}/config.yaml"]))
    )
    settings = sorted_out(run.settings)
    given = {name: value for name, (value, _) in settings.given.items() if re.fullmatch(r"\w+", name)}
    found.append(("Repeat the run with flags alone", _joined("engine.train", _flags(given | settings.chosen))))
    if run.method and run.method != "finetune":
        methods = ",".join(dict.fromkeys(["finetune", "kd", run.method_setting]))
        flags = _flags({name: value for name, value in given.items() if name not in BELONGS_TO_COMPARISON})
        words = ["--methods", methods, *flags, "--seeds", "5"]
        found.append(("Compare the method with others, over five seeds", _joined("engine.compare", words)))
    found.append(("Make this page again", _joined("engine.report", [folder])))
    return found


def shown(value: Any) -> str:
    """A value as in the YAML file."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _flags(values: dict[str, Any]) -> list[str]:
    words = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            words.append(flag)
        elif value is not None and value is not False:
            text = repr(value) if isinstance(value, float) else str(value)
            words += [f"{flag}={text}"] if text.startswith("-") else [flag, text]
    return words


def _joined(module: str, words: list[str]) -> str:
    return shlex.join(["python", "-m", module, *words])
