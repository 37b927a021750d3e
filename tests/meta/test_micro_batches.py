"""Batches in parts: losses, gradients and meta-gradients are those of the whole batch."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from method_oracle import Setting, apart
from scenes import Scene, difference
from torch import nn

from engine import MetaStep, Objective
from engine.batch import Batch
from engine.meta.micro_batches import parts
from engine.meta.strategies import STRATEGIES

# Float64: what is summed in another order differs by rounding. AdamW divides a gradient by its own size, so that
# rounding in one near its epsilon comes out multiplied by lr / epsilon.
EXACT, AFTER_ADAMW = 1e-12, 1e-9
# central differences lose half of the digits, whole or in parts
TOLERANCE = dict.fromkeys(STRATEGIES, EXACT) | {"finite_difference": 1e-6}


@given(examples=st.integers(1, 12), size=st.none() | st.integers(1, 14))
def test_every_example_is_in_one_part(examples, size):
    whole = Batch(
        torch.arange(examples), {"words": {"ids": torch.arange(3 * examples).view(-1, 3)}}, [[torch.ones(examples, 2)]]
    )
    found = parts(whole, Objective(), size)
    assert len(found) == (1 if size is None else -(-examples // size))
    assert sum(part.objective.share for part in found) == pytest.approx(1, rel=1e-15)
    for get in (lambda b: b.labels, lambda b: b.inputs["words"]["ids"], lambda b: b.answers[0][0]):
        assert torch.equal(torch.cat([get(part.batch) for part in found]), get(whole))
    for part in found:
        assert part.objective.share == len(part.batch.labels) / examples == part.objective.hard_share
        assert size is None or len(part.batch.labels) <= size


def test_a_whole_batch_is_left_alone():
    thing = SimpleNamespace(labels=torch.zeros(3), inputs="whatever")
    assert parts(thing, Objective(), None) == parts(thing, Objective(), 3) == [(thing, Objective())]


@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        ("whatever", "is str"),
        (torch.zeros(5, 2), r"is \[5, 2\]"),
        ({"x": torch.zeros(4, 2), "n": torch.tensor(1.0)}, r"is \[\]"),
    ],
)
def test_inputs_that_cannot_be_cut(inputs, named):
    with pytest.raises(ValueError, match=f"4 examples cannot be cut into micro-batches: one of its inputs {named}"):
        parts(Batch(torch.zeros(4), inputs), Objective(), 2)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("more", [
    {"pilots": 2}, {"optimizer": "adamw", "pilots": 2, "checkpointing": "both"}, {"weights": "learned", "features": True},
    {"soft_loss": "mse_prob", "quizzes": 2}, {"features": "tinybert"}, {"soft_loss": "mse_logits", "classes": 1},
], ids=str)  # fmt: skip
def test_meta_gradients_are_those_of_the_whole_batch(strategy, more):
    """Without dropout, whose masks are drawn part by part; a batch of 3 and a quiz of 4, in parts of 2."""
    whole, in_parts = (
        Scene("distilbert", ["bert", "bert"], dropout=0.0, **more, **cut) for cut in ({}, {"micro_batch": 2})
    )
    losses, expected, _ = whole.run(STRATEGIES[strategy])
    found_losses, found, _ = in_parts.run(STRATEGIES[strategy])
    assert difference(found, expected) < TOLERANCE[strategy]
    torch.testing.assert_close(found_losses, losses, rtol=1e-12, atol=0)


@pytest.mark.parametrize("strategy", ["exact", "double_backward"])
@pytest.mark.parametrize("labels", [([-100, -100, 1], [-100, 2, -100, -100]), ([-100] * 3, [-100] * 4)], ids=str)
def test_meta_gradients_of_parts_without_a_label(strategy, labels):
    """A part counts by its labels that are not -100, and nothing where it has none, in pilot, quiz and the teachers' own loss."""
    runs = []
    for cut in ({}, {"micro_batch": 2}):
        scene = Scene("distilbert", ["bert"], pilots=2, dropout=0.0, own=Objective("kl", 2.0, 0.3), **cut)
        for batch, given_labels in zip([*scene.pilots, *scene.quizzes], [labels[0]] * 2 + [labels[1]], strict=True):
            batch.labels = torch.tensor(given_labels)
        runs.append(scene.run(STRATEGIES[strategy])[:2])
    (losses, expected), (found_losses, found) = runs
    assert difference(found, expected) < EXACT
    torch.testing.assert_close(found_losses, losses, rtol=1e-12, atol=0)
    if labels[1] == [-100] * 4:
        assert losses[1] == 0


@pytest.mark.parametrize("pilots", [1, 2])
def test_masks_of_every_part_are_drawn_again(pilots):
    """With dropout the walk back sees each part's own masks: it agrees with autograd through the same parts."""
    settings = {"pilots": pilots, "quizzes": 2, "micro_batch": 2}
    _, expected, after = Scene("bert", ["bert"], **settings).run(STRATEGIES["double_backward"])
    _, found, ours = Scene("bert", ["bert"], **settings).run(STRATEGIES["exact"])
    assert difference(found, expected) < EXACT and torch.equal(after, ours)
    _, whole, _ = Scene("bert", ["bert"], pilots=pilots, quizzes=2).run(STRATEGIES["exact"])
    assert difference(whole, expected) > 1e-3  # other masks


class WithoutDropout(Setting):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, norm=False, **kwargs)  # a batch norm's statistics are those of the parts
        for module in (self.student, *self.teachers):
            for m in module.modules():
                if isinstance(m, nn.Dropout):
                    m.p = 0.0


@pytest.mark.parametrize("method", ["finetune", "kd", "metadistil", "lgtm", "reptile"])
@pytest.mark.parametrize("independent_masks", [False, True])
def test_methods_take_the_same_steps(method, independent_masks):
    size = 1 if method == "reptile" else 2
    whole, in_parts = (WithoutDropout(method, size=size, independent_masks=independent_masks) for _ in range(2))
    in_parts.state.micro_batch = 4  # of 6
    if in_parts.state.meta_step:
        in_parts.state.meta_step.problem.micro_batch = 4
    for ours, theirs in zip(in_parts.run(), whole.run(), strict=True):
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-8, atol=0)
    for ours, theirs in zip([in_parts.student, *in_parts.teachers], [whole.student, *whole.teachers], strict=True):
        assert apart(ours, theirs) < AFTER_ADAMW


def test_a_meta_step_for_any_modules():
    """Inputs that are one tensor."""
    torch.manual_seed(1)
    pairs = [(torch.randn(5, 3, dtype=torch.float64), torch.randint(2, (5,)))]
    gradients = []
    for size in (None, 2):
        torch.manual_seed(0)
        student, teacher = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()
        MetaStep(student, [teacher], pilot_lr=0.1, micro_batch_size=size).meta_gradient(pairs, pairs)
        gradients.append(teacher.weight.grad.clone())
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)
