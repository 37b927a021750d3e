"""Plain torch: what becomes of a chunk of rows once its logits are there. With a, b the scales of soft and hard rows:

loss   = a alpha T^2 KL(p || q) + b (1 - alpha) CE(z_S, label)
dz_S   = a alpha T (q - p) + b (1 - alpha) (softmax(z_S) - onehot(label))        (row by row)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.ops.common.numbers import arithmetic
from engine.kernels.ops.common.teachers import mean
from engine.kernels.ops.kd_loss.naive import cross_entropy


def kd_rows(
    student: Tensor,  # [R, C]
    teachers: Sequence[Tensor],  # K x [R, C]
    labels: Tensor | None,  # [R]
    weights: Tensor | None,  # [K]
    constants: Sequence[float],  # K
    temperature: float,
    alpha: float,
    ignore_index: int,
    soft_scale: float,
    hard_scale: Tensor | None,  # []
    in_place: bool,
) -> Tensor:
    """Row losses [R]; `in_place` writes the student's gradient over its logits."""
    dtype = arithmetic([student, *teachers])
    averaged, s = mean(teachers, constants if weights is None else weights, dtype), student.to(dtype)
    log_p, log_q = F.log_softmax(averaged / temperature, -1), F.log_softmax(s / temperature, -1)
    p = log_p.exp()
    distance = torch.where(p == 0, 0.0, log_p - log_q)
    loss = soft_scale * alpha * temperature**2 * (p * distance).sum(-1)
    gradient = soft_scale * alpha * temperature * (log_q.exp() - p)
    if labels is not None:
        counts, inside = labels != ignore_index, (labels >= 0) & (labels < s.shape[-1])
        scale = (1 - alpha) * (s.new_ones(()) if hard_scale is None else hard_scale)  # a number would be a float32
        scale = torch.where(inside, scale, torch.nan)
        loss = loss + torch.where(counts, scale * cross_entropy(s, labels, ignore_index), 0.0)
        log_q1, label = F.log_softmax(s, -1), torch.where(counts & inside, labels, 0).unsqueeze(-1)
        hard = log_q1.exp().scatter_add_(-1, label, torch.full_like(label, -1, dtype=dtype))
        gradient += torch.where(counts.unsqueeze(-1), scale.unsqueeze(-1) * hard, 0.0)
    if in_place:
        student.copy_(gradient)
    return loss
