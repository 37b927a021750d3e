"""Several teachers as one: their weights, and the mean of their logits, zbar = sum_k w_k z_k."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.kernels.ops.common.checks import check_teachers
from engine.kernels.ops.common.numbers import arithmetic


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


def together(weights) -> Sequence[float] | Tensor | None:
    """A list that holds tensors [] as one tensor [K]."""
    if weights is None or isinstance(weights, Tensor) or not any(isinstance(w, Tensor) for w in weights):
        return weights
    first = next(w for w in weights if isinstance(w, Tensor))
    return torch.stack([torch.as_tensor(w, dtype=first.dtype, device=first.device) for w in weights])


def split_weights(student: Tensor, teachers: list[Tensor], weights) -> tuple[list[Tensor], Tensor | None, list[float]]:
    """For the ops: the teachers, their weights as a tensor on the device or else as numbers.

    Weights that are learned take the mean of the logits by autograd, and the ops see one teacher: at any number of
    classes that is one pass more, and derivatives of every order are right.
    """
    if isinstance(weights, Tensor):
        if weights.requires_grad and torch.is_grad_enabled():
            return [mean(teachers, weights, arithmetic([student, *teachers]))], None, [1.0]
        return teachers, weights.detach().contiguous(), [0.0] * len(teachers)
    return teachers, None, [1 / len(teachers)] * len(teachers) if weights is None else [float(w) for w in weights]
