"""The pilot's update rules, and their derivatives: how the student moves before the quiz, how the quiz loss walks back.

Every rule is elementwise in the gradient g, phi' = phi - eta a(g), so the derivative of a step has a closed form: from v', the
cotangent of phi', it gives d, the direction along which the student's directional derivative goes, and what v_phi is but for
H d, with H the Hessian of the pilot loss. There is no clipping in a pilot step.

Imports the time machine and what stands below meta/. Another rule is one file here with a class of the protocol below that ends in

    PILOT = PilotRule(make=..., help="...")

`--pilot-optimizer` takes it from there; it also takes the path of a file, and entry points of the group `metadistil.pilots`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from engine.meta.time_machine import TimeMachine
from engine.models.learner import Learner
from engine.models.network import Network
from engine.params.vectors import Vector
from engine.plugins import PILOTS

__all__ = ["PILOTS", "Pilot", "PilotRule"]


class Pilot(Protocol):
    """An update rule, for a round of steps."""

    def begin(self) -> None:
        """A new round, from the student's present state."""

    def advance(self, step: int, gradient: Vector, time_machine: TimeMachine) -> None:
        """phi' = update(phi, g), phi kept in the time machine under `step`."""

    def pull_back(self, step: int, v: Vector) -> tuple[Vector, Vector]:
        """(d, carried) for the cotangent v of phi' behind `step`, the last step first; then v_phi = carried + H d."""

    def update(self, step: int, weights: dict[str, Tensor], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same step as differentiable operations on tensors by name."""


@dataclass(frozen=True, kw_only=True)
class PilotRule:
    """make  (learning rate, student, the student's learner or None) -> Pilot; raises ValueError where it cannot serve them
    help  one line of --help, a literal text (engine.plugins)
    """

    make: Callable[[float, Network, Learner | None], Pilot]
    help: str
