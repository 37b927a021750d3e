"""Step 4: plan the losses, and check that the method fits the models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.config import Config
from engine.data.splits import Task
from engine.errors import UserError
from engine.losses.objectives import Objective
from engine.methods import METHODS
from engine.models import teacher_params
from engine.models.network import Network
from engine.run import choices
from engine.run.matching import Matching, match


@dataclass
class Losses:
    """What the student learns by.

    objective        of the distillation
    matching         the inner states that its feature loss compares, or None
    teacher_weights  as they were given: numbers, "learned", or None for equal ones
    """

    objective: Objective
    matching: Matching | None
    teacher_weights: list[float] | str | None


def plan_losses(
    config: Config, task: Task, student: Network, teachers: Sequence[Network], say: Callable[[str], None]
) -> Losses:
    """Raises UserError where models cannot be compared, or do not fit the method's settings."""
    objective = choices.objective(config, task, say)
    matching = None if objective.feature_loss == "none" else match(config, student, teachers)
    weights = choices.teacher_weights(config, len(teachers))
    if METHODS[config.method.method].teachers == "learning":
        teacher_params.parse(config.method.teacher_params)
        for teacher in teachers:
            try:
                teacher_params.check(teacher.module, config.method.teacher_params)
            except UserError as e:
                raise UserError(f"Teacher {teacher.name}: {e}") from e
        choices.check_checkpointing(config.method.checkpointing, student, teachers)
        choices.layer_maps(config, student, teachers)
    return Losses(objective, matching, weights)
