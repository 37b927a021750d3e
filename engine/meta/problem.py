"""What a strategy of the meta-gradient differentiates, and what it gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from engine.batch import Batch
from engine.losses.objectives import Objective
from engine.meta.micro_batches import Part, parts
from engine.meta.pilots import Pilot
from engine.meta.time_machine import TimeMachine
from engine.models.network import Network, Outputs
from engine.params.flat import Lookups
from engine.params.pass_state import Buffers, RandomState


@dataclass
class Problem:
    """What a strategy differentiates. `weights` gives [K] teacher weights, its parameters learned; None for the mean."""

    student: Network
    teachers: Sequence[Network]
    objective: Objective
    pilot: Pilot
    time_machine: TimeMachine
    weights: Network | None = None
    checkpointing: str = "none"  # student, teachers, both: whose activations are recomputed, layer by layer
    keep: bool = False  # whether the graph of a single pilot's forward is kept for the real step
    taped: bool = True  # until the student was seen to draw random numbers that a tape does not record
    micro_batch: int | None = None  # examples that go through the models at once
    own: Objective | None = None  # a teacher's own loss, taught by the student; its gradient joins dq/dtheta_k

    def __post_init__(self):
        """`shared` tells whether a teacher has modules in common with the student, whose step leaves them in train mode."""
        theirs = {id(m) for teacher in self.teachers for m in teacher.module.modules()}
        self.shared = any(id(m) in theirs for m in self.student.module.modules())

    def answer(self, teacher: Network, batch: Batch) -> Outputs:
        """What a teacher gives, without dropout."""
        if not self.shared:
            return teacher(batch)
        # copies: the student's forward may write to statistics that the teacher's graph still needs
        buffers = Buffers.of(teacher.module)
        with teacher.in_mode(train=False), buffers.again():
            return teacher(batch)

    def parts(self, batch: Batch) -> list[Part]:
        return parts(batch, self.objective, self.micro_batch)

    def own_loss(self, part: Part, pilots: int) -> Objective:
        """A teacher's own loss on a part of a pilot batch; a round has so many `pilots`, and their mean counts."""
        given = part.objective
        return replace(self.own, share=given.share / pilots, hard_share=given.hard_share / pilots)


class Kept(NamedTuple):
    """A forward of the student at the weights it is rewound to, with its graph."""

    outputs: Outputs
    lookups: Lookups
    buffers: Buffers  # as the forward left them


class Meta(NamedTuple):
    """Detached device scalars, the random state before each pilot's forward, and the pilot's graph where it was kept."""

    pilot_loss: Tensor
    quiz_loss: Tensor | None  # None where there is no quiz (engine.meta.reptile)
    masks: list[list[RandomState]]  # of each batch, of each of its parts
    kept: Kept | None = None
    teacher_loss: Tensor | None = None  # mean of the teachers' own losses, where they have them
