"""Exact: u = J_S d and H d in forward mode, the teachers' cotangents at the loss head, no second-order graph."""

from __future__ import annotations

from collections.abc import Sequence

from engine.batch import Batch
from engine.meta.forward_mode import forward_mode
from engine.meta.problem import Meta, Problem
from engine.meta.strategies import Strategy
from engine.meta.walk_back import walk_back


def exact(problem: Problem, pilots: Sequence[Batch], quizzes: Sequence[Batch]) -> Meta:
    """Exact to rounding. Needs forward-mode derivatives of the student (math attention has them)."""
    return walk_back(forward_mode, problem, pilots, quizzes, taped=True)


STRATEGY = Strategy(gradient=exact, help="in forward mode, at the memory of first-order training")
