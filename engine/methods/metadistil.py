"""MetaDistil (Zhou, Xu and McAuley, ACL 2022) with the averaged logits of any number of teachers.

A round over M batches: the student takes M pilot steps, the quiz loss flows back into every teacher, each teacher takes
an AdamW step, the student is rewound and takes its real steps on the same batches from the updated teachers.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from engine.batch import Batch
from engine.methods import Method, State


def step(state: State, batches: Sequence[Batch], quizzes: Sequence[Batch]) -> dict[str, Tensor]:
    values = state.meta_step(batches, quizzes)
    if state.meta_step.weights is not None:
        values |= {f"weight_{k + 1}": w for k, w in enumerate(state.meta_step.weights)}
    return values


METHOD = Method(
    step=step,
    help="by teachers that learn to teach: a quiz of the student tells them how",
    teachers="learning",
    learn_from="quiz",
    title="MetaDistil",
    report="Each round the student takes a pilot step and is quizzed on held-out examples; the quiz loss flows back into every "
    "teacher, the student is rewound, and takes the real step from teachers that teach it better.",
)
