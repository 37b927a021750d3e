"""KL over averaged teacher logits plus cross-entropy, in one pass over memory, differentiable twice.

Four ops in `torch.ops.metadistil`, each of which runs the kernels of the backend of its device (`backends.py`):

    kd_loss              the loss; where a backward will follow, also its gradients: a logit is then read only once
    kd_gradients         d loss, for a backward that is itself differentiated, for a second one, and for reduction="none"
    kd_double_backward   the derivative of `kd_gradients`; its own derivative is taken by the reference
    kd_scale_            x = factor x in place, without a pass where the factor is 1
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.kernels.ops import backends, reference

REDUCTIONS = ("mean", "sum", "none")


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
    """alpha T^2 KL(softmax(zbar / T) || softmax(z_S / T)) + (1 - alpha) CE(z_S, labels), zbar = sum_k w_k z_k.

    Differentiable twice in the student and every teacher; forward mode runs by the reference. Logits are float32, bfloat16,
    float16 or float64 and may differ in dtype and strides; arithmetic and result are float32, float64 where an input is.
    w_k is 1/K unless given; a tensor [K] of weights may itself require gradient.

    `reduction` is "mean" (KL over all rows, cross-entropy over the rows whose label is not `ignore_index`), "sum" or "none"
    ([...]). An ignored label takes the cross-entropy off its row, not the KL: what should carry nothing at all, padding for
    one, is left out of the logits. A class whose teacher probability is zero adds nothing, so that models may mask classes
    by -inf; NaN or +inf in a row makes the loss NaN.

    Raises ValueError on shapes, dtypes or settings that do not fit, and IndexError, on a CPU, on a label that is out of
    range. On CUDA such a label makes the loss NaN, since to look at it would wait for the device; $ENGINE_KERNELS_CHECK=1
    has it looked at there too.
    """
    teachers = list(teachers)
    check(student, teachers, labels, temperature, weights, reduction)
    plain = backends.backend(student.device.type).name == "reference"
    if plain or reference.forward_mode([student, *teachers, *([weights] if isinstance(weights, Tensor) else [])]):
        return reference.kd_loss(
            student, teachers, labels, temperature=temperature, alpha=alpha, weights=weights, ignore_index=ignore_index,
            reduction=reduction,
        )  # fmt: skip
    teachers, weights, constants = split_weights(teachers, weights)
    inputs = (student, *teachers)
    # "none" waits for the gradient of every row, and float16 for the factor of a GradScaler, without which it underflows
    early = reduction != "none" and torch.is_grad_enabled() and all(t.dtype != torch.float16 for t in inputs)
    wanted = [early and t.requires_grad for t in inputs]
    settings = (labels, weights, constants, temperature, alpha, ignore_index, reduction)
    return torch.ops.metadistil.kd_loss(student, teachers, *settings, wanted)[0]


def check(student: Tensor, teachers: list[Tensor], labels, temperature: float, weights, reduction: str) -> None:
    """Metadata alone: nothing waits for a device."""
    reference.check_teachers(teachers, teachers if weights is None else weights)
    if student.shape != teachers[0].shape:
        raise ValueError(
            f"student logits are {tuple(student.shape)}, teachers' are {tuple(teachers[0].shape)}; they must agree."
        )
    if student.dim() == 0 or student.shape[-1] == 0:
        raise ValueError(f"logits must be [..., C] with at least one class; got {tuple(student.shape)}.")
    if any(not t.is_floating_point() for t in (student, *teachers)):
        raise ValueError(f"logits must be of a floating dtype; got {[t.dtype for t in (student, *teachers)]}.")
    if any(t.device != student.device for t in teachers):
        raise ValueError(f"logits must be on one device; got {[str(t.device) for t in (student, *teachers)]}.")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0; got {temperature}.")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be mean, sum or none; got {reduction!r}.")
    if labels is None:
        return
    if labels.dtype != torch.int64 or labels.shape != student.shape[:-1] or labels.device != student.device:
        raise ValueError(
            f"labels must be int64 {tuple(student.shape[:-1])} on {student.device}, to fit the logits; got {labels.dtype} "
            f"{tuple(labels.shape)} on {labels.device}."
        )


def split_weights(teachers: list[Tensor], weights) -> tuple[list[Tensor], Tensor | None, list[float]]:
    """For the ops: the teachers, their weights as a tensor on the device or else as numbers.

    Weights that are learned take the mean of the logits by autograd, and the ops see one teacher: at any number of
    classes that is one pass more, and derivatives of every order are right.
    """
    if isinstance(weights, Tensor):
        if weights.requires_grad and torch.is_grad_enabled():
            return [reference.mean_logits(teachers, weights)], None, [1.0]
        return teachers, weights.detach().contiguous(), [0.0] * len(teachers)
    return teachers, None, [1 / len(teachers)] * len(teachers) if weights is None else [float(w) for w in weights]


def _scales(student, teachers, labels, ignore_index: int, reduction: str) -> tuple[float, Tensor | None]:
    """Of a row's KL, and of a row's cross-entropy [], in what the reduction gives."""
    if reduction != "mean":
        return 1.0, None
    hard = None
    if labels is not None:
        hard = 1 / reference.counted(labels, ignore_index).to(reference.arithmetic([student, *teachers]))
    return 1 / max(1, reference.rows(student)), hard


def _loss(student, teachers, labels, weights, constants, temperature, alpha, ignore_index, reduction, wanted):
    soft, hard = _scales(student, teachers, labels, ignore_index, reduction)
    loss, *gradients = backends.module(student.device.type).kd_first(
        student, teachers, labels, weights, constants, temperature, alpha, ignore_index, soft, hard, None, True, wanted
    )
    return loss if reduction == "none" else loss.sum(), gradients


def _gradients(
    upstream, student, teachers, labels, weights, constants, temperature, alpha, ignore_index, reduction, wanted
):
    soft, hard = _scales(student, teachers, labels, ignore_index, reduction)
    return backends.module(student.device.type).kd_first(
        student,
        teachers,
        labels,
        weights,
        constants,
        temperature,
        alpha,
        ignore_index,
        soft,
        hard,
        upstream,
        False,
        wanted,
    )


def _second(
    upstream, student, teachers, labels, weights, constants, temperature, alpha, ignore_index, reduction, cotangents, given, wanted
):  # fmt: skip
    soft, hard = _scales(student, teachers, labels, ignore_index, reduction)
    rows, *gradients = backends.module(student.device.type).kd_second(
        upstream, student, teachers, labels, weights, constants, temperature, alpha, ignore_index, soft, hard, cotangents,
        given, wanted,
    )  # fmt: skip
    return (rows if upstream.dim() == rows.dim() else rows.sum()).to(upstream.dtype), gradients


def _scale_(tensors: list[Tensor], factor: Tensor) -> None:
    if factor.device.type == "cpu":
        if factor != 1:
            for t in tensors:
                t.mul_(factor)
    else:
        backends.module(factor.device.type).scale_(tensors, factor)


_SETTINGS = "Tensor? labels, Tensor? weights, float[] constants, float temperature, float alpha, int ignore_index, str reduction"
OPS = {
    "kd_loss": (_loss, f"(Tensor student, Tensor[] teachers, {_SETTINGS}, bool[] wanted) -> (Tensor, Tensor[])"),
    "kd_gradients": (
        _gradients,
        f"(Tensor upstream, Tensor student, Tensor[] teachers, {_SETTINGS}, bool[] wanted) -> Tensor[]",
    ),
    "kd_double_backward": (
        _second,
        f"(Tensor upstream, Tensor student, Tensor[] teachers, {_SETTINGS}, Tensor[] cotangents, bool[] given,"
        " bool[] wanted) -> (Tensor, Tensor[])",
    ),
    "kd_scale_": (_scale_, "(Tensor(a!)[] tensors, Tensor factor) -> ()"),
}
for _name, (_function, _schema) in OPS.items():
    torch.library.define(f"metadistil::{_name}", _schema)
    torch.library.impl(f"metadistil::{_name}", ("CPU", "CUDA"), _function)


def _like(inputs, wanted) -> list[Tensor]:
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t, w in zip(inputs, wanted, strict=True) if w]


@torch.library.register_fake("metadistil::kd_loss")
def _(student, teachers, labels, weights, constants, temperature, alpha, ignore_index, reduction, wanted):
    shape = student.shape[:-1] if reduction == "none" else ()
    return student.new_empty(shape, dtype=reference.arithmetic([student, *teachers])), _like(
        [student, *teachers], wanted
    )


@torch.library.register_fake("metadistil::kd_gradients")
def _(upstream, student, teachers, labels, weights, constants, temperature, alpha, ignore_index, reduction, wanted):
    return _like([student, *teachers], wanted)


@torch.library.register_fake("metadistil::kd_double_backward")
def _(
    upstream, student, teachers, labels, weights, constants, temperature, alpha, ignore_index, reduction, cotangents, given, wanted
):  # fmt: skip
    return torch.empty_like(upstream, memory_format=torch.contiguous_format), _like([student, *teachers], wanted)


@torch.library.register_fake("metadistil::kd_scale_")
def _(tensors, factor):
    pass


def _setup_loss(ctx, inputs, output) -> None:
    student, teachers, *settings, ctx.wanted = inputs
    ctx.gradients = output[1] if any(ctx.wanted) else None
    ctx.mark_non_differentiable(*output[1])
    ctx.set_materialize_grads(False)  # else zeros for every gradient
    _save(ctx, [], student, teachers, settings)


def _backward_loss(ctx, upstream, _) -> tuple:
    gradients, ctx.gradients = ctx.gradients, None
    wanted, n = _needed(ctx, 0), len(ctx.needs_input_grad)
    if gradients is None or torch.is_grad_enabled() or wanted != ctx.wanted:
        (), inputs, settings = _saved(ctx)
        gradients = torch.ops.metadistil.kd_gradients(upstream, inputs[0], inputs[1:], *settings, wanted)
    elif type(upstream) is Tensor:  # nobody else has them; a second backward computes them again
        torch.ops.metadistil.kd_scale_(gradients, upstream)
    else:  # traced for torch.compile, where outputs of the forward are not written in the backward
        gradients = [(g * upstream).to(g.dtype) for g in gradients]
    return *_placed(gradients, wanted), *[None] * (n - 2)


def _setup_gradients(ctx, inputs, output) -> None:
    upstream, student, teachers, *settings, ctx.wanted = inputs
    ctx.set_materialize_grads(False)
    _save(ctx, [upstream], student, teachers, settings)


def _backward_gradients(ctx, cotangents) -> tuple:
    [upstream], inputs, settings = _saved(ctx)
    wanted, n = _needed(ctx, 1), len(ctx.needs_input_grad)
    found = iter(cotangents)
    cotangents = [next(found) if w else None for w in ctx.wanted]
    given = [c is not None for c in cotangents]
    if not any(given):
        return (None, None, [None] * (len(inputs) - 1), *[None] * 8)
    to_upstream, gradients = torch.ops.metadistil.kd_double_backward(
        upstream, inputs[0], inputs[1:], *settings, [c for c in cotangents if c is not None], given, wanted
    )
    return to_upstream, *_placed(gradients, wanted), *[None] * (n - 3)


def _setup_second(ctx, inputs, output) -> None:
    upstream, student, teachers, *settings, cotangents, ctx.given, ctx.wanted = inputs
    _save(ctx, [upstream, *cotangents], student, teachers, settings)


def _backward_second(ctx, *arriving) -> tuple:
    """By the reference, which has derivatives of every order; nothing in training takes this one."""
    (upstream, *cotangents), inputs, settings = _saved(ctx)
    labels, weights, constants, temperature, alpha, ignore_index, reduction = settings

    def loss(student: Tensor, *teachers: Tensor) -> Tensor:
        return reference.kd_loss(
            student, teachers, labels, temperature=temperature, alpha=alpha, ignore_index=ignore_index,
            weights=constants if weights is None else weights, reduction=reduction,
        )  # fmt: skip

    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        upstream, *inputs = (reference.leaf(t) for t in (upstream, *inputs))
        cotangents = [reference.leaf(t) for t in cotangents]
        found = iter(cotangents)
        full = [next(found) if g else torch.zeros_like(t) for t, g in zip(inputs, ctx.given, strict=True)]
        to_upstream, *gradients = reference.kd_second(inputs, loss, upstream, full)
        outputs = [to_upstream, *(g for g, w in zip(gradients, ctx.wanted, strict=True) if w)]
        sources = [upstream, *inputs, *cotangents]
        found = torch.autograd.grad(
            outputs, sources, [arriving[0], *arriving[1]], create_graph=create_graph, allow_unused=True
        )
    to_upstream, student, *rest = found
    teachers, to_cotangents = rest[: len(inputs) - 1], rest[len(inputs) - 1 :]
    return to_upstream, student, list(teachers), *[None] * 7, list(to_cotangents), None, None


def _save(ctx, more: list[Tensor], student: Tensor, teachers: list[Tensor], settings: list) -> None:
    labels, weights, *ctx.settings = settings
    ctx.counts = len(more), labels is not None, weights is not None
    ctx.save_for_backward(*more, *(t for t in (labels, weights) if t is not None), student, *teachers)


def _saved(ctx) -> tuple[list[Tensor], list[Tensor], list]:
    tensors = iter(ctx.saved_tensors)
    more, labelled, weighted = ctx.counts
    more = [next(tensors) for _ in range(more)]
    labels, weights = (next(tensors) if given else None for given in (labelled, weighted))
    return more, list(tensors), [labels, weights, *ctx.settings]


def _needed(ctx, place: int) -> list[bool]:
    """Which of student and teachers take a gradient."""
    return [ctx.needs_input_grad[place], *ctx.needs_input_grad[place + 1]]


def _placed(gradients: list[Tensor], wanted: list[bool]) -> tuple[Tensor | None, list[Tensor | None]]:
    found = iter(gradients)
    student, *teachers = [next(found) if w else None for w in wanted]
    return student, teachers


for _name, _backward, _setup in (
    ("kd_loss", _backward_loss, _setup_loss),
    ("kd_gradients", _backward_gradients, _setup_gradients),
    ("kd_double_backward", _backward_second, _setup_second),
):
    torch.library.register_autograd(f"metadistil::{_name}", _backward, setup_context=_setup)
