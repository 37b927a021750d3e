"""A step on each batch by a loss of the model's own outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.batch import Batch
from engine.losses.objectives import Objective
from engine.methods.common.state import State
from engine.models.network import Outputs
from engine.sections import section


@section("real step")
def train(
    state: State, batches: Sequence[Batch], loss_of: Callable[[Objective, Outputs, Batch], Tensor]
) -> dict[str, Tensor]:
    """`loss_of` gives a scalar; with micro-batches the objective knows what a part counts in its batch."""
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
