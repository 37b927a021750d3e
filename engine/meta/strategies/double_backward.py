"""Double backward: the quiz loss differentiated through pilots with `create_graph=True`.

The oracle that the other strategies are tested against, and what published code does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.batch import Batch
from engine.meta.passes import Taught, recomputed, teach
from engine.meta.problem import Meta, Problem
from engine.meta.strategies import Strategy
from engine.models.features import InnerStates
from engine.models.network import Outputs
from engine.params.flat import Lookups
from engine.params.pass_state import RandomState
from engine.sections import section


def double_backward(problem: Problem, pilots: Sequence[Batch], quizzes: Sequence[Batch]) -> Meta:
    """Autograd through the pilot steps: memory grows with M and with every activation of student and teachers."""
    student, pilot = problem.student, problem.pilot
    weights, losses, masks, taught, own = dict(student.flat.parameters), [], [], [], []
    with problem.time_machine.excursion():  # the weights are not written here, but buffers may be
        pilot.begin()
        for j, batch in enumerate(pilots):
            masks.append([])
            loss = 0.0
            for part in problem.parts(batch):
                taught.append(answers := teach(problem, part.batch))
                masks[j].append(RandomState({student.flat.weights.device}))
                with section("pilot"), recomputed(problem, student, "student"):
                    outputs = student(part.batch, weights, higher=True)
                loss = loss + part.objective.distil(outputs, answers.outputs, part.batch.labels, answers.weights)
                if problem.own is not None:
                    theirs, pupil = problem.own_loss(part, len(pilots)), [Outputs(outputs.logits.detach())]
                    own += [theirs.distil(Outputs(o.logits), pupil, part.batch.labels) for o in answers.outputs]
            with section("pilot"):
                gradients = torch.autograd.grad(
                    loss, list(weights.values()), create_graph=True, allow_unused=True, materialize_grads=True
                )  # zeros for a weight that the loss does not depend on (an unused pooler, say)
                weights = pilot.update(j, weights, dict(zip(weights, gradients, strict=True)))
            losses.append(loss.detach())
        quiet = student.giving(InnerStates())
        with section("quiz"), student.in_mode(train=False), quiet, recomputed(problem, student, "student"):
            several = [part for batch in quizzes for part in problem.parts(batch)]
            answered = (p.objective.hard(student(p.batch, weights).logits, p.batch.labels) for p in several)
            quiz_loss = sum(answered) / len(quizzes)
        _to_teachers(problem, quiz_loss + sum(own), taught)
    teacher_loss = torch.stack(own).detach().sum() / len(problem.teachers) if own else None
    return Meta(torch.stack(losses).mean(), quiz_loss.detach(), masks, teacher_loss=teacher_loss)


@section("teacher update")
def _to_teachers(problem: Problem, loss: Tensor, taught: list[Taught]) -> None:
    """dq/dtheta_k and dq/dw (of q and the teachers' own losses) in one backward."""
    learners = [(t, [each.lookups[k] for each in taught]) for k, t in enumerate(problem.teachers)]
    if problem.weights is not None and problem.weights.trainable():
        learners.append((problem.weights, []))
    inputs = [
        [*network.leaves().values(), *(leaf for found in lookups for leaf in found.leaves)]
        for network, lookups in learners
    ]
    found = iter(torch.autograd.grad(loss, [t for each in inputs for t in each], allow_unused=True))
    for (network, lookups), each in zip(learners, inputs, strict=True):
        gradients = [next(found) for _ in each]
        names = list(network.leaves())
        together = Lookups(
            {i for f in lookups for i in f.hooked},
            [i for f in lookups for i in f.ids],
            [t for f in lookups for t in f.leaves],
        )
        by_name = dict(zip(names, gradients, strict=False))
        network.flat.add(by_name, together, gradients[len(names) :])


STRATEGY = Strategy(
    gradient=double_backward, help="by autograd through the pilot step, equal to exact to rounding", keeps_graph=False
)
