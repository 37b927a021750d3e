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

from engine.kernels.ops.common import backends
from engine.kernels.ops.kd_loss import check, split_weights, together
from engine.kernels.ops.kd_loss import naive as reference
from engine.kernels.ops.kd_loss.op import register, save, saved, scaled

CHUNK = {"cuda": 2**27, "cpu": 2**22}  # logits of a model at a time: 256 MiB in bfloat16, 16 MiB in float32
BLOCK = 8192  # classes of the weights' gradient that are rounded before they are added up in float32


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
    if reference.forward_mode([hidden_s, weight_s, *hidden_t, *weight_t, weights]):
        raise RuntimeError("fused_linear_kd has no forward mode; use kd_loss on logits.")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be mean or sum here; got {reduction!r}. For rows, use kd_loss on logits.")
    # the logits, as far as metadata goes
    student, *teachers = (
        h[..., :1].detach().expand(*h.shape[:-1], w.shape[0])
        for h, w in zip((hidden_s, *hidden_t), (weight_s, *weight_t), strict=True)
    )
    check(student, teachers, labels, temperature, alpha, weights, reduction)


def _fused(
    hidden_s, weight_s, hidden_t, weight_t, labels, weights, constants, temperature, alpha, ignore_index, reduction,
    to_hidden, to_weight,
):  # fmt: skip
    rows, classes, shape = reference.rows(hidden_s), weight_s.shape[0], hidden_s.shape
    hidden_s, *hidden_t = (h.reshape(rows, h.shape[-1]) for h in (hidden_s, *hidden_t))
    labels = None if labels is None else labels.reshape(rows)
    scale, hard = 1.0, None
    if reduction == "mean":
        scale = 1 / max(1, rows)
        if labels is not None:
            hard = rows / reference.counted(labels, ignore_index).to(reference.arithmetic([hidden_s, *hidden_t]))
    now = 1.0 if _scaled_late(hidden_s) else scale
    size = min(max(1, rows), max(1, CHUNK.get(hidden_s.device.type, CHUNK["cpu"]) // classes))
    chunks = [slice(i, min(i + size, rows)) for i in range(0, rows, size)]
    buffers = [h.new_empty(size, classes) for h in (hidden_s, *hidden_t)]
    loss = hidden_s.new_zeros((), dtype=reference.arithmetic([hidden_s, *hidden_t]))
    to_hidden = torch.empty_like(hidden_s, memory_format=torch.contiguous_format) if to_hidden else None
    summed = torch.float32 if len(chunks) > 1 and weight_s.dtype.itemsize < 4 else weight_s.dtype
    to_weight = weight_s.new_zeros(weight_s.shape, dtype=summed) if to_weight else None
    for chunk in chunks:
        logits = [b[: chunk.stop - chunk.start] for b in buffers]
        for out, hidden, weight in zip(logits, (hidden_s, *hidden_t), (weight_s, *weight_t), strict=True):
            torch.mm(hidden[chunk], weight.T, out=out)
        student, *teachers = logits
        loss += _rows(
            student, teachers, None if labels is None else labels[chunk], weights, constants, temperature, alpha,
            ignore_index, hard, in_place=to_hidden is not None or to_weight is not None,
        ).sum()  # fmt: skip
        if to_hidden is not None:
            torch.addmm(to_hidden[chunk], student, weight_s, beta=0, alpha=now, out=to_hidden[chunk])
        if to_weight is not None:
            _add_product(to_weight, student, hidden_s[chunk], now)
    student = teachers = logits = buffers = None  # before the sum is rounded to the weights' dtype
    to_hidden = hidden_s.new_empty(0) if to_hidden is None else to_hidden.view(shape)
    return loss * scale, to_hidden, weight_s.new_empty(0) if to_weight is None else to_weight.to(weight_s.dtype)


def _rows(student, teachers, labels, weights, constants, temperature, alpha, ignore_index, hard, in_place) -> Tensor:
    """Row losses; `in_place` turns the student's logits into their gradient."""
    arguments = (student, teachers, labels, weights, constants, temperature, alpha, ignore_index, 1.0, hard)
    name = backends.backend(student.device.type).name
    if name == "reference":
        loss, gradient = reference.kd_rows(*arguments)
        if in_place:
            student.copy_(gradient)
        return loss
    kernels = backends.module(student.device.type)
    if in_place:
        return kernels.kd_rows_(*arguments)
    return kernels.kd_first(*arguments, None, True, [False] * (1 + len(teachers)))[0]


def _scaled_late(hidden_s: Tensor) -> bool:
    """Whether gradients are divided by the rows in the backward: float16 holds them only times a GradScaler's factor."""
    return hidden_s.dtype == torch.float16


def _add_product(total: Tensor, gradient: Tensor, hidden: Tensor, scale: float) -> None:
    """total [C, H] += scale gradient^T hidden, of [n, C] and [n, H]."""
    if total.dtype == hidden.dtype:
        total.addmm_(gradient.T, hidden, alpha=scale)
        return
    for i in range(0, len(total), BLOCK):
        total[i : i + BLOCK].add_(gradient[:, i : i + BLOCK].T @ hidden, alpha=scale)


def _fake(hidden_s, weight_s, hidden_t, weight_t, *settings):
    *_, to_hidden, to_weight = settings
    loss = hidden_s.new_empty((), dtype=reference.arithmetic([hidden_s, *hidden_t]))
    return (
        loss,
        hidden_s.new_empty(hidden_s.shape if to_hidden else (0,)),
        weight_s.new_empty(weight_s.shape if to_weight else (0,)),
    )


def _setup(ctx, inputs, output) -> None:
    hidden_s, weight_s, hidden_t, weight_t, *settings, to_hidden, to_weight = inputs
    ctx.wanted, ctx.gradients, ctx.teachers = (to_hidden, to_weight), output[1:], len(hidden_t)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else zeros for both gradients
    mean = settings[-1] == "mean"
    ctx.late = 1 / max(1, reference.rows(hidden_s)) if mean and _scaled_late(hidden_s) else 1.0
    save(ctx, settings, hidden_s, weight_s, *hidden_t, *weight_t)


def _backward(ctx, upstream, _to_hidden, _to_weight) -> tuple:
    nothing = [None] * ctx.teachers
    if upstream is None:
        return None, None, nothing, nothing, *[None] * 9
    gradients, ctx.gradients = ctx.gradients, None
    if gradients is None:  # a second backward: the first gave them away
        gradients = _again(ctx)
    gradients = [g for g, w in zip(gradients, ctx.wanted, strict=True) if w]
    if torch.is_grad_enabled():
        sources = [upstream, *(t for t, w in zip(saved(ctx)[1], ctx.wanted, strict=False) if w)]
        gradients = [_FirstOrder.apply(g * (upstream.detach() * ctx.late), *sources) for g in gradients]
    elif ctx.late == 1:
        gradients = scaled(gradients, upstream)
    else:
        gradients = [g * (upstream * ctx.late) for g in gradients]
    found = iter(gradients)
    return *(next(found) if w else None for w in ctx.wanted), nothing, nothing, *[None] * 9


def _again(ctx) -> Sequence[Tensor]:
    settings, (hidden_s, weight_s, *tensors) = saved(ctx)
    n = ctx.teachers
    with torch.no_grad():
        return torch.ops.metadistil.fused_linear_kd(
            hidden_s, weight_s, tensors[:n], tensors[n:], *settings, *ctx.wanted
        )[1:]


class _FirstOrder(torch.autograd.Function):
    """A gradient that would depend on `sources`, if it had a derivative."""

    @staticmethod
    def forward(ctx, gradient, *sources):
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(
            "fused_linear_kd has no second derivative; use kd_loss on logits, which is differentiable twice."
        )


register(
    "fused_linear_kd(Tensor hidden_s, Tensor weight_s, Tensor[] hidden_t, Tensor[] weight_t, Tensor? labels,"
    " Tensor? weights, float[] constants, float temperature, float alpha, int ignore_index, str reduction, bool to_hidden,"
    " bool to_weight) -> (Tensor, Tensor, Tensor)",
    _fused, _fake,
)  # fmt: skip
torch.library.register_autograd("metadistil::fused_linear_kd", _backward, setup_context=_setup)
