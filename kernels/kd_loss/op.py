"""`kd_loss` as ops of `torch.library` and as functions of autograd, over the row functions of a backend.

    kd_loss              the loss; where a backward will follow, also its gradients: a logit is then read only once
    kd_gradients         d loss, for a backward that is itself differentiated, for a second one, and for reduction="none"
    kd_double_backward   the derivative of `kd_gradients`; its own derivative is taken by the reference

The ops, in `torch.ops.metadistil`, are what a tracer sees. Where nothing is traced, what stands behind them is called:
for [32, 2] logits on a CPU, loss and gradient took 150 us through the dispatcher and 56 us without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.kernels.ops.common import backends
from engine.kernels.ops.common.autograd import leaf, placed, save, saved, traced
from engine.kernels.ops.common.library import SETTINGS, Settings, below, like, register
from engine.kernels.ops.common.numbers import arithmetic, scales
from engine.kernels.ops.common.scaling import scaled
from engine.kernels.ops.kd_loss import naive


def loss(student: Tensor, teachers: Sequence[Tensor], settings: Settings, wanted: list[bool]) -> Tensor:
    """[] or, for reduction="none", [...]; `wanted` says for which of student and teachers a gradient comes with it."""
    if traced([student, *teachers]):
        return torch.ops.metadistil.kd_loss(student, list(teachers), *settings, wanted)[0]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (student, *teachers)):
        return _Loss.apply(_loss, settings, wanted, student, *teachers)[0]
    return _loss(student, teachers, *settings, wanted)[0]


def _rows(kernel: str, student, teachers, settings, *more, before=()) -> list[Tensor]:
    *given, reduction = settings
    kernels = backends.module("kd_loss", student.device.type)
    if kernels is naive:
        raise ValueError("the reference has no ops of its own; call engine.kernels, which takes it where it must.")
    factors = scales([student, *teachers], given[0], given[-1], reduction)
    return getattr(kernels, kernel)(*before, student, teachers, *given, *factors, *more)


def _loss(student, teachers, *settings):
    *settings, wanted = settings
    rows, *gradients = _rows("kd_first", student, teachers, settings, None, True, wanted)
    return rows if settings[-1] == "none" else rows.sum(), gradients


def _gradients(upstream, student, teachers, *settings):
    *settings, wanted = settings
    return _rows("kd_first", student, teachers, settings, upstream, False, wanted)


def _double_backward(upstream, student, teachers, *settings):
    *settings, cotangents, given, wanted = settings
    rows, *gradients = _rows(
        "kd_second", student, teachers, settings, cotangents, given, wanted, before=(upstream,)
    )  # fmt: skip
    return (rows if upstream.dim() == rows.dim() else rows.sum()).to(upstream.dtype), gradients


class _Loss(torch.autograd.Function):
    """run, settings, wanted, student, teachers -> loss, gradients."""

    @staticmethod
    def forward(ctx, run: Callable, settings: Settings, wanted: list[bool], *inputs: Tensor):
        found, gradients = run(inputs[0], list(inputs[1:]), *settings, wanted)
        ctx.wanted, ctx.gradients = wanted, gradients if any(wanted) else None
        save(ctx, settings, *inputs)
        ctx.mark_non_differentiable(*gradients)
        ctx.set_materialize_grads(False)  # else zeros for every gradient
        return found, *gradients

    @staticmethod
    def backward(ctx, upstream: Tensor | None, *_):
        if upstream is None:
            return (None,) * len(ctx.needs_input_grad)
        gradients, ctx.gradients = ctx.gradients, None
        wanted = list(ctx.needs_input_grad[3:])
        if gradients is None or torch.is_grad_enabled() or wanted != ctx.wanted:
            settings, inputs = saved(ctx)
            if traced([upstream, *inputs]):
                arguments = (upstream, inputs[0], inputs[1:], *settings, wanted)
                gradients = torch.ops.metadistil.kd_gradients(*arguments)
            else:
                gradients = _Gradients.apply(_gradients, settings, wanted, upstream, *inputs)
        else:  # a second backward computes them again
            gradients = scaled(gradients, upstream)
        return None, None, None, *placed(gradients, wanted)


class _Gradients(torch.autograd.Function):
    """run, settings, wanted, upstream, student, teachers -> gradients."""

    @staticmethod
    def forward(ctx, run: Callable, settings: Settings, wanted: list[bool], upstream: Tensor, *inputs: Tensor):
        ctx.wanted = wanted
        save(ctx, settings, upstream, *inputs)
        ctx.set_materialize_grads(False)
        return tuple(run(upstream, inputs[0], list(inputs[1:]), *settings, wanted))

    @staticmethod
    def backward(ctx, *cotangents: Tensor | None):
        if all(c is None for c in cotangents):
            return (None,) * len(ctx.needs_input_grad)
        settings, (upstream, *inputs) = saved(ctx)
        wanted, given = list(ctx.needs_input_grad[4:]), [c is not None for c in placed(cotangents, ctx.wanted)]
        cotangents = [c for c in cotangents if c is not None]
        if traced([upstream, *inputs, *cotangents]):
            arguments = (upstream, inputs[0], inputs[1:], *settings, cotangents, given, wanted)
            to_upstream, gradients = torch.ops.metadistil.kd_double_backward(*arguments)
        else:
            to_upstream, *gradients = _DoubleBackward.apply(
                _double_backward, settings, given, wanted, upstream, *inputs, *cotangents
            )
        return None, None, None, to_upstream, *placed(gradients, wanted)


class _DoubleBackward(torch.autograd.Function):
    """run, settings, given, wanted, upstream, student, teachers, cotangents -> to the upstream, to the inputs wanted."""

    @staticmethod
    def forward(ctx, run: Callable, settings: Settings, given: list[bool], wanted: list[bool], upstream, *tensors):
        ctx.given, ctx.wanted = given, wanted
        save(ctx, settings, upstream, *tensors)
        student, *teachers = tensors[: len(given)]
        to_upstream, gradients = run(
            upstream, student, teachers, *settings, list(tensors[len(given) :]), given, wanted
        )  # fmt: skip
        return to_upstream, *gradients

    @staticmethod
    def backward(ctx, *arriving: Tensor):
        """By the reference, which has derivatives of every order; nothing in training takes this one."""
        (labels, weights, constants, temperature, alpha, ignore_index, reduction), tensors = saved(ctx)

        def loss(student: Tensor, *teachers: Tensor) -> Tensor:
            return naive.kd_loss(
                student, teachers, labels, temperature=temperature, alpha=alpha, ignore_index=ignore_index,
                weights=constants if weights is None else weights, reduction=reduction,
            )  # fmt: skip

        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            sources = [leaf(t) for t in tensors]
            upstream, inputs, cotangents = sources[0], sources[1 : 1 + len(ctx.given)], sources[1 + len(ctx.given) :]
            full = [
                torch.zeros_like(t) if c is None else c
                for t, c in zip(inputs, placed(cotangents, ctx.given), strict=True)
            ]
            to_upstream, *gradients = naive.kd_second(inputs, loss, upstream, full)
            outputs = [to_upstream, *(g for g, w in zip(gradients, ctx.wanted, strict=True) if w)]
            found = torch.autograd.grad(outputs, sources, arriving, create_graph=create_graph, allow_unused=True)
        return None, None, None, None, *found


def _autograd_loss(student, teachers, *settings):
    *settings, wanted = settings
    found, *gradients = _Loss.apply(below("kd_loss"), tuple(settings), wanted, student, *teachers)
    return found, gradients


def _autograd_gradients(upstream, student, teachers, *settings):
    *settings, wanted = settings
    run = below("kd_gradients")
    return list(_Gradients.apply(run, tuple(settings), wanted, upstream, student, *teachers))


def _autograd_double_backward(upstream, student, teachers, *settings):
    *settings, cotangents, given, wanted = settings
    run = below("kd_double_backward")
    to_upstream, *gradients = _DoubleBackward.apply(
        run, tuple(settings), given, wanted, upstream, student, *teachers, *cotangents
    )  # fmt: skip
    return to_upstream, gradients


def _fake_loss(student, teachers, *settings):
    *settings, wanted = settings
    shape = student.shape[:-1] if settings[-1] == "none" else ()
    inputs = [student, *teachers]
    return student.new_empty(shape, dtype=arithmetic(inputs)), like(inputs, wanted)


def _fake_gradients(upstream, student, teachers, *settings):
    return like([student, *teachers], settings[-1])


def _fake_double_backward(upstream, student, teachers, *settings):
    to_upstream = torch.empty_like(upstream, memory_format=torch.contiguous_format)
    return to_upstream, like([student, *teachers], settings[-1])


register(
    f"kd_loss(Tensor student, Tensor[] teachers, {SETTINGS}, bool[] wanted) -> (Tensor, Tensor[])",
    _loss, _fake_loss, _autograd_loss,
)  # fmt: skip
register(
    f"kd_gradients(Tensor upstream, Tensor student, Tensor[] teachers, {SETTINGS}, bool[] wanted) -> Tensor[]",
    _gradients, _fake_gradients, _autograd_gradients,
)  # fmt: skip
register(
    f"kd_double_backward(Tensor upstream, Tensor student, Tensor[] teachers, {SETTINGS}, Tensor[] cotangents, bool[] given,"
    " bool[] wanted) -> (Tensor, Tensor[])",
    _double_backward, _fake_double_backward, _autograd_double_backward,
)  # fmt: skip
