"""Fine-tuning: L = hard(z_S, y). Also how teachers are prepared and how a student is warmed up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.batch import Batch
from engine.methods.state import State


def step(state: State, batches: Sequence[Batch], quizzes: Sequence[Batch] = ()) -> dict[str, Tensor]:
    student, losses = state.student, []
    student.network.module.train()
    for whole in batches:
        for batch, objective in state.parts(whole):
            outputs, lookups = student.forward(batch)
            loss = objective.hard(outputs.logits, batch.labels)
            student.backward([loss], None, lookups)
            losses.append(loss.detach())
        student.update()
    return {"loss": torch.stack(losses).sum() / len(batches)}
