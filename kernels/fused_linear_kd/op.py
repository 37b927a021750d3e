"""`fused_linear_kd` as an op of `torch.library`: a forward that has the gradients when it ends, and what autograd does with them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.kernels.ops.common import backends
from engine.kernels.ops.common.autograd import save, saved
from engine.kernels.ops.common.library import register
from engine.kernels.ops.common.numbers import arithmetic, count_labels, count_rows
from engine.kernels.ops.common.scaling import scaled

CHUNK = {"cuda": 2**27, "cpu": 2**22}  # logits of a model at a time: 256 MiB in bfloat16, 16 MiB in float32
BLOCK = 8192  # classes of the weights' gradient that are rounded before they are added up in float32


def _fused(
    hidden_s, weight_s, hidden_t, weight_t, labels, weights, constants, temperature, alpha, ignore_index, reduction,
    to_hidden, to_weight,
):  # fmt: skip
    rows, classes, shape = count_rows(hidden_s), weight_s.shape[0], hidden_s.shape
    hidden_s, *hidden_t = (h.reshape(rows, h.shape[-1]) for h in (hidden_s, *hidden_t))
    labels = None if labels is None else labels.reshape(rows)
    scale, hard = 1.0, None
    if reduction == "mean":
        scale = 1 / max(1, rows)
        if labels is not None:
            hard = rows / count_labels(labels, ignore_index).to(arithmetic([hidden_s, *hidden_t]))
    now = 1.0 if _scaled_late(hidden_s) else scale
    size = min(max(1, rows), max(1, CHUNK.get(hidden_s.device.type, CHUNK["cpu"]) // classes))
    chunks = [slice(i, min(i + size, rows)) for i in range(0, rows, size)]
    buffers = [h.new_empty(size, classes) for h in (hidden_s, *hidden_t)]
    loss = hidden_s.new_zeros((), dtype=arithmetic([hidden_s, *hidden_t]))
    to_hidden = torch.empty_like(hidden_s, memory_format=torch.contiguous_format) if to_hidden else None
    summed = torch.float32 if len(chunks) > 1 and weight_s.dtype.itemsize < 4 else weight_s.dtype
    to_weight = weight_s.new_zeros(weight_s.shape, dtype=summed) if to_weight else None
    kernels = backends.module("fused_linear_kd", hidden_s.device.type)
    for chunk in chunks:
        logits = [b[: chunk.stop - chunk.start] for b in buffers]
        for out, hidden, weight in zip(logits, (hidden_s, *hidden_t), (weight_s, *weight_t), strict=True):
            torch.mm(hidden[chunk], weight.T, out=out)
        student, *teachers = logits
        loss += kernels.kd_rows(
            student, teachers, None if labels is None else labels[chunk], weights, constants, temperature, alpha,
            ignore_index, 1.0, hard, in_place=to_hidden is not None or to_weight is not None,
        ).sum()  # fmt: skip
        if to_hidden is not None:
            torch.addmm(to_hidden[chunk], student, weight_s, beta=0, alpha=now, out=to_hidden[chunk])
        if to_weight is not None:
            _add_product(to_weight, student, hidden_s[chunk], now)
    student = teachers = logits = buffers = None  # before the sum is rounded to the weights' dtype
    to_hidden = hidden_s.new_empty(0) if to_hidden is None else to_hidden.view(shape)
    return loss * scale, to_hidden, weight_s.new_empty(0) if to_weight is None else to_weight.to(weight_s.dtype)


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
    loss = hidden_s.new_empty((), dtype=arithmetic([hidden_s, *hidden_t]))
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
    ctx.late = 1 / max(1, count_rows(hidden_s)) if mean and _scaled_late(hidden_s) else 1.0
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
