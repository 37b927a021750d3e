"""J d and H d of the student along a direction d, by forward mode and forward over reverse."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from engine.batch import Batch
from engine.errors import UserError
from engine.meta.dual_pass import DualPass
from engine.meta.problem import Problem
from engine.meta.tape import Tape, UnrecordedRandomness
from engine.meta.walk_back import Head
from engine.models.network import Outputs
from engine.params.flat import Lookups
from engine.params.pass_state import PassState, RandomState
from engine.params.vectors import Vector


def forward_mode(
    problem: Problem, batch: Batch, before: PassState, direction: Vector, names: list[str] | None, head: Head | None,
    tape: Tape | None,
) -> tuple[Outputs, Outputs, Vector | None]:  # fmt: skip
    """Student outputs, their tangents J d and, with a head, H d of its loss, in one forward-mode pass along d."""
    student, second = problem.student, head is not None
    flat, leaves = student.flat, student.leaves()
    dtype = next(iter(leaves.values())).dtype
    now = RandomState({flat.weights.device})
    try:
        with torch.set_grad_enabled(second), forward_ad.dual_level():
            tangents = flat.tangents(direction, names, dtype)
            # clones: a dual's tangent gets a storage as big as its primal's, which for a view is all of the flat buffer
            # gradients only where they are taken: torch folds the batch of a product by that, which rounds otherwise
            duals = {
                n: forward_ad.make_dual(leaves[n].detach().clone().requires_grad_(second), t.clone())
                for n, t in tangents.items()
            }
            by_rows = flat.lookups(direction, second) if names is None else nullcontext(Lookups())
            with by_rows as lookups:
                try:
                    with _beginning(before, second) if tape is None else _replaying(tape, before):
                        outputs = student(batch, duals, higher=True)
                except UnrecordedRandomness:  # the model draws what a tape does not record: a pass without one
                    problem.taped = False
                    now.restore()
                    lookups.ids.clear(), lookups.leaves.clear()
                    with _beginning(before, second):
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


@contextmanager
def _beginning(before: PassState, second: bool):
    with before.again(), torch.enable_grad(), DualPass(reverse=second):
        yield


@contextmanager
def _replaying(tape: Tape, before: PassState):
    """What was drawn is on the tape. A CUDA graph cannot take its generator back, but it can hold this."""
    with before.buffers.again(), tape.replaying():
        yield


def _tangent(gradient: Tensor | None) -> Tensor | None:
    if gradient is None:
        return None
    tangent = forward_ad.unpack_dual(gradient).tangent
    return None if tangent is None else tangent.detach()


def _or_zeros(tangent: Tensor | None, primal: Tensor) -> Tensor:
    return torch.zeros_like(primal) if tangent is None else tangent.detach()
