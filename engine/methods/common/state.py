"""What a step function works on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from engine.batch import Batch
from engine.losses.objectives import Objective
from engine.meta.meta_step import MetaStep
from engine.meta.micro_batches import Part, parts
from engine.models.learner import Learner
from engine.models.network import Network


@dataclass
class State:
    """The student and, by method, frozen teachers (`teachers`, `weights` [K]) or a meta-step with teachers that learn."""

    student: Learner
    objective: Objective
    teachers: Sequence[Network] = ()
    weights: Tensor | None = None
    by_example: str | None = None  # the batches' column that weighs examples in the features' part of the loss
    meta_step: MetaStep | None = None
    quiz: Callable[[int], list[Batch]] | None = None  # round -> quiz batches, a pure function of the round
    round: int = 0
    micro_batch: int | None = None  # examples that go through the models at once; the meta-step has its own

    def parts(self, batch: Batch) -> list[Part]:
        """What of `batch` goes through the models at once."""
        return parts(batch, self.objective, self.micro_batch)

    def draw(self) -> list[Batch]:
        """The quiz batches of this round."""
        return [] if self.quiz is None else self.quiz(self.round)

    def advance(self, batches: int) -> None:
        """What the host does after a round of so many `batches`: schedules, and the number of the round."""
        self.student.advance(batches)
        for learner in self.learners()[1:]:
            learner.advance()
        self.round += 1

    def forget(self) -> None:
        """Steps were taken whose work was not done (a CUDA graph's capture that broke off): copies of weights are made again."""
        for network in self.networks():
            network.flat.stale()

    def learners(self) -> list[Learner]:
        return [self.student, *(self.meta_step.learners if self.meta_step else ())]

    def networks(self) -> list[Network]:
        """All that read batches."""
        return [self.student.network, *self.teachers, *(self.meta_step.problem.teachers if self.meta_step else ())]
