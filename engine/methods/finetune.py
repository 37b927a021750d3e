"""Fine-tuning: L = hard(z_S, y). Also how teachers are prepared and how a student is warmed up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.batch import Batch
from engine.methods.state import State


def step(state: State, batches: Sequence[Batch]) -> dict[str, Tensor]:
    state.student.network.module.train()
    losses = []
    for batch in batches:
        loss = state.objective.hard(state.student.network(batch), batch.labels)
        loss.backward()
        state.student.update()
        losses.append(loss.detach())
    return {"loss": torch.stack(losses).mean()}
