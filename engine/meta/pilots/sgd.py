"""Plain SGD: phi' = phi - eta g, so d = -eta v' and v_phi = v' + H d."""

from __future__ import annotations

from torch import Tensor

from engine.meta.pilots import PilotRule
from engine.meta.time_machine import TimeMachine
from engine.params.vectors import Vector


class SGD:
    """phi' = phi - lr g."""

    def __init__(self, lr: float):
        self.lr = lr

    def begin(self) -> None:
        pass

    def advance(self, step: int, gradient: Vector, time_machine: TimeMachine) -> None:
        time_machine.advance(gradient, -self.lr, step)

    def pull_back(self, step: int, v: Vector) -> tuple[Vector, Vector]:
        return v.scaled(-self.lr), v

    def update(self, step: int, weights: dict[str, Tensor], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: p - self.lr * gradients[name] for name, p in weights.items()}


PILOT = PilotRule(make=lambda lr, student, learner: SGD(lr), help="plain SGD")
