"""Step 6: try every model out on two examples, before anything is trained. What cannot work is refused in seconds.

Copies are tried, and the random state is put back: the models are left bit for bit as they were.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor

from engine.batch import Batch
from engine.data.encoded import EncodedSplit
from engine.errors import UserError
from engine.methods import METHODS
from engine.models import teacher_params
from engine.models.families import inputs_of, model_type
from engine.models.features import InnerStates
from engine.models.network import Encoder
from engine.run.setup import Setup
from engine.run.states import learner, meta_step

SAME = 1e-5  # of logits, relative to the largest or 1, in float32 or, where rounding is more than that, in float64
# Padding may change logits by so much before it is told
PADDED = 1e-3


def probe(setup: Setup) -> None:
    """Raises UserError for a model that the engine does not read as transformers does, or that cannot be trained as the settings
    have it."""
    student, teachers = setup.models.student.network, setup.models.taught()
    device = [setup.device] if setup.device.type == "cuda" else []
    with torch.random.fork_rng(device):
        for network in [student, *teachers]:
            compare(setup, network)
        rehearse(setup, student, teachers)


def compare(setup: Setup, network: Encoder) -> None:
    """The logits of a short text and of the longest one are those of the plain module, at two widths, in both kinds of passes."""
    split, rows = _short_and_long(setup, network.encoding)
    tried = _copied(network)
    with _trying(f"{_called(network)} cannot read texts", "give another model"), tried.in_mode(train=False):
        before = [type(m) for m in tried.module.modules()]
        wide, narrow = split.batch(rows), split.batch(rows[:1])
        plain, alone = _plain(tried, wide), _plain(tried, narrow)
        if before != [type(m) for m in tried.module.modules()]:
            raise UserError(f"{_called(network)} takes other layers for short texts than for long ones, "
                            "so that no two passes would agree; set attention_type to original_full in its config.json.")  # fmt: skip
        for batch, expected, higher in ((wide, plain, False), (narrow, alone, False), (wide, plain, True)):
            if not _apart(_ours(tried, batch, higher), expected) <= SAME:
                _check_exactly(network, batch, higher)
    if "attention_mask" in inputs_of(network.module) and (apart := _apart(plain[0], alone[0])) > PADDED:
        setup.console.warn(
            f"{_called(network)} gives a text other logits when it is padded ({apart:.1e} off).")  # fmt: skip


def rehearse(setup: Setup, student: Encoder, teachers: list[Encoder]) -> None:
    """One meta-gradient where teachers learn from a quiz, else one gradient of the student, on two examples."""
    config, losses, train = setup.config, setup.losses, setup.examples.encoded.train[0]
    method, taught = METHODS[config.method.method], [_copied(teacher, setup.device) for teacher in teachers]
    own = _copied(student, setup.device)
    given, quiz = (split.batch(_two(split)).to(setup.device) for split in (train, setup.examples.encoded.quiz))
    for teacher in taught if method.teachers == "learning" else ():
        teacher_params.restrict(teacher.module, config.method.teacher_params)
    matched = nullcontext() if losses.matching is None else losses.matching.between(own, taught)
    quizzed = method.learn_from == "quiz"
    for teacher in taught if method.meta_teachers else ():
        without = _trying(f"{_called(teacher)} gives no states of its tokens", "use another --method or teacher")
        with without, torch.no_grad(), teacher.giving(InnerStates(domain="feature")):
            teacher.flatten()
            teacher(given)
    by = f" taught by {', '.join(map(_called, teachers))}" if teachers else ""
    what = f"{_called(student)}{by} has no {'meta-gradient' if quizzed else 'gradient'} with {_settings(setup)}"
    with _trying(what, _instead(setup)), matched:
        steps = learner(own, config.optim, config.optim.lr, 1)
        if quizzed:
            learners = [learner(teacher, config.optim, config.optim.teacher_lr, 1) for teacher in taught]
            step, _ = meta_step(setup, steps, method, learners, losses.objective, config.method.meta_grad)
            step.meta_gradient([given] * config.method.pilot_steps, [quiz])
            found = [teacher.flat.gradients for teacher in taught]
        else:
            own.module.train()
            for teacher in taught:
                teacher.flatten()
            with torch.no_grad():
                answers = [teacher(given) for teacher in taught]
            outputs, lookups = steps.forward(given)
            if answers:
                _, slopes = losses.objective.slopes(outputs, answers, given.labels)
                steps.backward(outputs.given(), slopes, lookups)
            else:
                steps.backward([losses.objective.hard(outputs.logits, given.labels)], None, lookups)
            found = [own.flat.gradients]
        # sync: before a training
        if not all(gradient.isfinite().all() for gradient in found):
            raise ValueError("it is not finite")


def _short_and_long(setup: Setup, encoding: str) -> tuple[EncodedSplit, list[int]]:
    """A text of few tokens and the longest of all that are read in this encoding: their split and rows."""
    encoded = setup.examples.encoded
    splits = [split.only({encoding}) for split in (*encoded.train, encoded.quiz, encoded.validation, encoded.test)]
    split = max(splits, key=lambda split: split.lengths.max())
    order = np.argsort(split.lengths, kind="stable")
    return split, [int(order[0]), int(order[-1])]


def _two(split: EncodedSplit) -> list[int]:
    return [0, min(1, len(split) - 1)]


def _copied(network: Encoder, device: torch.device | str = "cpu") -> Encoder:
    """It, its weights apart and in its precision; not compiled."""
    found = Encoder(network.name, copy.deepcopy(network.module).to(device), network.encoding, network.precision)
    found.heads = network.heads
    return found


def _check_exactly(network: Encoder, batch: Batch, higher: bool) -> None:
    """Raises UserError where logits are not those of the plain module, in float64 if its code computes in that."""
    tried = _copied(network)
    tried.module.eval()
    apart = _apart(_ours(tried, batch, higher), _plain(tried, batch))
    tried.module.double()
    try:
        apart, most = _apart(_ours(tried, batch, higher), _plain(tried, batch)), SAME
    except RuntimeError:
        most = 100 * SAME  # it computes in float32 alone, with roundings of that
    if not apart <= most:
        raise UserError(f"{_called(network)} is not read here as transformers reads it (its logits are "
                        f"{apart:.1e} off); give another model.")  # fmt: skip


def _ours(network: Encoder, batch: Batch, higher: bool) -> Tensor:
    heads, network.heads = network.heads, 1  # all that there are
    try:
        return network(batch, higher=higher, precision="fp32").logits.detach()
    finally:
        network.heads = heads


@torch.no_grad()
def _plain(network: Encoder, batch: Batch) -> Tensor:
    given = batch.inputs[network.encoding]
    return network.module(**{name: t for name, t in given.items() if name in inputs_of(network.module)}).logits


def _apart(one: Tensor, other: Tensor) -> float:
    return ((one - other).abs().max() / other.abs().max().clamp(min=1)).item()


@contextmanager
def _trying(failed: str, instead: str) -> Iterator[None]:
    """Any error of the body is a UserError that says what failed, why, and what may help `instead`."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        said = (str(e).strip().splitlines() or [""])[0].rstrip(".")[:200]
        raise UserError(f"{failed} ({type(e).__name__}: {said}); {instead}.") from e


def _called(network: Encoder) -> str:
    return f"{network.name} ({model_type(network.module)})"


def _settings(setup: Setup) -> str:
    """The flags that a gradient depends on."""
    method = setup.config.method
    names = ["feature_loss"]
    if METHODS[method.method].learn_from == "quiz":
        names += ["meta_grad", "pilot_steps", "pilot_optimizer", "checkpointing", "teacher_params"]
    return ", ".join(f"--{name.replace('_', '-')} {getattr(method, name)}" for name in names)


def _instead(setup: Setup) -> str:
    """What may help."""
    method, found = setup.config.method, ["--precision fp32"] if setup.config.run.precision == "bf16" else []
    if METHODS[method.method].learn_from == "quiz":
        found += [f"--{name} {value}" for name, value, now in (
            ("checkpointing", "none", method.checkpointing), ("meta-grad", "double_backward", method.meta_grad)
        ) if now != value]  # fmt: skip
    found += ["--feature-loss none"] if method.feature_loss != "none" else []
    return f"use {' or '.join(found)}, or give other models" if found else "give other models"
