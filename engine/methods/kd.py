"""Knowledge distillation from frozen teachers (Hinton et al. 2015; with several teachers, MTN-KD).

Their answers come with the batch where they were kept (`engine.run.answers`), and are computed where they were not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.batch import Batch
from engine.methods import Method, State
from engine.models.network import Network, Outputs
from engine.sections import section


@section("real step")
def step(state: State, batches: Sequence[Batch], quizzes: Sequence[Batch] = ()) -> dict[str, Tensor]:
    student, losses = state.student, []
    student.network.module.train()
    for whole in batches:
        for batch, objective in state.parts(whole):
            taught = [Outputs(*given) for given in batch.answers] or [_evaluate(t, batch) for t in state.teachers]
            outputs, lookups = student.forward(batch)
            by_example = None if state.by_example is None else batch.columns[state.by_example]
            loss, slopes = objective.slopes(outputs, taught, batch.labels, state.weights, by_example)
            student.backward(outputs.given(), slopes, lookups)
            losses.append(loss)
        student.update()
    return {"loss": torch.stack(losses).sum() / len(batches)}


@section("teacher forward")
@torch.no_grad()
def _evaluate(teacher: Network, batch: Batch) -> Outputs:
    with teacher.in_mode(train=False):
        return teacher(batch)


METHOD = Method(
    step=step,
    help="by frozen teachers",
    teachers="frozen",
    title="KD",
    report="The teachers are frozen, and the student learns from their averaged logits and from the labels.",
)
