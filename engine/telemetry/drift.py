"""How far a teacher has gone from where it started, without keeping where that was."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

WIDTH = 1 << 16  # numbers that are kept; the distance is then right to within a standard deviation of 0.3 %
PLACES = 1 << 20  # of the table of signs, at one of which those of a row of weights begin


@torch.no_grad()
def sketch(weights: Tensor) -> Tensor:
    """[n] -> [WIDTH] in float32: sums of the weights with random signs that depend on the place alone.

    A count sketch (Charikar, Chen and Farach-Colton, 2002), linear in the weights, so that the norm of a difference of two
    sketches estimates that of the weights' difference, without bias in its square, and exactly where n <= WIDTH.
    scikit-learn's (PolynomialCountSketch) is for the CPU; this one stays on the device.
    """
    total, signs = torch.zeros(WIDTH, device=weights.device), _signs(weights.device)
    rows = weights.split(WIDTH)
    places = torch.randint(PLACES, (len(rows),), generator=torch.Generator().manual_seed(1)).tolist()
    for at, part in zip(places, rows, strict=True):
        total[: len(part)].addcmul_(part.float(), signs[at : at + len(part)])
    return total


def drift(start: Tensor, now: Tensor) -> Tensor:
    """Two sketches -> [] on the device: the distance between their weights as a part of the norm at the start."""
    return (now - start).norm() / start.norm()


@cache
def _signs(device: torch.device) -> Tensor:
    """[PLACES + WIDTH] of -1 and 1, the same on every device."""
    bits = torch.randint(2, (PLACES + WIDTH,), generator=torch.Generator().manual_seed(0))
    return (2.0 * bits - 1.0).to(device)
