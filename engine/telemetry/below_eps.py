"""How much of a gradient is smaller than the eps that its optimizer divides by.

AdamW moves a weight by lr m / (sqrt(v) + eps). Where a gradient stays below eps, that is lr g / eps: the step no longer has the size of
the learning rate, but follows the gradient's. A meta-gradient is proportional to the pilot's learning rate, and so may be that small.
"""

from __future__ import annotations

import torch
from torch import Tensor

SAMPLE = (
    1 << 14
)  # entries that are looked at, evenly spaced; their share is then right to within a standard deviation of 0.4 %


@torch.no_grad()
def count_below(gradient: Tensor, eps: float, clip: Tensor | None = None) -> Tensor:
    """[N], times the device scalar `clip`, -> [2] int64 on the device: how many of a sample's entries are not 0, and how many of those
    are below eps. The zeros are of weights that the batch did not reach, as most rows of an embedding."""
    # an odd stride, so that the sample does not follow a column of the matrices
    sizes = gradient[:: (len(gradient) // SAMPLE) | 1].abs()
    if clip is not None:
        sizes = sizes * clip
    reached = sizes > 0
    return torch.stack([reached.sum(), (reached & (sizes < eps)).sum()])
