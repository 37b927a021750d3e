"""What a step function works on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.batch import Batch
from engine.metagrad import Strategy
from engine.network import Learner, Network
from engine.objectives import Objective
from engine.time_machine import TimeMachine


@dataclass
class State:
    """The student and, by method, frozen teachers (`teachers`) or teachers that learn (`learning_teachers`)."""

    student: Learner
    objective: Objective
    teachers: Sequence[Network] = ()
    learning_teachers: Sequence[Learner] = ()
    time_machine: TimeMachine | None = None
    meta_gradient: Strategy | None = None
    pilot_lr: float = 0.0
    quiz: Callable[[int], list[Batch]] | None = None  # round -> quiz batches, a pure function of the round
    round: int = 0

    def learners(self) -> list[Learner]:
        return [self.student, *self.learning_teachers]

    def networks(self) -> list[Network]:
        return [*(learner.network for learner in self.learners()), *self.teachers]
