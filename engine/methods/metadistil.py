"""MetaDistil (Zhou, Xu and McAuley, ACL 2022) with the averaged logits of any number of teachers.

A round over M batches: the student takes M pilot steps, the quiz loss flows back into every teacher, each teacher takes
an AdamW step, the student is rewound and takes its real steps on the same batches from the updated teachers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.batch import Batch
from engine.methods.kd import distil
from engine.methods.state import State


def step(state: State, batches: Sequence[Batch]) -> dict[str, Tensor]:
    teachers = [learner.network for learner in state.learning_teachers]
    state.student.network.module.train()
    for teacher in teachers:
        teacher.module.eval()  # with gradient, without dropout
    losses = state.meta_gradient(
        state.student.network, teachers, state.time_machine, batches, state.quiz(state.round), state.objective,
        state.pilot_lr,
    )  # fmt: skip
    for learner in state.learning_teachers:
        learner.update()
    state.round += 1
    real = [distil(state, teachers, batch) for batch in batches]
    return {"loss": torch.stack(real).mean(), "pilot_loss": losses.pilot, "quiz_loss": losses.quiz}
