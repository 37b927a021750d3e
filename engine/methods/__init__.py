"""The methods: one file each, a step function over state and batches that returns device scalars.

Adding a method is its file, one row of `METHODS` and its name in `engine.config`. Steps are functions of tensors: they know
nothing of epochs, schedules, logging, checkpoints or graphs; the trainer wraps them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from engine.batch import Batch
from engine.methods import finetune, kd, lgtm, metadistil, metakd, reptile
from engine.methods.state import State

Step = Callable[[State, Sequence[Batch], Sequence[Batch]], dict[str, Tensor]]  # state, batches, quiz batches


@dataclass(frozen=True)
class Method:
    """A step, what it needs of its teachers (none, frozen ones, or ones that learn), and of what they learn: a quiz through
    the meta-gradient, or the student's weights (engine.meta.reptile)."""

    step: Step
    teachers: Literal["none", "frozen", "learning"]
    learn_from: Literal["quiz", "weights"] | None = None
    own_loss: bool = False  # teachers also learn the task, and from the student


METHODS: dict[str, Method] = {
    "finetune": Method(finetune.step, "none"),
    "kd": Method(kd.step, "frozen"),
    "metakd": Method(metakd.step, "frozen"),
    "metadistil": Method(metadistil.step, "learning", "quiz"),
    "lgtm": Method(lgtm.step, "learning", "quiz", own_loss=True),
    "reptile": Method(reptile.step, "learning", "weights"),
}

__all__ = ["METHODS", "Method", "State", "Step"]
