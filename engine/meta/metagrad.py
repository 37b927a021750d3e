"""The meta-gradient: how a quiz loss taken after the student's pilot steps moves every teacher.

With pilot loss l, pilot steps phi_j = update(phi_{j-1}, grad_phi l(phi_{j-1}; x_j)) and quiz loss q(phi_M), each strategy
leaves dq/dtheta_k in the teachers' `.grad` (and dq/dw in that of learned teacher weights), the student as it found it, and
the random generators where the pilot's forwards left them. `STRATEGIES` holds them behind one signature:

    exact            v_M = grad q(phi_M), then for j = M..1, at phi_{j-1} on batch j with its dropout masks:
                         d_j = (d update / d g)^T v_j                          closed form (engine.meta.pilot); SGD: -eta v_j
                         u_j = J_S d_j                                         forward mode
                         c_k = d/do_k < dl/do_S, u_j >                         at the loss head, o the models' outputs
                         dq/dtheta_k += J_k^T c_k                              one ordinary backward of each teacher
                         v_{j-1} = (d update / d phi)^T v_j + H_j d_j          forward over reverse, only while j > 1
                     No second-order graph; activations are those of one step, whatever M is.
    finite_difference  the same walk, u_j and H_j d_j by central differences: (f(phi + eps d) - f(phi - eps d)) / 2 eps with
                     eps = 0.01 / |d|, in float32 at least; two forwards (and backwards, while j > 1) instead of the
                     forward-mode pass. For students whose operations have no forward-mode derivatives; approximate.
    first_order      the same walk with all of the student's weights but those of its last layer held constant in the
                     teachers: only what the pilot step does to the logits' own layer is differentiated. Neither the quiz
                     loss nor the forward-mode pass then goes through the encoder. The cheapest; biased.
    double_backward  q differentiated through `create_graph=True` pilots. The oracle, and what published code does.

Source: MetaDistil (Zhou, Xu and McAuley, ACL 2022); the walk back as in MixFlow-MG (Kemaev et al., ICML 2025); the
choice of eps from DARTS (Liu et al., ICLR 2019).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from engine.batch import Batch
from engine.errors import UserError
from engine.losses.objectives import Objective
from engine.meta.micro_batches import Part, parts
from engine.meta.pilot import Pilot
from engine.meta.tape import Tape, UnrecordedRandomness
from engine.meta.time_machine import TimeMachine
from engine.models.checkpointing import checkpointed
from engine.models.features import InnerStates
from engine.models.network import Network, Outputs
from engine.models.precision import ieee
from engine.params.flat import Lookups, Vector
from engine.params.random_state import RandomState
from engine.sections import section


@dataclass
class Problem:
    """What a strategy differentiates. `weights` gives [K] teacher weights, its parameters learned; None for the mean."""

    student: Network
    teachers: Sequence[Network]
    objective: Objective
    pilot: Pilot
    time_machine: TimeMachine
    weights: Network | None = None
    checkpointing: str = "none"  # student, teachers, both: whose activations are recomputed, layer by layer
    keep: bool = False  # whether the graph of a single pilot's forward is kept for the real step
    taped: bool = True  # until the student was seen to draw random numbers that a tape does not record
    micro_batch: int | None = None  # examples that go through the models at once
    own: Objective | None = (
        None  # a teacher's own loss, in which the student teaches it; its gradient joins dq/dtheta_k
    )

    def parts(self, batch: Batch) -> list[Part]:
        return parts(batch, self.objective, self.micro_batch)


class Kept(NamedTuple):
    """A forward of the student at the weights it is rewound to, with its graph."""

    outputs: Outputs
    lookups: Lookups
    buffers: list[Tensor]  # what the forward left the module's buffers at


class Meta(NamedTuple):
    """Detached device scalars, the random state before each pilot's forward, and the pilot's graph where it was kept."""

    pilot_loss: Tensor
    quiz_loss: Tensor | None  # None where there is no quiz (engine.meta.reptile)
    masks: list[list[RandomState]]  # of each batch, of each of its parts
    kept: Kept | None = None
    teacher_loss: Tensor | None = None  # mean of the teachers' own losses, where they have them


Strategy = Callable[[Problem, Sequence[Batch], Sequence[Batch]], Meta]


class Head(NamedTuple):
    """The pilot loss as a function of the student's outputs alone."""

    slopes: Callable[[Outputs], list[Tensor]]
    slopes_along: Callable[[Outputs, Outputs], tuple[list[Tensor], list[Tensor]]]


# problem, batch, random state, direction, the weights' names it is limited to, head (None where no H d is needed), tape
# -> outputs, J d, H d
Directional = Callable[..., tuple[Outputs, Outputs, Vector | None]]


class _Taught(NamedTuple):
    """The teachers' forwards on one batch."""

    outputs: list[Outputs]
    lookups: list[Lookups]
    weights: Tensor | None  # [K]


def _teach(problem: Problem, batch: Batch) -> _Taught:
    """With graph where gradients are enabled."""
    outputs, lookups = [], []
    for teacher in problem.teachers:
        with section("teacher forward"), teacher.flat.lookups() as found, _recomputed(problem, teacher, "teachers"):
            outputs.append(teacher(batch))
        lookups.append(found)
    return _Taught(outputs, lookups, None if problem.weights is None else problem.weights.module())


def _recomputed(problem: Problem, network: Network, role: str):
    """Activation checkpointing where it was asked for and a graph is recorded."""
    wanted = problem.checkpointing in (role, "both") and torch.is_grad_enabled()
    return checkpointed(network.module) if wanted else nullcontext()


def _accumulate(network: Network, outputs: list[Tensor], cotangents: list[Tensor], lookups: Lookups) -> None:
    if outputs:
        network.flat.backward(outputs, cotangents, network.leaves(), lookups)


def _walk_back(
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
        quiz_loss, v = _quiz(problem, quizzes, names)
        own = []
        for j in range(len(batches) - 1, -1, -1):
            time_machine.rewind(j)
            direction, v = pilot.pull_back(j, v)
            for piece in walked[j]:
                head = None if j == 0 else _head(problem, piece)
                with section("JVP"):
                    outputs, tangents, hd = directional(
                        problem, piece.part.batch, piece.masks, direction, names, head, tape
                    )
                if hd is not None:
                    v = v.plus(hd)
                own += _to_each(problem, piece, outputs, tangents, len(batches))
    loss = torch.stack([piece.loss for pieces in walked for piece in pieces]).sum() / len(batches)
    teacher_loss = torch.stack(own).sum() / len(problem.teachers) if own else None
    masks = [[piece.masks for piece in pieces] for pieces in walked]
    return Meta(loss, quiz_loss, masks, walked[0][0].kept, teacher_loss)


@dataclass
class Piece:
    """What the way back needs of the pilot's pass over one part of a batch."""

    part: Part
    masks: RandomState  # before the student's forward
    outputs: Outputs  # the student's, detached
    answers: list[Outputs]  # the teachers', detached
    loss: Tensor
    taught: _Taught | None = None  # the teachers' forwards with their graph, where it is kept
    kept: Kept | None = None


@section("pilot")
def pilot_pass(
    problem: Problem, part: Part, single: bool, tape: Tape | None = None, frozen: bool = False
) -> tuple[Piece, Vector]:
    """Loss and gradient of the student at its present weights. In a `single` pass of a round the graph of the teachers is
    kept for their backward, unless they are `frozen`; otherwise it is recomputed, so that activation memory grows neither
    with M nor with parts."""
    student, keep = problem.student, problem.keep and single
    with torch.set_grad_enabled(single and not frozen):
        taught = _teach(problem, part.batch)
    masks = RandomState(devices(student))
    recording = nullcontext() if tape is None else tape.recording()
    with student.flat.lookups() as lookups, _recomputed(problem, student, "student"), recording:
        outputs = student(part.batch, repeated=True)
    kept = Kept(outputs, lookups, [b.clone() for b in student.module.buffers()]) if keep else None
    loss, slopes = part.objective.slopes(outputs, taught.outputs, part.batch.labels, taught.weights)
    gradient = student.flat.gradients_of(outputs.given(), slopes, student.leaves(), lookups, retain_graph=keep)
    answers = [o.detached() for o in taught.outputs]
    graph = taught if single and not frozen else None
    return Piece(part, masks, outputs.detached(), answers, loss, graph, kept), gradient


@section("teacher update")
def _to_each(problem: Problem, piece: Piece, outputs: Outputs, tangents: Outputs, pilots: int) -> list[Tensor]:
    """The cotangents c = d/do < dl/do_S, J d > into every teacher, and into teacher weights that learn.

    Slopes of the teachers' own losses, which are means over the `pilots` of a round, go the same way; returns their values.
    """
    batch, taught = piece.part.batch, piece.taught or _teach(problem, piece.part.batch)
    piece.taught = None
    cotangents, weights = piece.part.objective.cotangents(
        outputs, taught.outputs, batch.labels, tangents, taught.weights
    )
    own = []
    if problem.own is not None:
        loss = _own(problem, piece.part, pilots)
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


def _own(problem: Problem, part: Part, pilots: int) -> Objective:
    """A teacher's own loss on a part of one of so many batches."""
    return replace(problem.own, share=part.objective.share / pilots)


def _head(problem: Problem, piece: Piece) -> Head:
    objective, labels = piece.part.objective, piece.part.batch.labels
    weights = None if problem.weights is None else problem.weights.module().detach()
    return Head(
        lambda outputs: objective.slopes(outputs, piece.answers, labels, weights)[1],
        lambda outputs, tangents: objective.slopes_along(outputs, tangents, piece.answers, labels, weights),
    )


def double_backward(problem: Problem, pilots: Sequence[Batch], quizzes: Sequence[Batch]) -> Meta:
    """Autograd through the pilot steps: memory grows with M and with every activation of student and teachers."""
    student, pilot = problem.student, problem.pilot
    weights, losses, masks, taught, own = dict(student.flat.parameters), [], [], [], []
    with problem.time_machine.excursion():  # the weights are not written here, but buffers may be
        pilot.begin()
        for j, batch in enumerate(pilots):
            masks.append([])
            loss = 0.0
            for part in problem.parts(batch):
                taught.append(answers := _teach(problem, part.batch))
                masks[j].append(RandomState(devices(student)))
                with section("pilot"), _recomputed(problem, student, "student"):
                    outputs = student(part.batch, weights, higher=True)
                loss = loss + part.objective.distil(outputs, answers.outputs, part.batch.labels, answers.weights)
                if problem.own is not None:
                    theirs, pupil = _own(problem, part, len(pilots)), [Outputs(outputs.logits.detach())]
                    own += [theirs.distil(Outputs(o.logits), pupil, part.batch.labels) for o in answers.outputs]
            with section("pilot"):
                gradients = _gradients(loss, list(weights.values()), create_graph=True)
                weights = pilot.update(j, weights, dict(zip(weights, gradients, strict=True)))
            losses.append(loss.detach())
        quiet = student.giving(InnerStates())
        with section("quiz"), student.in_mode(train=False), quiet, _recomputed(problem, student, "student"):
            several = [part for batch in quizzes for part in problem.parts(batch)]
            answered = (p.objective.hard(student(p.batch, weights).logits, p.batch.labels) for p in several)
            quiz_loss = sum(answered) / len(quizzes)
        _to_teachers(problem, quiz_loss + sum(own), taught)
    teacher_loss = torch.stack(own).detach().sum() / len(problem.teachers) if own else None
    return Meta(torch.stack(losses).mean(), quiz_loss.detach(), masks, teacher_loss=teacher_loss)


@section("teacher update")
def _to_teachers(problem: Problem, loss: Tensor, taught: list[_Taught]) -> None:
    """dq/dtheta_k and dq/dw (of q and the teachers' own losses) in one backward."""
    learners = [(t, [each.lookups[k] for each in taught]) for k, t in enumerate(problem.teachers)]
    if problem.weights is not None and problem.weights.trainable():
        learners.append((problem.weights, []))
    inputs = [
        [*network.leaves().values(), *(leaf for found in lookups for leaf in found.leaves)]
        for network, lookups in learners
    ]
    found = iter(torch.autograd.grad(loss, [t for each in inputs for t in each], allow_unused=True))
    for (network, lookups), each in zip(learners, inputs, strict=True):
        gradients = [next(found) for _ in each]
        names = list(network.leaves())
        together = Lookups(
            {i for f in lookups for i in f.hooked},
            [i for f in lookups for i in f.ids],
            [t for f in lookups for t in f.leaves],
        )
        by_name = dict(zip(names, gradients, strict=False))
        network.flat.add(by_name, together, gradients[len(names) :])


@section("quiz")
def _quiz(problem: Problem, quizzes: Sequence[Batch], names: list[str] | None) -> tuple[Tensor, Vector]:
    """Mean quiz loss with dropout off, and its gradient v; one batch's activations at a time."""
    student, flat, total, v = problem.student, problem.student.flat, 0.0, None
    leaves = student.leaves()
    if names is not None:  # only these, and nothing below them records a graph
        alone = {n: t.detach().requires_grad_(n in names) for n, t in leaves.items()}
        leaves = {n: alone[n] for n in names}
    with student.in_mode(train=False), student.giving(InnerStates()):
        for batch, objective in (part for whole in quizzes for part in problem.parts(whole)):
            if names is None:
                with flat.lookups() as lookups, _recomputed(problem, student, "student"):
                    outputs = student(batch)
            else:
                outputs, lookups = student(batch, alone), Lookups()
            loss = objective.hard(outputs.logits, batch.labels) / len(quizzes)
            gradient = flat.gradients_of([loss], None, leaves, lookups)
            v = gradient if v is None else v.plus(gradient)
            total = total + loss.detach()
            del outputs, loss
    return total, v


def _forward_mode(
    problem: Problem, batch: Batch, masks: RandomState, direction: Vector, names: list[str] | None, head: Head | None,
    tape: Tape | None,
) -> tuple[Outputs, Outputs, Vector | None]:  # fmt: skip
    """Student outputs, their tangents J d and, with a head, H d of its loss, in one forward-mode pass along d."""
    student, second = problem.student, head is not None
    flat, leaves = student.flat, student.leaves()
    dtype = next(iter(leaves.values())).dtype
    before = RandomState(devices(student))
    try:
        with torch.set_grad_enabled(second), forward_ad.dual_level():
            tangents = flat.tangents(direction, names, dtype)
            # clones: a dual's tangent gets a storage as big as its primal's, which for a view is all of the flat buffer
            duals = {
                n: forward_ad.make_dual(leaves[n].detach().clone().requires_grad_(second), t.clone())
                for n, t in tangents.items()
            }
            by_rows = flat.lookups(direction, second) if names is None else nullcontext(Lookups())
            with by_rows as lookups:
                try:
                    with masks.again() if tape is None else tape.replaying():
                        outputs = student(batch, duals, higher=True)
                except UnrecordedRandomness:  # the tape knows not every random operation of this model: all of it again
                    problem.taped = False
                    before.restore()
                    lookups.ids.clear(), lookups.leaves.clear()
                    with masks.again():
                        outputs = student(batch, duals, higher=True)
            unpacked = [None if t is None else forward_ad.unpack_dual(t) for t in outputs]
            primal = Outputs(*(None if t is None else t.primal.detach() for t in unpacked))
            tangent = Outputs(*(None if t is None else _or_zeros(t.tangent, t.primal) for t in unpacked))
            hd = None
            if second:
                # the head's own derivatives are taken in reverse: of its loss, kernels have no others
                slopes = [forward_ad.make_dual(*pair) for pair in zip(*head.slopes_along(primal, tangent), strict=True)]
                inputs = [*duals.values(), *lookups.leaves]
                found = torch.autograd.grad(outputs.given(), inputs, slopes, allow_unused=True)
                found = [_tangent(g) for g in found]
                hd = flat.vector(dict(zip(duals, found, strict=False)), lookups, found[len(duals) :])
            return primal, tangent, hd
    except NotImplementedError as e:
        raise UserError(
            f"the student ({student.name}) has an operation without forward-mode derivatives "
            f"({str(e).splitlines()[0]}); use --meta-grad double_backward, or finite_difference (approximate; strategy= in Python).") from e  # fmt: skip


def _tangent(gradient: Tensor | None) -> Tensor | None:
    if gradient is None:
        return None
    tangent = forward_ad.unpack_dual(gradient).tangent
    return None if tangent is None else tangent.detach()


def _or_zeros(tangent: Tensor | None, primal: Tensor) -> Tensor:
    return torch.zeros_like(primal) if tangent is None else tangent.detach()


def _central_difference(
    problem: Problem, batch: Batch, masks: RandomState, direction: Vector, names: None, head: Head | None, tape: None
) -> tuple[Outputs, Outputs, Vector | None]:
    """What `_forward_mode` gives, from the student's outputs (and gradients) a little ahead and behind along d.

    In float32 also where training is in bf16: the differences are below what bf16 weights can hold.
    """
    student, flat = problem.student, problem.student.flat
    norm = direction.norm()
    eps = 0.01 / norm.clamp_min(torch.finfo(norm.dtype).tiny)
    sides, gradients = [], []
    for side in (eps, -eps):
        repeated = problem.time_machine.perturbed(direction, side)
        with masks.again(), repeated, ieee(), torch.set_grad_enabled(head is not None):
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


def last_layer(student: Network, outputs: Outputs) -> list[str]:
    """Names of the trained weights of the layer that gives the logits: the last `nn.Linear` of C outputs.

    Raises UserError where the student has none.
    """
    classes = outputs.logits.shape[-1]
    found = [n for n, m in student.module.named_modules() if isinstance(m, nn.Linear) and m.out_features == classes]
    names = [n for n in student.flat.parameters if found and n.rpartition(".")[0] == found[-1]]
    if not names:
        raise UserError(
            f"first_order needs a last layer that is a trained nn.Linear of {classes} outputs; the student ({student.name}) "
            "has none. Use --meta-grad exact (strategy= in Python).")  # fmt: skip
    return names


def devices(network: Network) -> set[torch.device]:
    return {network.flat.weights.device}


def _gradients(loss: Tensor, inputs: list[Tensor], create_graph: bool = False) -> list[Tensor]:
    """d loss / d inputs, zeros for an input that the loss does not depend on (an unused pooler, say)."""
    return list(torch.autograd.grad(loss, inputs, create_graph=create_graph, allow_unused=True, materialize_grads=True))


def exact(problem: Problem, pilots: Sequence[Batch], quizzes: Sequence[Batch]) -> Meta:
    """Exact to rounding. Needs forward-mode derivatives of the student (math attention has them)."""
    return _walk_back(_forward_mode, problem, pilots, quizzes, taped=True)


def finite_difference(problem: Problem, pilots: Sequence[Batch], quizzes: Sequence[Batch]) -> Meta:
    """Approximate, to about 1e-3 relative; needs nothing but the student's forward and backward."""
    return _walk_back(_central_difference, problem, pilots, quizzes)


def first_order(problem: Problem, pilots: Sequence[Batch], quizzes: Sequence[Batch]) -> Meta:
    """Exact in the student's last layer, blind to all others."""
    return _walk_back(_forward_mode, problem, pilots, quizzes, taped=True, only=last_layer)


STRATEGIES: dict[str, Strategy] = {
    "exact": exact,
    "double_backward": double_backward,
    "finite_difference": finite_difference,
    "first_order": first_order,
}
