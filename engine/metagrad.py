"""The meta-gradient: how a quiz loss taken after the student's pilot steps moves every teacher.

With pilot loss l, pilot steps phi_j = phi_{j-1} - eta grad_phi l(phi_{j-1}; x_j) and quiz loss q(phi_M), each strategy
leaves dq/dtheta_k in the teachers' `.grad`, the student as it found it, and the random generators where the pilot's
forwards left them. `STRATEGIES` holds them behind one signature:

    exact            v_M = grad q(phi_M), then for j = M..1, at phi_{j-1} on batch j with its dropout masks:
                         u_j = J_S v_j                                         forward mode
                         c_k = -eta d/dz_k < dl/dz_S, u_j >                    at the loss head, [B, C]
                         dq/dtheta_k += J_k^T c_k                              one ordinary backward of each teacher
                         v_{j-1} = v_j - eta H_j v_j                           forward over reverse, only while j > 1
                     No second-order graph; activations are those of one step, whatever M is.
    double_backward  q differentiated through `create_graph=True` pilots. The oracle, and what published code does.

Source: MetaDistil (Zhou, Xu and McAuley, ACL 2022); the walk back as in MixFlow-MG (Kemaev et al., ICML 2025).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from engine.batch import Batch
from engine.network import Network
from engine.objectives import Objective
from engine.time_machine import RandomState, TimeMachine


class Losses(NamedTuple):
    """Detached device scalars."""

    pilot: Tensor
    quiz: Tensor


Strategy = Callable[
    [Network, Sequence[Network], TimeMachine, Sequence[Batch], Sequence[Batch], Objective, float], Losses
]


def exact(
    student: Network,
    teachers: Sequence[Network],
    time_machine: TimeMachine,
    pilots: Sequence[Batch],
    quizzes: Sequence[Batch],
    objective: Objective,
    pilot_lr: float,
) -> Losses:
    """First-order memory, exact to rounding. Needs forward-mode derivatives of the student (math attention has them)."""
    weights = list(student.trainable().values())
    devices = [p.device for p in weights]
    masks, pilot_losses, last = [], [], len(pilots) - 1
    with time_machine.excursion():
        for j, batch in enumerate(pilots):
            if j > 0:  # the excursion holds slot 0
                time_machine.snapshot(j)
            masks.append(RandomState(devices))
            # With a single pilot the graph of the teachers is kept for their backward; the walk back over several
            # recomputes it instead, so that activation memory does not grow with M.
            with torch.set_grad_enabled(last == 0):
                teacher_logits = [teacher(batch) for teacher in teachers]
            loss = objective.distil(student(batch), [z.detach() for z in teacher_logits], batch.labels)
            time_machine.advance(_gradients(loss, weights), pilot_lr)
            pilot_losses.append(loss.detach())
        after_pilots = RandomState(devices)
        quiz_loss, v = _quiz(student, weights, quizzes, objective)
        for j in range(last, -1, -1):
            time_machine.rewind(j)
            masks[j].restore()
            if last > 0:
                teacher_logits = [teacher(pilots[j]) for teacher in teachers]
            detached = [z.detach() for z in teacher_logits]
            student_logits, u, hv = _directional(student, pilots[j], detached, objective, v, curvature=j > 0)
            cotangents = objective.cotangents(student_logits, detached, pilots[j].labels, u, pilot_lr)
            torch.autograd.backward(teacher_logits, cotangents)
            if j > 0:
                v = torch._foreach_sub(v, hv, alpha=pilot_lr)
        after_pilots.restore()
    return Losses(torch.stack(pilot_losses).mean(), quiz_loss)


def double_backward(
    student: Network,
    teachers: Sequence[Network],
    time_machine: TimeMachine,
    pilots: Sequence[Batch],
    quizzes: Sequence[Batch],
    objective: Objective,
    pilot_lr: float,
) -> Losses:
    """Autograd through the pilot steps: memory grows with M and with every activation of student and teachers."""
    weights = dict(student.trainable())
    pilot_losses = []
    with time_machine.excursion():  # the weights are not written here, but buffers may be
        for batch in pilots:
            loss = objective.distil(student(batch, weights), [t(batch) for t in teachers], batch.labels)
            gradients = _gradients(loss, list(weights.values()), create_graph=True)
            weights = {name: p - pilot_lr * g for (name, p), g in zip(weights.items(), gradients, strict=True)}
            pilot_losses.append(loss.detach())
        with student.in_mode(train=False):
            quiz_loss = sum(objective.hard(student(b, weights), b.labels) for b in quizzes) / len(quizzes)
        targets = [p for teacher in teachers for p in teacher.trainable().values()]
        quiz_loss.backward(inputs=targets)
    return Losses(torch.stack(pilot_losses).mean(), quiz_loss.detach())


STRATEGIES: dict[str, Strategy] = {"exact": exact, "double_backward": double_backward}


def _quiz(student: Network, weights: list[Tensor], quizzes: Sequence[Batch], objective: Objective):
    """Mean quiz loss with dropout off, and its gradient v; one batch's activations at a time."""
    total, v = 0.0, None
    with student.in_mode(train=False):
        for batch in quizzes:
            loss = objective.hard(student(batch), batch.labels) / len(quizzes)
            gradients = _gradients(loss, weights)
            v = gradients if v is None else torch._foreach_add(v, gradients)
            total = total + loss.detach()
    return total, v


def _directional(
    student: Network,
    batch: Batch,
    teacher_logits: Sequence[Tensor],
    objective: Objective,
    v: Sequence[Tensor],
    curvature: bool,
) -> tuple[Tensor, Tensor, list[Tensor] | None]:
    """Student logits, their tangent u = J v and, if asked, H v of the pilot loss, in one forward-mode pass along v."""
    with torch.set_grad_enabled(curvature), forward_ad.dual_level():
        primals = {name: p.detach().requires_grad_(curvature) for name, p in student.trainable().items()}
        duals = {name: forward_ad.make_dual(p, t) for (name, p), t in zip(primals.items(), v, strict=True)}
        logits = student(batch, duals)
        hv = None
        if curvature:
            loss = objective.distil(logits, teacher_logits, batch.labels)
            gradients = _gradients(loss, list(duals.values()))
            hv = [
                torch.zeros_like(t) if (g := forward_ad.unpack_dual(d).tangent) is None else g.detach()
                for d, t in zip(gradients, v, strict=True)
            ]
        primal, tangent = forward_ad.unpack_dual(logits)
        return primal.detach(), tangent.detach(), hv


def _gradients(loss: Tensor, inputs: list[Tensor], create_graph: bool = False) -> list[Tensor]:
    """d loss / d inputs, zeros for an input that the loss does not depend on (an unused pooler, say)."""
    return list(torch.autograd.grad(loss, inputs, create_graph=create_graph, allow_unused=True, materialize_grads=True))
