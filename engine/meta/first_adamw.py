"""The first step of a new AdamW, not differentiated: the pilot of ReptileDistil (engine.meta.reptile)."""

from __future__ import annotations

import torch

from engine.meta.pilots.adamw import AdamW
from engine.meta.time_machine import TimeMachine
from engine.models.learner import Learner
from engine.models.network import Network
from engine.params.flat import FlatParameters
from engine.params.vectors import Vector


class FirstAdamW(AdamW):
    """The first step that a new AdamW with the settings of `optimizer` takes from a gradient clipped to `max_grad_norm`:

        phi' = phi - lr (g / (|g| + eps) + w phi)

    since moments of zero, corrected, are g and g^2. Not differentiated: `pull_back` raises TypeError.
    """

    def __init__(self, lr: float, flat: FlatParameters, optimizer: torch.optim.Optimizer, max_grad_norm: float | None):
        super().__init__(lr, flat, optimizer)
        self.max_grad_norm = max_grad_norm

    @torch.no_grad()
    def begin(self) -> None:
        self._settle()

    @torch.no_grad()
    def advance(self, step: int, gradient: Vector, time_machine: TimeMachine) -> None:
        if self.max_grad_norm is not None:
            gradient = gradient.scaled((self.max_grad_norm / (gradient.norm() + 1e-6)).clamp(max=1.0))
        g = self._whole(gradient)
        move = (g / (g.abs() + self.eps)).addcmul_(self.decay, self.flat.weights)
        time_machine.advance(self._vector(move), -self.lr, step)

    def pull_back(self, step: int, v: Vector) -> tuple[Vector, Vector]:
        raise TypeError("FirstAdamW is a step that is not differentiated; a meta-gradient needs SGD or AdamW.")


def first_adamw(lr: float, student: Network, learner: Learner | None) -> FirstAdamW:
    """With the settings and the clipping of the learner. Raises ValueError where there is none."""
    if learner is None:
        raise ValueError("teachers that follow the student need the student's own optimizer; give student_optimizer.")
    return FirstAdamW(lr, student.flat, learner.optimizer, learner.max_grad_norm)
