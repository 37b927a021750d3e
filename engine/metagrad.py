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
    finite_difference  the same walk, u_j and H_j v_j by central differences: (f(phi + eps v) - f(phi - eps v)) / 2 eps with
                     eps = 0.01 / |v|, two forwards (and backwards, while j > 1) instead of the forward-mode pass.
                     For students whose operations have no forward-mode derivatives; approximate.
    double_backward  q differentiated through `create_graph=True` pilots. The oracle, and what published code does.

Source: MetaDistil (Zhou, Xu and McAuley, ACL 2022); the walk back as in MixFlow-MG (Kemaev et al., ICML 2025); the
choice of eps from DARTS (Liu et al., ICLR 2019).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
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


# forward, student, pilot loss (None where no H v is needed), v, time machine -> logits [B, C], J v [B, C], H v
Directional = Callable[..., tuple[Tensor, Tensor, list[Tensor] | None]]


def _walk_back(
    directional: Directional,
    student: Network,
    teachers: Sequence[Network],
    time_machine: TimeMachine,
    pilots: Sequence[Batch],
    quizzes: Sequence[Batch],
    objective: Objective,
    pilot_lr: float,
) -> Losses:
    """First-order memory: the pilot steps forward, then back through the snapshots with `directional` derivatives."""
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
            if last > 0:
                teacher_logits = [teacher(pilots[j]) for teacher in teachers]
            detached = [z.detach() for z in teacher_logits]
            loss = partial(objective.distil, teachers=detached, labels=pilots[j].labels)
            forward = partial(_with_masks, masks[j], student, pilots[j])
            student_logits, u, hv = directional(forward, student, loss if j > 0 else None, v, time_machine)
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


def _with_masks(masks: RandomState, student: Network, batch: Batch, parameters: dict[str, Tensor] | None = None):
    """The student's logits with the dropout masks that the pilot drew."""
    masks.restore()
    return student(batch, parameters)


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


def _forward_mode(
    forward: Callable[..., Tensor], student: Network, loss: Callable[[Tensor], Tensor] | None, v: Sequence[Tensor], _
) -> tuple[Tensor, Tensor, list[Tensor] | None]:
    """Student logits, their tangent u = J v and, with a loss, its H v, in one forward-mode pass along v."""
    with torch.set_grad_enabled(loss is not None), forward_ad.dual_level():
        primals = {name: p.detach().requires_grad_(loss is not None) for name, p in student.trainable().items()}
        duals = {name: forward_ad.make_dual(p, t) for (name, p), t in zip(primals.items(), v, strict=True)}
        logits = forward(duals)
        hv = None
        if loss is not None:
            gradients = _gradients(loss(logits), list(duals.values()))
            hv = [
                torch.zeros_like(t) if (g := forward_ad.unpack_dual(d).tangent) is None else g.detach()
                for d, t in zip(gradients, v, strict=True)
            ]
        primal, tangent = forward_ad.unpack_dual(logits)
        return primal.detach(), tangent.detach(), hv


def _central_difference(
    forward: Callable[..., Tensor],
    student: Network,
    loss: Callable[[Tensor], Tensor] | None,
    v: Sequence[Tensor],
    time_machine: TimeMachine,
) -> tuple[Tensor, Tensor, list[Tensor] | None]:
    """What `_forward_mode` gives, from the student's logits (and gradients) a little ahead and behind along v."""
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(v))))
    eps = 0.01 / norm.clamp_min(torch.finfo(norm.dtype).tiny)
    logits, gradients = [], []
    for side in (eps, -eps):
        with time_machine.perturbed(v, side), torch.set_grad_enabled(loss is not None):
            out = forward()
            if loss is not None:
                gradients.append(_gradients(loss(out), list(student.trainable().values())))
            logits.append(out.detach())
    ahead, behind = logits
    hv = None if loss is None else torch._foreach_div(torch._foreach_sub(*gradients), 2 * eps)
    return (ahead + behind) / 2, (ahead - behind) / (2 * eps), hv


def _gradients(loss: Tensor, inputs: list[Tensor], create_graph: bool = False) -> list[Tensor]:
    """d loss / d inputs, zeros for an input that the loss does not depend on (an unused pooler, say)."""
    return list(torch.autograd.grad(loss, inputs, create_graph=create_graph, allow_unused=True, materialize_grads=True))


def exact(*problem) -> Losses:
    """Exact to rounding. Needs forward-mode derivatives of the student (math attention has them)."""
    return _walk_back(_forward_mode, *problem)


def finite_difference(*problem) -> Losses:
    """Approximate, to about 1e-3 relative; needs nothing but the student's forward and backward."""
    return _walk_back(_central_difference, *problem)


STRATEGIES: dict[str, Strategy] = {
    "exact": exact,
    "double_backward": double_backward,
    "finite_difference": finite_difference,
}
