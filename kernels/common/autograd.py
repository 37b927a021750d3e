"""How the ops stand in autograd: who has to see an op, which way a derivative runs, what is saved for a backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from engine.kernels.ops.common.library import Settings

PLAIN = {Tensor, torch.nn.Parameter}


def traced(tensors: Sequence[Tensor]) -> bool:
    """Whether a compiler, or a tensor that only stands for one, has to see the op."""
    return torch.compiler.is_compiling() or any(type(t) not in PLAIN for t in tensors)


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


def save(ctx, settings: Settings, *tensors: Tensor) -> None:
    """For `saved`. What was made in inference mode cannot be saved, nor be part of a graph: it is kept as it is."""
    labels, weights, *ctx.numbers = settings
    ctx.kept = [labels, weights, *tensors]
    ctx.places = [i for i, t in enumerate(ctx.kept) if t is not None and not t.is_inference()]
    ctx.save_for_backward(*(ctx.kept[i] for i in ctx.places))
    for i in ctx.places:
        ctx.kept[i] = None


def saved(ctx) -> tuple[Settings, list[Tensor]]:
    found = list(ctx.kept)
    for i, t in zip(ctx.places, ctx.saved_tensors, strict=True):
        found[i] = t
    labels, weights, *tensors = found
    return (labels, weights, *ctx.numbers), tensors


def placed(found: Sequence[Tensor], flags: Sequence[bool]) -> list[Tensor | None]:
    rest = iter(found)
    return [next(rest) if flag else None for flag in flags]
