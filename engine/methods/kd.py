"""Knowledge distillation from frozen teachers (Hinton et al. 2015; with several teachers, MTN-KD)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.batch import Batch
from engine.methods.state import State
from engine.network import Network, Outputs


def step(state: State, batches: Sequence[Batch]) -> dict[str, Tensor]:
    student, losses = state.student, []
    student.network.module.train()
    for batch in batches:
        with torch.no_grad():
            taught = [_evaluate(teacher, batch) for teacher in state.teachers]
        outputs, lookups = student.forward(batch)
        loss, slopes = state.objective.slopes(outputs, taught, batch.labels, state.weights)
        student.backward(outputs.given(), slopes, lookups)
        student.update()
        losses.append(loss)
    return {"loss": torch.stack(losses).mean()}


def _evaluate(teacher: Network, batch: Batch) -> Outputs:
    with teacher.in_mode(train=False):
        return teacher(batch)
