"""How the quiz loss, taken after the student's pilot steps, moves every teacher: one file a strategy, one signature.

With pilot loss l, pilot steps phi_j = update(phi_{j-1}, grad_phi l(phi_{j-1}; x_j)) and quiz loss q(phi_M), each leaves
dq/dtheta_k in the teachers' `.grad` (and dq/dw in that of learned teacher weights), the student as it found it, and the random
generators where the pilot's forwards left them. Source: MetaDistil (Zhou, Xu and McAuley, ACL 2022).

Imports what stands directly in meta/. Another strategy is one file here that ends in

    STRATEGY = Strategy(gradient=..., help="...")

`--meta-grad` takes it from there; it also takes the path of a file, and entry points of the group `metadistil.strategies`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from engine.batch import Batch
from engine.meta.problem import Meta, Problem
from engine.plugins import STRATEGIES

__all__ = ["STRATEGIES", "Strategy"]


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """gradient     (problem, pilot batches, quiz batches) -> losses and what the real step needs
    help         one line of --help, a literal text (engine.plugins)
    values       what it computes: the meta-gradient to rounding, an approximation of it, or a biased part of it
    keeps_graph  after it the graph of a single pilot's forward can be differentiated once more, by the real step
    """

    gradient: Callable[[Problem, Sequence[Batch], Sequence[Batch]], Meta]
    help: str
    values: Literal["exact", "approximate", "biased"] = "exact"
    keeps_graph: bool = True
    quizzed: ClassVar[bool] = True
    pilot: ClassVar[None] = None  # the one that `pilot_optimizer` names

    def check(self, problem: Problem) -> None:
        """Nothing of a problem can be wrong before the first step."""

    def __call__(self, problem: Problem, pilots: Sequence[Batch], quizzes: Sequence[Batch]) -> Meta:
        return self.gradient(problem, pilots, quizzes)
