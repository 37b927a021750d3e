"""The losses a student is trained on: hard (labels), soft (averaged teacher logits), and both (methods 1 and 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels import kd_loss, mean_logits, meta_cotangent

SoftLoss = Literal["kl", "mse_prob", "mse_logits"]


@dataclass(frozen=True)
class Objective:
    """L = alpha soft(student, mean of teachers) + (1 - alpha) hard(student, labels), mean over the batch.

    kl          T^2 KL(softmax(zbar/T) || softmax(z_S/T)), summed over classes     (Hinton et al. 2015)
    mse_prob    T^2 mean_{B,C} (softmax(zbar/T) - softmax(z_S/T))^2                 (MetaDistil's public code)
    mse_logits  mean_{B,C} (zbar - z_S)^2

    hard is cross-entropy, or the squared error of the one output in a regression.
    """

    soft_loss: SoftLoss = "kl"
    temperature: float = 5.0
    alpha: float = 0.5
    regression: bool = False

    def __post_init__(self):
        if self.regression and self.soft_loss != "mse_logits":
            raise ValueError(f"{self.soft_loss} is constant for the one output of a regression; use mse_logits.")

    def hard(self, student: Tensor, labels: Tensor) -> Tensor:
        """Mean hard loss of logits [B, C] (regression: [B, 1]) against labels [B]."""
        if self.regression:
            return _mean_square(student.squeeze(-1) - labels)
        return F.cross_entropy(student, labels)

    def distil(self, student: Tensor, teachers: Sequence[Tensor], labels: Tensor) -> Tensor:
        """The whole loss of student logits [B, C] given K teachers' logits [B, C]; differentiable twice in all of them."""
        if self.soft_loss == "kl":
            return kd_loss(student, teachers, labels, temperature=self.temperature, alpha=self.alpha)
        mean = mean_logits(teachers)
        if self.soft_loss == "mse_logits":
            soft = _mean_square(student - mean)
        else:
            scale = self.temperature**2
            student_p, mean_p = F.softmax(student / self.temperature, -1), F.softmax(mean / self.temperature, -1)
            soft = scale * _mean_square(student_p - mean_p)
        return self.alpha * soft + (1 - self.alpha) * self.hard(student, labels)

    def cotangents(
        self, student: Tensor, teachers: Sequence[Tensor], labels: Tensor, tangent: Tensor, pilot_lr: float
    ) -> list[Tensor]:
        """c_k = -pilot_lr d/dz_k < dL/dz_S, u > for every teacher's logits [B, C], u the student's tangent [B, C].

        The closed form for `kl`; for the others autograd at the head alone, on tensors of [B, C].
        """
        if self.soft_loss == "kl":
            return meta_cotangent(
                student, teachers, tangent, temperature=self.temperature, alpha=self.alpha, pilot_lr=pilot_lr
            )
        with torch.enable_grad():
            student = student.detach().requires_grad_()
            teachers = [z.detach().requires_grad_() for z in teachers]
            (slope,) = torch.autograd.grad(self.distil(student, teachers, labels), student, create_graph=True)
            return list(torch.autograd.grad((slope * tangent).sum() * -pilot_lr, teachers))


def _mean_square(x: Tensor) -> Tensor:
    # not F.mse_loss: its backward fails on forward-mode duals one of whose sides has no tangent (torch 2.13)
    return x.square().mean()
