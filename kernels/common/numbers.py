"""What a loss of rows is computed in, and what it is divided by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def arithmetic(tensors: Sequence[Tensor]) -> torch.dtype:
    """What to compute in: float64 where a tensor is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def count_rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def count_labels(labels: Tensor, ignore_index: int) -> Tensor:
    """How many labels [] count in a mean: those that are not ignored, one at least."""
    return (labels != ignore_index).sum().clamp_min(1)


def scales(
    inputs: Sequence[Tensor],  # [..., C] logits, of which dtype and number of rows matter
    labels: Tensor | None,  # [...]
    ignore_index: int,
    reduction: str,
) -> tuple[float, Tensor | None]:
    """What a row's KL and a row's cross-entropy [] are multiplied by before the sum; None is 1."""
    if reduction != "mean":
        return 1.0, None
    hard = None if labels is None else 1 / count_labels(labels, ignore_index).to(arithmetic(inputs))
    return 1 / max(1, count_rows(inputs[0])), hard
