"""Fine-tuning: L = hard(z_S, y). Also how teachers are prepared and how a student is warmed up."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.batch import Batch
from engine.losses.objectives import Objective
from engine.methods.state import State
from engine.models.network import Outputs
from engine.sections import section


def step(state: State, batches: Sequence[Batch], quizzes: Sequence[Batch] = ()) -> dict[str, Tensor]:
    return train(state, batches, lambda objective, outputs, batch: objective.hard(outputs.logits, batch.labels))


@section("real step")
def train(
    state: State, batches: Sequence[Batch], loss_of: Callable[[Objective, Outputs, Batch], Tensor]
) -> dict[str, Tensor]:
    """A step on each batch by a loss of the model's own outputs."""
    student, losses = state.student, []
    student.network.module.train()
    for whole in batches:
        for batch, objective in state.parts(whole):
            outputs, lookups = student.forward(batch)
            loss = loss_of(objective, outputs, batch)
            student.backward([loss], None, lookups)
            losses.append(loss.detach())
        student.update()
    return {"loss": torch.stack(losses).sum() / len(batches)}
