"""Plain torch: the oracle of every kernel, and the implementation where no kernel serves a device.

With zbar = sum_k w_k z_k (w_k = 1/K unless given), p = softmax(zbar / T), q = softmax(z_S / T), rows r of [R, C]:

    loss    = alpha T^2 / R sum_r KL(p_r || q_r) + (1 - alpha) CE(z_S, labels)
    dz_S    = alpha T / R (q - p) + (1 - alpha) dCE/dz_S
    dz_k    = alpha T / R w_k p (g - <p, g>),  g = log p - log q        (row by row)

Source: Hinton, Vinyals and Dean (2015), with the softmax taken over the averaged logits of K teachers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.ops.common import checks
from engine.kernels.ops.common.numbers import arithmetic, count_labels
from engine.kernels.ops.common.teachers import mean


def kd_loss(
    student: Tensor,  # [..., C] logits
    teachers: Sequence[Tensor],  # K x [..., C] logits
    labels: Tensor | None = None,  # [...] int64
    *,
    temperature: float,
    alpha: float,
    weights: Sequence[float] | Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """The formula as it stands, for autograd: differentiable any number of times, forward mode included."""
    dtype = arithmetic([student, *teachers])
    averaged, student = mean(teachers, weights, dtype), student.to(dtype)
    log_p = F.log_softmax(averaged / temperature, -1)
    log_q = F.log_softmax(student / temperature, -1)
    p = log_p.exp()
    # a class that the teachers give no probability adds nothing, also where logits are -inf; the inner choice keeps the
    # derivative of the one that is not taken from being NaN
    nothing = p == 0
    distance = torch.where(nothing, 0.0, log_p) - torch.where(nothing, 0.0, log_q)
    soft = alpha * temperature**2 * (p * distance).sum(-1)  # [...]
    if reduction != "none":
        soft = soft.mean() if reduction == "mean" and soft.numel() else soft.sum()  # no rows lose nothing
    if labels is None:
        return soft
    hard = cross_entropy(student, labels, ignore_index)
    if reduction != "none":
        hard = hard.sum() / (count_labels(labels, ignore_index) if reduction == "mean" else 1)
    return soft + (1 - alpha) * hard


def cross_entropy(student: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Cross-entropy [...], zero where the label is ignored. NaN where it is out of range and was not looked at."""
    classes = student.shape[-1]
    checks.check_labels(labels, classes, ignore_index)
    counts, inside = labels != ignore_index, (labels >= 0) & (labels < classes)
    # a label that is out of range would stop the whole device
    safe = torch.where(counts & inside, labels, -100).reshape(-1)
    hard = F.cross_entropy(student.reshape(-1, classes), safe, reduction="none").reshape(labels.shape)
    return torch.where(counts & ~inside, torch.nan, hard)


def kd_second(inputs: Sequence[Tensor], loss, upstream: Tensor, cotangents: Sequence[Tensor]) -> list[Tensor]:
    """What cotangents on the gradients of loss(*inputs) send to `upstream` and the inputs, with a graph of their own."""
    gradients = torch.autograd.grad(loss(*inputs), inputs, upstream, create_graph=True, materialize_grads=True)
    targets = [upstream, *inputs]
    return list(torch.autograd.grad(gradients, targets, cotangents, create_graph=True, materialize_grads=True))
