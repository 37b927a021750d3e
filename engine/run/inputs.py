"""Step 1: read the data, name the models, fill in the settings that were left open."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from engine.config import Config
from engine.data.splits import Splits, load_splits
from engine.errors import UserError
from engine.hub import Hub
from engine.methods import METHODS
from engine.models.load import ModelSource, resolve_models
from engine.report.words import DEMONSTRATION
from engine.run import choices, domains
from engine.run.domains import DomainPlan
from engine.run.output import require_directory
from engine.screen.console import Console


@dataclass
class Inputs:
    """What a run reads.

    cache              the folder for what later runs can use again
    splits             all examples as texts
    domains            which of them the student and each teacher learn from
    student, teachers  where the models come from; nothing of them is loaded
    """

    cache: Path
    splits: Splits
    domains: DomainPlan
    student: ModelSource
    teachers: list[ModelSource]


def read_inputs(config: Config, console: Console) -> Inputs:
    """Raises UserError for data and models that cannot be had, and for settings that do not fit them."""
    cache = cache_folder(config)
    require_directory(cache, "--cache-dir")
    hub = Hub(config.models.source)
    teachers, student = _name_models(config, hub)
    samples = 1 + max((source.sample for source in teachers), default=0)
    splits = load_splits(config.data, samples, hub, console.say)
    choices.resolve_defaults(config, student, teachers)
    choices.settle_source(config, [*teachers, student], splits.source)
    plan = domains.plan(config, splits.task)
    found = Inputs(cache, plan.scarce(splits), plan, student, plan.sources(teachers))
    _announce(config, found, hub, console)
    return found


def cache_folder(config: Config) -> Path:
    given = config.run.cache_dir or os.environ.get("METADISTIL_CACHE") or "~/.cache/metadistil-engine"
    return Path(given).expanduser()


def _name_models(config: Config, hub: Hub) -> tuple[list[ModelSource], ModelSource]:
    models, method = config.models, config.method.method
    taught = METHODS[method].teachers != "none"
    given = [item.strip() for item in models.teachers.split(",") if item.strip()] if taught else []
    if taught and not given:
        raise UserError(f"--method {method} needs --teachers; name at least one.")
    teachers, (student,) = resolve_models(given, hub), resolve_models([models.student], hub)
    if student.sample:
        raise UserError(
            f"--student is {models.student!r}, but only teachers have numbers, which choose samples of the data; leave the number out."
        )
    return teachers, student


def _announce(config: Config, found: Inputs, hub: Hub, console: Console) -> None:
    embedded = [source.given for source in [*found.teachers, found.student] if source.kind == "embedded"]
    if found.splits.source == "embedded":
        embedded.append(f"data {config.data.data}")
    if embedded:
        why = "--source embedded was given" if hub.source == "embedded" else f"the hub cannot be reached ({hub.why})"
        console.banner("EMBEDDED DEMONSTRATION", f"{', '.join(embedded)}: {why}.\n{DEMONSTRATION}")
    for role, source in [*(("Teacher", source) for source in found.teachers), ("Student", found.student)]:
        console.say(f"{role} {source.name}: {source.describe()}")
