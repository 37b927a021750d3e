"""What a step has to compute before it is timed: losses and gradients of plain PyTorch in float32, without dropout.

The truth is the plain implementation with eager attention: the losses, the student's gradient, and for metadistil every
teacher's meta-gradient. The same of each implementation is what its step leaves when no optimizer moves anything. A graph
is held against the engine's eager step instead: several steps, values and weights the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.step_cases import Setting, engine_step, graph_step, plain_step
from bench.step_table import PLAIN

# Relative to the norm of all of a model's gradients, and to a loss. float32: sums in another order through up to 12 layers,
# and for a meta-gradient there and back; at most 7e-7 was seen. bfloat16: weights and the results of every layer have 8
# bits (2^-9 off each); autocast was 0.06 off at most.
TOLERANCE = {"fp32": 1e-4, "bf16": 0.1}
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}  # seen: 2e-6, 2e-3
REPLAYS = 3  # that are compared with eager steps


class WrongError(AssertionError):
    """An implementation does not compute what it is timed for."""


class Found(NamedTuple):
    """Of one step. Gradients by name, one dict a model: the student, then teachers that learn."""

    losses: dict[str, float]
    gradients: list[dict[str, Tensor]]


def expected(setting: Setting) -> Found:
    """The truth of a case; the same for every precision."""
    return _expected(setting._replace(case=setting.case._replace(precision="fp32", full=False)))


@lru_cache(maxsize=1)
def _expected(setting: Setting) -> Found:
    return plain_found(setting, "eager")


def plain_found(setting: Setting, attention: str) -> Found:
    plain, call = plain_step(setting, attention, dropout=False)
    loop = getattr(plain, "kd", plain)  # of the published loop, its real step
    learners = [loop.learner, *getattr(plain, "teacher_learners", [])]
    return found(call, learners, [each.model for each in learners])


def engine_found(setting: Setting) -> Found:
    state, call = engine_step(setting, dropout=False)
    state.advance = lambda batches: None  # schedules follow updates, and there will be none
    learners = state.learners()
    return found(call, learners, [each.network.module for each in learners])


def found(call: Callable[[], Any], learners: list[Any], models: list[nn.Module]) -> Found:
    """What a step leaves where nobody takes the gradients."""
    for each in learners:
        each.update = lambda: None
    losses = {name: float(value) for name, value in call().items()}
    return Found(losses, [_gradients(m) for m in models])


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.detach() for n, p in model.named_parameters()}


def validate(setting: Setting, implementation: str) -> float:
    """How far an implementation's gradients are from the truth, relative; the largest of its models. Raises WrongError."""
    truth, precision = expected(setting), setting.case.precision
    if implementation in PLAIN:
        got = plain_found(setting, "eager" if implementation == "plain" else "sdpa")
    else:
        got = engine_found(setting)
    where = f"{implementation}, {setting.case.name}"
    if missing := truth.losses.keys() - got.losses.keys():
        raise WrongError(f"{where}: no {', '.join(sorted(missing))}.")
    for name, loss in truth.losses.items():
        off = abs(got.losses[name] - loss) / abs(loss)
        if not off <= LOSS_TOLERANCE[precision]:
            raise WrongError(f"{where}: {name} is {got.losses[name]:.6f}, plain PyTorch in float32 has {loss:.6f}.")
    errors = [distance(g, t) for g, t in zip(got.gradients, truth.gradients, strict=True)]
    for which, error in zip(
        ["the student", *(f"teacher {k + 1}" for k in range(len(errors) - 1))], errors, strict=True
    ):
        if not error <= TOLERANCE[precision]:
            raise WrongError(f"{where}: the gradient of {which} is {error:.1e} from plain PyTorch in float32, "
                             f"{TOLERANCE[precision]:.0e} is allowed.")  # fmt: skip
    return max(errors)


def distance(got: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Norm of the difference over the norm, all weights of a model together; NaN where one number is."""
    if got.keys() != right.keys():
        raise WrongError(f"gradients of other weights: {', '.join(sorted(got.keys() ^ right.keys()))}.")
    off = torch.stack([(got[n].double() - g.double()).norm() for n, g in right.items()]).norm()
    return (off / torch.stack([g.double().norm() for g in right.values()]).norm()).item()


def validate_graph(setting: Setting, capture: Any = None) -> None:
    """Replays give the bits of eager steps: values of every step, weights behind the last. Raises WrongError.

    Without dropout, and with torch's deterministic kernels, since two eager steps are not the same bit for bit without.
    """
    with deterministic():
        eager_state, eager = engine_step(setting, dropout=False)
        graph_state, graph = graph_step(setting, capture, dropout=False)
        taken = graph_state.round
        eager_values = [eager() for _ in range(taken + REPLAYS)]
        graph_values = [graph() for _ in range(REPLAYS)]
    where = f"graph, {setting.case.name}"
    for number, (e, g) in enumerate(zip(eager_values[taken:], graph_values, strict=True)):
        for name, value in e.items():
            if not torch.equal(g[name], value):
                raise WrongError(f"{where}: replay {number + 1} has {name} {g[name].item()}, eager {value.item()}.")
    for e, g in zip(eager_state.learners(), graph_state.learners(), strict=True):
        mine, theirs = e.network.flat.weights, g.network.flat.weights
        if not torch.equal(mine, theirs):
            apart = (mine - theirs).abs().max().item()
            raise WrongError(f"{where}: weights of the {e.network.name} are {apart:.1e} from those of eager steps.")


@contextmanager
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it is for finding mistakes, and takes time
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = filled
