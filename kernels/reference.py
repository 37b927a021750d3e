"""Plain torch: the oracle every kernel is tested against, and the implementation where no kernel serves a device.

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


def mean_logits(teachers: Sequence[Tensor], weights: Sequence[float] | Tensor | None = None) -> Tensor:
    """sum_k w_k z_k over K tensors of [..., C]; w_k = 1/K unless given. Raises ValueError on K = 0 or shapes that differ."""
    if not teachers:
        raise ValueError("kd_loss needs at least one teacher's logits; got none.")
    if any(z.shape != teachers[0].shape for z in teachers):
        raise ValueError(f"teachers' logits must share one shape; got {[tuple(z.shape) for z in teachers]}.")
    if weights is None:
        weights = [1 / len(teachers)] * len(teachers)
    if len(weights) != len(teachers):
        raise ValueError(f"got {len(weights)} weights for {len(teachers)} teachers.")
    return sum(w * _compute(z) for w, z in zip(weights, teachers, strict=True))


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
    """KL over averaged teacher logits plus cross-entropy, differentiable twice in the student and every teacher.

    Arithmetic is float32 (float64 for float64 inputs). `reduction` is "mean" (KL over rows, cross-entropy over rows whose
    label is not `ignore_index`), "sum" or "none" ([...]). Raises ValueError on shapes or settings that do not fit.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0; got {temperature}.")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be mean, sum or none; got {reduction!r}.")
    mean = mean_logits(teachers, weights)
    if student.shape != mean.shape:
        raise ValueError(
            f"student logits are {tuple(student.shape)}, teachers' are {tuple(mean.shape)}; they must agree."
        )
    student = _compute(student)
    log_p = F.log_softmax(mean / temperature, -1)
    log_q = F.log_softmax(student / temperature, -1)
    soft = alpha * temperature**2 * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)  # [...]
    soft = {"mean": soft.mean, "sum": soft.sum, "none": lambda: soft}[reduction]()
    if labels is None:
        return soft
    classes = student.shape[-1]
    hard = F.cross_entropy(
        student.reshape(-1, classes), labels.reshape(-1), ignore_index=ignore_index, reduction=reduction
    )
    return soft + (1 - alpha) * (hard.reshape(labels.shape) if reduction == "none" else hard)


def meta_cotangent(
    student: Tensor,  # [B, C] logits; unused by the KL's closed form, part of the signature for losses that need it
    teachers: Sequence[Tensor],  # K x [B, C] logits
    tangent: Tensor,  # [B, C] u = J_S d, the change of the student's logits as its weights move along d
    *,
    temperature: float,
    alpha: float,
    weights: Sequence[float] | Tensor | None = None,
) -> list[Tensor]:
    """c_k = d/dz_k < dloss/dz_S, u > = -alpha w_k / B p (u - <p, u>): the gradient to each teacher's logits [B, C].

    `loss` is `kd_loss` with the mean over B rows; its cross-entropy carries none. For a pilot step phi - eta dloss/dphi
    and a quiz gradient v, the direction is d = -eta v.
    """
    mean = mean_logits(teachers, weights)
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0; got {temperature}.")
    if tangent.shape != mean.shape:
        raise ValueError(f"the tangent is {tuple(tangent.shape)}, the logits are {tuple(mean.shape)}; they must agree.")
    if weights is None:
        weights = [1 / len(teachers)] * len(teachers)
    p = torch.softmax(mean / temperature, -1)
    u = _compute(tangent)
    common = (-alpha * p.shape[-1] / p.numel()) * p * (u - (p * u).sum(-1, keepdim=True))
    return [w * common for w in weights]


def _compute(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
