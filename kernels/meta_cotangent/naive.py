"""Plain torch: the closed form, with zbar = sum_k w_k z_k, p = softmax(zbar / T), and R rows [C]:

    c_k = d/dz_k < d kd_loss / d z_S, u > = -alpha w_k / R p (u - <p, u>)        (row by row)

Its own derivatives are autograd's. engine/meta/walk_back.py says where it comes from.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.kernels.ops.common.numbers import arithmetic, count_rows
from engine.kernels.ops.common.teachers import mean


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
    common = (-alpha / max(1, count_rows(p))) * p * (u - (p * u).sum(-1, keepdim=True))
    return [w * common for w in weights]
