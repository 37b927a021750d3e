"""What a method's file says of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import Tensor

from engine.batch import Batch
from engine.methods.common.state import State

Step = Callable[[State, Sequence[Batch], Sequence[Batch]], dict[str, Tensor]]  # state, batches, quiz batches
Teachers = Literal["none", "frozen", "learning"]
LearnFrom = Literal["quiz", "weights"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A step, and what a run has to bring for it. All but `step` are written as literal values (engine.plugins).

    step           takes the state, the round's batches and its quiz batches; returns losses as device scalars
    help           one line of --help: how the student is trained
    teachers       "none", "frozen" ones, or ones that are "learning": `state.meta_step` has them
    learn_from     what learning teachers learn from: a "quiz" through the meta-gradient, or the student's "weights"
                   (engine.meta.reptile)
    own_loss       learning teachers also learn the task, and from the student (--teacher-alpha)
    meta_teachers  frozen teachers are prepared on several domains (--prepare-method meta); the student also learns their
                   domain features, and each example counts as much as the teachers know of it (engine.run.prototypes)
    defaults       of settings that are None in engine.config, by their names there; "--epochs" takes over that setting's value
    title, report  the name and a sentence or two in reports

    Raises ValueError for values that are not among these.
    """

    step: Step
    help: str
    teachers: Teachers
    learn_from: LearnFrom | None = None
    own_loss: bool = False
    meta_teachers: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    title: str = ""
    report: str = ""

    def __post_init__(self):
        if self.teachers not in get_args(Teachers):
            raise ValueError(f"teachers is {self.teachers!r}; it must be one of {', '.join(get_args(Teachers))}.")
        if (self.teachers == "learning") != (self.learn_from in get_args(LearnFrom)):
            raise ValueError(f"learn_from is {self.learn_from!r}; for learning teachers it must be one of "
                             f"{', '.join(get_args(LearnFrom))}, for others None.")  # fmt: skip
        if self.own_loss and self.learn_from != "quiz":
            raise ValueError("own_loss is for teachers that learn from a quiz.")
        if self.meta_teachers and self.teachers != "frozen":
            raise ValueError("meta_teachers is for frozen teachers.")
