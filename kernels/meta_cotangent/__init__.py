"""c_k = d/dz_k < d loss / d z_S, u >, in closed form and one pass: what the meta-gradient sends to each teacher's logits.

For `kd_loss` with the mean over R rows, p = softmax(zbar / T):  c_k = -alpha w_k / R p (u - <p, u>), row by row. Its
cross-entropy carries none. engine/meta/walk_back.py says where it comes from.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.kernels.ops.common import backends
from engine.kernels.ops.common.autograd import forward_mode, leaf, save, saved, traced
from engine.kernels.ops.common.checks import check_logits
from engine.kernels.ops.common.library import register
from engine.kernels.ops.common.numbers import arithmetic, count_rows
from engine.kernels.ops.common.teachers import split_weights, together
from engine.kernels.ops.meta_cotangent import naive


def meta_cotangent(
    student: Tensor,  # [..., C] logits; the closed form needs their shape alone
    teachers: Sequence[Tensor],  # K x [..., C] logits
    tangent: Tensor,  # [..., C] u = J_S d, the change of the student's logits as its weights move along d
    *,
    temperature: float,
    alpha: float,
    weights: Sequence[float] | Tensor | None = None,
) -> list[Tensor]:
    """c_k for every teacher, K x [..., C] in float32 (float64 where an input is), differentiable in teachers and tangent.

    For a pilot step phi - eta dloss/dphi and a quiz gradient v, the direction is d = -eta v. Raises ValueError on shapes,
    dtypes or settings that do not fit.
    """
    teachers, weights = list(teachers), together(weights)
    check_logits(student, teachers, None, temperature, alpha, weights, "mean")
    if tangent.shape != student.shape or tangent.device != student.device or not tangent.is_floating_point():
        raise ValueError(
            f"the tangent is {tangent.dtype} {tuple(tangent.shape)} on {tangent.device}, the logits are "
            f"{tuple(student.shape)} on {student.device}; they must agree, in a floating dtype."
        )
    settings = {"temperature": temperature, "alpha": alpha}
    plain = backends.backend(student.device.type).name == "reference"
    learned = isinstance(weights, Tensor) and weights.requires_grad and torch.is_grad_enabled()
    if plain or learned or forward_mode([tangent, *teachers, weights]):
        return naive.meta_cotangent(teachers, tangent, weights=weights, **settings)
    teachers, weights, constants = split_weights(student, teachers, weights)
    arguments = (teachers, tangent, weights, constants, temperature, alpha)
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in (tangent, *teachers))
    if differentiated or traced([tangent, *teachers]):
        return torch.ops.metadistil.meta_cotangent(*arguments)
    return _meta_cotangent(*arguments)


def _meta_cotangent(teachers, tangent, weights, constants, temperature, alpha):
    kernels = backends.module("meta_cotangent", tangent.device.type)
    factor = -alpha / max(1, count_rows(tangent))
    return kernels.kd_cotangent(teachers, tangent, weights, constants, temperature, factor)


def _setup(ctx, inputs, output) -> None:
    teachers, tangent, *settings = inputs
    save(ctx, (None, *settings), tangent, *teachers)


def _backward(ctx, arriving) -> tuple:
    """By the reference, which has derivatives of every order; nothing in training takes this one."""
    (_, weights, constants, temperature, alpha), tensors = saved(ctx)
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        tangent, *teachers = (leaf(t) for t in tensors)
        found = naive.meta_cotangent(
            teachers, tangent, temperature=temperature, alpha=alpha, weights=constants if weights is None else weights
        )
        to_tangent, *to_teachers = torch.autograd.grad(
            found, [tangent, *teachers], arriving, create_graph=create_graph
        )  # fmt: skip
    return to_teachers, to_tangent, None, None, None, None


def _fake(teachers, tangent, weights, constants, temperature, alpha):
    dtype = arithmetic([tangent, *teachers])
    return [torch.empty(t.shape, dtype=dtype, device=t.device) for t in teachers]


register(
    "meta_cotangent(Tensor[] teachers, Tensor tangent, Tensor? weights, float[] constants, float temperature, float alpha)"
    " -> Tensor[]",
    _meta_cotangent, _fake,
)  # fmt: skip
torch.library.register_autograd("metadistil::meta_cotangent", _backward, setup_context=_setup)
