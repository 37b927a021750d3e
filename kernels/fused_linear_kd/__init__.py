"""`kd_loss` of logits that are never whole in memory: last layer, loss and gradients, chunk by chunk of rows.

z_S = hidden_s weight_s^T and z_k = hidden_k weight_k^T exist for a chunk of rows alone, and the student's become their own
gradient in place:

    d hidden_s[chunk] = dz_S weight_s          d weight_s = sum over chunks of dz_S^T hidden_s[chunk]

The chunk shrinks as the vocabulary grows, so that beyond inputs and gradients memory depends on neither rows nor classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.kernels.ops.common.autograd import forward_mode
from engine.kernels.ops.common.checks import check_logits
from engine.kernels.ops.common.teachers import split_weights, together
from engine.kernels.ops.fused_linear_kd import op  # noqa: F401  registers the op


def fused_linear_kd(
    hidden_s: Tensor,  # [..., H_s] what the student's last layer reads
    weight_s: Tensor,  # [C, H_s]
    hidden_t: Sequence[Tensor],  # K x [..., H_k]
    weight_t: Sequence[Tensor],  # K x [C, H_k]
    labels: Tensor | None = None,  # [...] int64
    *,
    temperature: float,
    alpha: float,
    weights: Sequence[float] | Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """`kd_loss(hidden_s @ weight_s.T, [h @ w.T for h, w in zip(hidden_t, weight_t)], labels, ...)`, [] float32 or float64.

    Gradients for `hidden_s` and `weight_s`; teachers and `weights` are constants. First-order: a second derivative raises
    RuntimeError. `reduction` is "mean" or "sum". Raises ValueError on shapes, dtypes or settings that do not fit, and on
    a teacher that requires gradient; labels as in `kd_loss`. Under autocast the products are of its dtype.
    """
    hidden_t, weight_t, weights = list(hidden_t), list(weight_t), together(weights)
    kind = hidden_s.device.type
    if torch.is_autocast_enabled(kind):  # as a linear layer would be
        dtype = torch.get_autocast_dtype(kind)
        hidden_s, weight_s = hidden_s.to(dtype), weight_s.to(dtype)
        hidden_t, weight_t = [h.to(dtype) for h in hidden_t], [w.to(dtype) for w in weight_t]
    _check(hidden_s, weight_s, hidden_t, weight_t, labels, temperature, alpha, weights, reduction)
    _, weights, constants = split_weights(hidden_s, hidden_t, weights)
    wanted = [torch.is_grad_enabled() and t.requires_grad for t in (hidden_s, weight_s)]
    settings = (labels, weights, constants, temperature, alpha, ignore_index, reduction)
    return torch.ops.metadistil.fused_linear_kd(hidden_s, weight_s, hidden_t, weight_t, *settings, *wanted)[0]


def _check(hidden_s, weight_s, hidden_t, weight_t, labels, temperature, alpha, weights, reduction) -> None:
    if not hidden_t or len(hidden_t) != len(weight_t):
        raise ValueError(
            f"a teacher is one hidden tensor and one weight; got {len(hidden_t)} and {len(weight_t)}, at least one of each is needed."
        )
    for who, hidden, weight in zip(
        ("student", *(f"teacher {k}" for k in range(len(hidden_t)))), (hidden_s, *hidden_t), (weight_s, *weight_t), strict=True
    ):  # fmt: skip
        if (
            weight.dim() != 2
            or hidden.dim() == 0
            or weight.shape[1] != hidden.shape[-1]
            or weight.dtype != hidden.dtype
        ):
            raise ValueError(
                f"the {who}'s hidden {tuple(hidden.shape)} {hidden.dtype} and weight {tuple(weight.shape)} {weight.dtype} must be "
                "[..., H] and [C, H] of one dtype."
            )
    if any(t.requires_grad for t in (*hidden_t, *weight_t)) and torch.is_grad_enabled():
        raise ValueError("fused_linear_kd has no gradient for teachers; detach theirs, or use kd_loss on logits.")
    if isinstance(weights, Tensor) and weights.requires_grad and torch.is_grad_enabled():
        raise ValueError("fused_linear_kd has no gradient for weights; detach them, or use kd_loss on logits.")
    if forward_mode([hidden_s, weight_s, *hidden_t, *weight_t, weights]):
        raise RuntimeError("fused_linear_kd has no forward mode; use kd_loss on logits.")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be mean or sum here; got {reduction!r}. For rows, use kd_loss on logits.")
    # the logits, as far as metadata goes
    student, *teachers = (
        h[..., :1].detach().expand(*h.shape[:-1], w.shape[0])
        for h, w in zip((hidden_s, *hidden_t), (weight_s, *weight_t), strict=True)
    )
    check_logits(student, teachers, labels, temperature, alpha, weights, reduction)
