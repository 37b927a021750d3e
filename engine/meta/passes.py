"""The forward and backward passes that strategies are made of: teachers and student on a pilot batch, the quiz."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from engine.batch import Batch
from engine.meta.micro_batches import Part
from engine.meta.problem import Kept, Problem
from engine.meta.tape import Tape
from engine.models.checkpointing import checkpointed
from engine.models.features import InnerStates
from engine.models.network import Network, Outputs
from engine.params.flat import Lookups
from engine.params.pass_state import Buffers, PassState
from engine.params.vectors import Vector
from engine.sections import section


class Taught(NamedTuple):
    """The teachers' forwards on one batch."""

    outputs: list[Outputs]
    lookups: list[Lookups]
    weights: Tensor | None  # [K]


def teach(problem: Problem, batch: Batch) -> Taught:
    """With graph where gradients are enabled."""
    outputs, lookups = [], []
    for teacher in problem.teachers:
        with section("teacher forward"), teacher.flat.lookups() as found, recomputed(problem, teacher, "teachers"):
            outputs.append(problem.answer(teacher, batch))
        lookups.append(found)
    return Taught(outputs, lookups, None if problem.weights is None else problem.weights.module())


def recomputed(problem: Problem, network: Network, role: str):
    """Activation checkpointing where it was asked for and a graph is recorded."""
    wanted = problem.checkpointing in (role, "both") and torch.is_grad_enabled()
    return checkpointed(network.module) if wanted else nullcontext()


@dataclass
class Piece:
    """What the way back needs of the pilot's pass over one part of a batch."""

    part: Part
    before: PassState  # the student's, before its forward
    outputs: Outputs  # the student's, detached
    answers: list[Outputs]  # the teachers', detached
    loss: Tensor
    asked: PassState | None  # the teachers', before their forwards, where these have to run again
    taught: Taught | None = None  # the teachers' forwards with their graph, where it is kept
    kept: Kept | None = None


@section("pilot")
def pilot_pass(
    problem: Problem, part: Part, single: bool, tape: Tape | None = None, frozen: bool = False
) -> tuple[Piece, Vector]:
    """Loss and gradient of the student at its present weights. In a `single` pass of a round the graph of the teachers is
    kept for their backward, unless they are `frozen`; otherwise it is recomputed, so that activation memory grows neither
    with M nor with parts."""
    student, keep = problem.student, problem.keep and single
    asked = None if single or frozen else state_of(*problem.teachers)
    with torch.set_grad_enabled(single and not frozen):
        taught = teach(problem, part.batch)
    before = state_of(student)
    recording = nullcontext() if tape is None else tape.recording()
    with student.flat.lookups() as lookups, recomputed(problem, student, "student"), recording:
        outputs = student(part.batch, repeated=True)
    kept = Kept(outputs, lookups, Buffers.and_renormed(student.module)) if keep else None
    loss, slopes = part.objective.slopes(outputs, taught.outputs, part.batch.labels, taught.weights)
    gradient = student.flat.gradients_of(outputs.given(), slopes, student.leaves(), lookups, retain_graph=keep)
    answers = [o.detached() for o in taught.outputs]
    graph = taught if single and not frozen else None
    return Piece(part, before, outputs.detached(), answers, loss, asked, graph, kept), gradient


@section("quiz")
def quiz(problem: Problem, quizzes: Sequence[Batch], names: list[str] | None) -> tuple[Tensor, Vector]:
    """Mean quiz loss with dropout off, and its gradient v; one batch's activations at a time."""
    student, flat, total, v = problem.student, problem.student.flat, 0.0, None
    leaves = student.leaves()
    if names is not None:  # only these, and nothing below them records a graph
        alone = {n: t.detach().requires_grad_(n in names) for n, t in leaves.items()}
        leaves = {n: alone[n] for n in names}
    buffers = Buffers.of(student.module)  # which the pilot's kept graph may need as they are
    with student.in_mode(train=False), student.giving(InnerStates()), buffers.again():
        for batch, objective in (part for whole in quizzes for part in problem.parts(whole)):
            if names is None:
                with flat.lookups() as lookups, recomputed(problem, student, "student"):
                    outputs = student(batch)
            else:
                outputs, lookups = student(batch, alone), Lookups()
            loss = objective.hard(outputs.logits, batch.labels) / len(quizzes)
            gradient = flat.gradients_of([loss], None, leaves, lookups)
            v = gradient if v is None else v.plus(gradient)
            total = total + loss.detach()
            del outputs, loss
    return total, v


def state_of(*networks: Network) -> PassState:
    """What a pass through them begins from."""
    return PassState([n.module for n in networks], {n.flat.weights.device for n in networks})
