"""Finite differences: the walk back with u_j and H_j d_j from two forwards (and backwards, while j > 1) beside phi_{j-1}.

    (f(phi + eps d) - f(phi - eps d)) / 2 eps,    eps = 0.01 / |d|, in float32 at least

For students whose operations have no forward-mode derivatives; approximate. Differences also go through what a forward computes
under torch.no_grad() (a running statistic that is read behind its update), which a gradient takes for constant. Source of eps: DARTS (Liu et al., ICLR 2019).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.batch import Batch
from engine.meta.problem import Meta, Problem
from engine.meta.strategies import Strategy
from engine.meta.walk_back import Head, walk_back
from engine.models.network import Outputs
from engine.models.precision import ieee
from engine.params.pass_state import PassState
from engine.params.vectors import Vector


def finite_difference(problem: Problem, pilots: Sequence[Batch], quizzes: Sequence[Batch]) -> Meta:
    """Approximate, to about 1e-3 relative; needs nothing but the student's forward and backward."""
    return walk_back(central_difference, problem, pilots, quizzes)


def central_difference(
    problem: Problem, batch: Batch, before: PassState, direction: Vector, names: None, head: Head | None, tape: None
) -> tuple[Outputs, Outputs, Vector | None]:
    """What `forward_mode` gives, from the student's outputs (and gradients) a little ahead and behind along d.

    In float32 also where training is in bf16: the differences are below what bf16 weights can hold.
    """
    student, flat = problem.student, problem.student.flat
    norm = direction.norm()
    eps = 0.01 / norm.clamp_min(torch.finfo(norm.dtype).tiny)
    sides, gradients = [], []
    for side in (eps, -eps):
        repeated = problem.time_machine.perturbed(direction, side)
        with before.again(), repeated, ieee(), torch.set_grad_enabled(head is not None):
            with flat.lookups() as lookups:
                out = student(batch, repeated=True, precision="fp32")
            if head is not None:
                gradients.append(flat.gradients_of(out.given(), head.slopes(out), flat.parameters, lookups))
            sides.append(out.detached())
    ahead, behind = sides
    mean = Outputs(*(None if a is None else (a + b) / 2 for a, b in zip(ahead, behind, strict=True)))
    slope = Outputs(*(None if a is None else (a - b) / (2 * eps) for a, b in zip(ahead, behind, strict=True)))
    hd = None if head is None else gradients[0].plus(gradients[1], -1.0).scaled(1 / (2 * eps))
    return mean, slope, hd


STRATEGY = Strategy(
    gradient=finite_difference, help="approximate, for students without forward-mode derivatives", values="approximate"
)
