"""Fine-tuning: L = hard(z_S, y). Also how teachers are prepared and how a student is warmed up."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from engine.batch import Batch
from engine.methods import Method, State
from engine.methods.common.train import train


def step(state: State, batches: Sequence[Batch], quizzes: Sequence[Batch] = ()) -> dict[str, Tensor]:
    return train(state, batches, lambda objective, outputs, batch: objective.hard(outputs.logits, batch.labels))


METHOD = Method(
    step=step,
    help="by the labels alone",
    teachers="none",
    title="fine-tuning",
    report="There is no teacher: the student learns from the labels alone.",
)
