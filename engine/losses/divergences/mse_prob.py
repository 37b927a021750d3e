"""T^2 mean_{B,C} (softmax(zbar / T) - softmax(z_S / T))^2, as in MetaDistil's public code."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from engine.losses.divergences import Divergence


def soft(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    student_p = F.softmax(student / temperature, -1)
    return temperature**2 * (student_p - F.softmax(teacher / temperature, -1)).square().mean()


DIVERGENCE = Divergence(soft=soft, help="T^2 times the mean squared difference of the softened probabilities")
