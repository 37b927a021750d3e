"""What a step function works on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from engine.batch import Batch
from engine.learner import Learner
from engine.meta_step import MetaStep
from engine.network import Network
from engine.objectives import Objective


@dataclass
class State:
    """The student and, by method, frozen teachers (`teachers`, `weights` [K]) or a meta-step with teachers that learn."""

    student: Learner
    objective: Objective
    teachers: Sequence[Network] = ()
    weights: Tensor | None = None
    meta_step: MetaStep | None = None
    quiz: Callable[[int], list[Batch]] | None = None  # round -> quiz batches, a pure function of the round
    round: int = 0

    def learners(self) -> list[Learner]:
        return [self.student, *(self.meta_step.learners if self.meta_step else ())]

    def networks(self) -> list[Network]:
        """All that read batches."""
        return [self.student.network, *self.teachers, *(self.meta_step.problem.teachers if self.meta_step else ())]
