"""Fine-tuning: L = hard(z_S, y). Also how teachers are prepared and how a student is warmed up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.batch import Batch
from engine.methods.state import State


def step(state: State, batches: Sequence[Batch]) -> dict[str, Tensor]:
    student, losses = state.student, []
    student.network.module.train()
    for batch in batches:
        outputs, lookups = student.forward(batch)
        loss = state.objective.hard(outputs.logits, batch.labels)
        student.backward([loss], None, lookups)
        student.update()
        losses.append(loss.detach())
    return {"loss": torch.stack(losses).mean()}
