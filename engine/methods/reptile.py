"""ReptileDistil (Ma et al., COLING 2022), with any number of teachers.

A batch: the student takes one AdamW step from the frozen teachers, every teacher takes an AdamW step towards the student's
moved weights (engine.meta.reptile), the student is rewound and takes its real step on the same batch from the updated teachers.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from engine.batch import Batch
from engine.methods import Method, State


def step(state: State, batches: Sequence[Batch], quizzes: Sequence[Batch] = ()) -> dict[str, Tensor]:
    return state.meta_step(batches, quizzes)


METHOD = Method(
    step=step,
    help="by teachers that follow the student's weights",
    teachers="learning",
    learn_from="weights",
    title="ReptileDistil",
    report="Each round the student takes a pilot step; every teacher takes a step towards the student's moved weights; the student "
    "is rewound and takes the real step. There is no quiz.",
)
