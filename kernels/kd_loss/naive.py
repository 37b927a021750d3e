"""Plain torch: the oracle every kernel is tested against, and the implementation where no kernel serves a device.

With zbar = sum_k w_k z_k (w_k = 1/K unless given), p = softmax(zbar / T), q = softmax(z_S / T), rows r of [R, C]:

    loss    = alpha T^2 / R sum_r KL(p_r || q_r) + (1 - alpha) CE(z_S, labels)
    dz_S    = alpha T / R (q - p) + (1 - alpha) dCE/dz_S
    dz_k    = alpha T / R w_k p (g - <p, g>),  g = log p - log q        (row by row)

Source: Hinton, Vinyals and Dean (2015), with the softmax taken over the averaged logits of K teachers.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual


def mean_logits(teachers: Sequence[Tensor], weights: Sequence[float] | Tensor | None = None) -> Tensor:
    """sum_k w_k z_k over K tensors of [..., C]; w_k = 1/K unless given. Raises ValueError on K = 0 or shapes that differ."""
    if weights is None:
        weights = [1 / max(1, len(teachers))] * len(teachers)
    check_teachers(teachers, weights)
    return mean(teachers, weights, arithmetic(teachers))


def mean(teachers: Sequence[Tensor], weights: Sequence[float] | Tensor | None, dtype: torch.dtype) -> Tensor:
    if weights is None:
        weights = [1 / len(teachers)] * len(teachers)
    elif isinstance(weights, Tensor) or any(w < 0 for w in weights):
        # +inf is no mask, and must not become one by its weight
        teachers = [torch.where(z == torch.inf, torch.nan, z) for z in teachers]
    return sum(w * z.to(dtype) for w, z in zip(weights, teachers, strict=True))


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
    """`engine.kernels.kd_loss` by autograd: differentiable any number of times, forward mode included."""
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
    hard = _hard(student, labels, ignore_index)
    if reduction != "none":
        hard = hard.sum() / (counted(labels, ignore_index) if reduction == "mean" else 1)
    return soft + (1 - alpha) * hard


def _hard(student: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Cross-entropy [...], zero where the label is ignored. NaN where it is out of range and was not looked at."""
    classes = student.shape[-1]
    check_labels(labels, classes, ignore_index)
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


def meta_cotangent(
    teachers: Sequence[Tensor],  # K x [..., C] logits
    tangent: Tensor,  # [..., C]
    *,
    temperature: float,
    alpha: float,
    weights: Sequence[float] | Tensor | None = None,
) -> list[Tensor]:
    """`engine.kernels.meta_cotangent` of logits of R rows: -alpha w_k / R p (u - <p, u>)."""
    dtype = arithmetic([tangent, *teachers])
    weights = [1 / len(teachers)] * len(teachers) if weights is None else weights
    p, u = torch.softmax(mean(teachers, weights, dtype) / temperature, -1), tangent.to(dtype)
    common = (-alpha / max(1, rows(p))) * p * (u - (p * u).sum(-1, keepdim=True))
    return [w * common for w in weights]


def kd_rows(
    student: Tensor,  # [R, C]
    teachers: Sequence[Tensor],  # K x [R, C]
    labels: Tensor | None,  # [R]
    weights: Tensor | None,  # [K]
    constants: Sequence[float],  # K
    temperature: float,
    alpha: float,
    ignore_index: int,
    soft_scale: float,
    hard_scale: Tensor | None,  # []
) -> tuple[Tensor, Tensor]:
    """Row losses and their gradient to the student, in closed form; see kd_kernels.py."""
    dtype = arithmetic([student, *teachers])
    averaged, s = mean(teachers, constants if weights is None else weights, dtype), student.to(dtype)
    log_p, log_q = F.log_softmax(averaged / temperature, -1), F.log_softmax(s / temperature, -1)
    p = log_p.exp()
    distance = torch.where(p == 0, 0.0, log_p - log_q)
    loss = soft_scale * alpha * temperature**2 * (p * distance).sum(-1)
    gradient = soft_scale * alpha * temperature * (log_q.exp() - p)
    if labels is not None:
        counts, inside = labels != ignore_index, (labels >= 0) & (labels < s.shape[-1])
        scale = (1 - alpha) * (s.new_ones(()) if hard_scale is None else hard_scale)  # a number would be a float32
        scale = torch.where(inside, scale, torch.nan)
        loss = loss + torch.where(counts, scale * _hard(s, labels, ignore_index), 0.0)
        log_q1, label = F.log_softmax(s, -1), torch.where(counts & inside, labels, 0).unsqueeze(-1)
        hard = log_q1.exp().scatter_add_(-1, label, torch.full_like(label, -1, dtype=dtype))
        gradient += torch.where(counts.unsqueeze(-1), scale.unsqueeze(-1) * hard, 0.0)
    return loss, gradient


def check_teachers(teachers: Sequence[Tensor], weights: Sequence[float] | Tensor) -> None:
    if not teachers:
        raise ValueError("at least one teacher's logits are needed; got none.")
    if any(z.shape != teachers[0].shape for z in teachers):
        raise ValueError(f"teachers' logits must share one shape; got {[tuple(z.shape) for z in teachers]}.")
    if isinstance(weights, Tensor) and (
        weights.dim() != 1 or weights.device != teachers[0].device or not weights.is_floating_point()
    ):
        raise ValueError(
            f"weights must be numbers, or a floating tensor [K] on the logits' device, {teachers[0].device}; got "
            f"{weights.dtype} {tuple(weights.shape)} on {weights.device}."
        )
    if len(weights) != len(teachers):
        raise ValueError(f"got {len(weights)} weights for {len(teachers)} teachers.")


def check_labels(labels: Tensor | None, classes: int, ignore_index: int) -> None:
    """Raises IndexError naming the first that is out of range. Only where looking waits for no device, or is asked for.

    $ENGINE_KERNELS_CHECK=1 has labels looked at on every device.
    """
    if labels is None or type(labels) is not Tensor or torch.compiler.is_compiling() or transformed():
        return
    if labels.device.type != "cpu" and os.environ.get("ENGINE_KERNELS_CHECK", "0") != "1":
        return
    bad = (labels != ignore_index) & ((labels < 0) | (labels >= classes))
    if bad.any():
        raise IndexError(
            f"label {labels[bad][0].item()} is out of range; labels are 0 to {classes - 1}, or {ignore_index} to be ignored."
        )


def counted(labels: Tensor, ignore_index: int) -> Tensor:
    """How many labels [] count in a mean: those that are not ignored, one at least."""
    return (labels != ignore_index).sum().clamp_min(1)


def rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def arithmetic(tensors: Sequence[Tensor]) -> torch.dtype:
    """What to compute in: float64 where a tensor is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def transformed() -> bool:
    """Whether a transform of torch.func (grad, vmap, jvp) is at work."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def forward_mode(tensors: Sequence) -> bool:
    """Whether a tensor among them carries a forward-mode tangent, or may: the kernels would lose it without a word."""
    if torch.compiler.is_compiling():
        return False
    return transformed() or any(isinstance(t, Tensor) and unpack_dual(t).tangent is not None for t in tensors)


def leaf(t: Tensor) -> Tensor:
    """To differentiate by: in the graph that t has, or else the beginning of one."""
    if t.requires_grad:
        return t.view_as(t)
    return (t.clone() if t.is_inference() else t.detach()).requires_grad_()
