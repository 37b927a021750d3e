"""The meta-gradient at first-order memory: pilot steps forward, then back through the snapshots.

With pilot loss l, quiz loss q and o the models' outputs, a walk over M pilot batches is

    v_M = grad q(phi_M), then for j = M..1, at phi_{j-1} on batch j, from the state its forward began from:
        d_j = (d update / d g)^T v_j                 closed form (engine.meta.pilots); SGD: -eta v_j
        u_j = J_S d_j                                a directional derivative of the student
        c_k = d/do_k < dl/do_S, u_j >                at the loss head
        dq/dtheta_k += J_k^T c_k                     one ordinary backward of each teacher
        v_{j-1} = (d update / d phi)^T v_j + H_j d_j    only while j > 1

No second-order graph is built; activations are those of one step, whatever M is. How u_j and H_j d_j are computed is the
strategy's choice. Source: the walk back of MixFlow-MG (Kemaev et al., ICML 2025).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.batch import Batch
from engine.meta.passes import Piece, pilot_pass, quiz, teach
from engine.meta.problem import Meta, Problem
from engine.meta.tape import Tape
from engine.models.network import Network, Outputs
from engine.params.flat import Lookups
from engine.params.vectors import Vector
from engine.sections import section


class Head(NamedTuple):
    """The pilot loss as a function of the student's outputs alone."""

    slopes: Callable[[Outputs], list[Tensor]]
    slopes_along: Callable[[Outputs, Outputs], tuple[list[Tensor], list[Tensor]]]


# problem, batch, the state that its forward began from, direction, names of the weights that it is limited to (or None), head
# (None where no H d is needed), tape (or None)
# -> outputs, J d, H d
Directional = Callable[..., tuple[Outputs, Outputs, Vector | None]]


def walk_back(
    directional: Directional, problem: Problem, pilots: Sequence[Batch], quizzes: Sequence[Batch], taped: bool = False,
    only: Callable[[Network, Outputs], list[str]] | None = None,
) -> Meta:  # fmt: skip
    """First-order memory: the pilot steps forward, then back through the snapshots with `directional` derivatives."""
    student, pilot, time_machine = problem.student, problem.pilot, problem.time_machine
    batches = [problem.parts(batch) for batch in pilots]
    single, walked, names = len(batches) == len(batches[0]) == 1, [], None
    # with checkpointing the recorded pass would have to be recomputed as it was recorded, which it is not
    taped = taped and problem.taped and single
    tape = Tape() if taped and problem.checkpointing not in ("student", "both") else None
    with time_machine.excursion():
        pilot.begin()
        for j, batch in enumerate(batches):
            gradient, pieces = None, []
            for part in batch:
                piece, g = pilot_pass(problem, part, single, tape)
                gradient = g if gradient is None else gradient.plus(g)
                names = None if only is None else only(student, piece.outputs)
                pieces.append(piece)
                del piece, g
            walked.append(pieces)
            with section("pilot"):
                pilot.advance(j, gradient, time_machine)
            del gradient
        quiz_loss, v = quiz(problem, quizzes, names)
        own = []
        for j in range(len(batches) - 1, -1, -1):
            time_machine.rewind(j)
            direction, v = pilot.pull_back(j, v)
            for piece in walked[j]:
                head = None if j == 0 else _head(problem, piece)
                with section("JVP"):
                    outputs, tangents, hd = directional(
                        problem, piece.part.batch, piece.before, direction, names, head, tape
                    )
                if tape is not None:
                    tape.clear()  # of the only pass, before the teachers' backward
                if hd is not None:
                    v = v.plus(hd)
                own += _to_each(problem, piece, outputs, tangents, len(batches))
    loss = torch.stack([piece.loss for pieces in walked for piece in pieces]).sum() / len(batches)
    teacher_loss = torch.stack(own).sum() / len(problem.teachers) if own else None
    masks = [[piece.before.random for piece in pieces] for pieces in walked]
    return Meta(loss, quiz_loss, masks, walked[0][0].kept, teacher_loss)


@section("teacher update")
def _to_each(problem: Problem, piece: Piece, outputs: Outputs, tangents: Outputs, pilots: int) -> list[Tensor]:
    """The cotangents c = d/do < dl/do_S, J d > into every teacher, and into teacher weights that learn.

    Slopes of the teachers' own losses, which are means over the `pilots` of a round, go the same way; returns their values.
    """
    batch, taught = piece.part.batch, piece.taught
    if taught is None:
        with piece.asked.again():
            taught = teach(problem, batch)
    piece.taught = None
    cotangents, weights = piece.part.objective.cotangents(
        outputs, taught.outputs, batch.labels, tangents, taught.weights
    )
    own = []
    if problem.own is not None:
        loss = problem.own_loss(piece.part, pilots)
        found = [loss.slopes(Outputs(o.logits), [Outputs(piece.outputs.logits)], batch.labels) for o in taught.outputs]
        own = [value for value, _ in found]
        cotangents = [c._replace(logits=c.logits + s) for c, (_, (s,)) in zip(cotangents, found, strict=True)]
    for teacher, o, c, found in zip(problem.teachers, taught.outputs, cotangents, taught.lookups, strict=True):
        # an output without graph: a teacher whose trained weights it does not depend on
        pairs = [(t, g) for t, g in zip(o.given(), c.given(), strict=False) if t.requires_grad]
        _accumulate(teacher, [t for t, _ in pairs], [g for _, g in pairs], found)
    if weights is not None:
        _accumulate(problem.weights, [taught.weights], [weights], Lookups())
    return own


def _head(problem: Problem, piece: Piece) -> Head:
    objective, labels = piece.part.objective, piece.part.batch.labels
    weights = None if problem.weights is None else problem.weights.module().detach()
    return Head(
        lambda outputs: objective.slopes(outputs, piece.answers, labels, weights)[1],
        lambda outputs, tangents: objective.slopes_along(outputs, tangents, piece.answers, labels, weights),
    )


def _accumulate(network: Network, outputs: list[Tensor], cotangents: list[Tensor], lookups: Lookups) -> None:
    if outputs:
        network.flat.backward(outputs, cotangents, network.leaves(), lookups)
