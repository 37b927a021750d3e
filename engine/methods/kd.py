"""Knowledge distillation from frozen teachers (Hinton et al. 2015; with several teachers, MTN-KD)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.batch import Batch
from engine.methods.state import State
from engine.network import Network


def step(state: State, batches: Sequence[Batch]) -> dict[str, Tensor]:
    state.student.network.module.train()
    losses = [distil(state, state.teachers, batch) for batch in batches]
    return {"loss": torch.stack(losses).mean()}


def distil(state: State, teachers: Sequence[Network], batch: Batch) -> Tensor:
    """One optimizer step of the student on the soft and hard loss, teachers in eval mode and without gradient."""
    with torch.no_grad():
        teacher_logits = [_evaluate(teacher, batch) for teacher in teachers]
    loss = state.objective.distil(state.student.network(batch), teacher_logits, batch.labels)
    loss.backward()
    state.student.update()
    return loss.detach()


def _evaluate(teacher: Network, batch: Batch) -> Tensor:
    with teacher.in_mode(train=False):
        return teacher(batch)
