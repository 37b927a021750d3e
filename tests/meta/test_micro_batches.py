"""Batches in parts: losses, gradients and meta-gradients are those of the whole batch."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_oracle import Setting, apart
from scenes import Scene, batch, difference
from torch import nn

from engine import MetaStep, Objective
from engine.batch import Batch
from engine.meta.micro_batches import parts
from engine.meta.strategies import STRATEGIES
from engine.models.network import Outputs

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
        assert part.objective.share == len(part.batch.labels) / examples
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


OBJECTIVES = [
    Objective("kl", 2.0, 0.6), Objective("mse_prob", 2.0, 0.6), Objective("mse_logits", 2.0, 0.6),
    Objective("mse_logits", regression=True), Objective("kl", 2.0, 0.6, feature_loss="patient"),
]  # fmt: skip


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: f"{o.soft_loss} {o.feature_loss} {o.regression}")
@settings(max_examples=15)
@given(examples=st.integers(2, 7), size=st.integers(1, 6))
def test_losses_and_derivatives_add_up(objective, examples, size):
    classes = 1 if objective.regression else 3
    torch.manual_seed(examples)
    features = objective.feature_loss != "none"

    def outputs(logits=None):
        logits = torch.randn(examples, classes, dtype=torch.float64)
        return Outputs(logits, torch.randn(examples, 2, 4, dtype=torch.float64) if features else None)

    student, tangents, teachers = outputs(), outputs(), [outputs(), outputs()]
    labels = torch.randn(examples).double() if objective.regression else torch.randint(3, (examples,))
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)

    def cut(o, rows):
        return Outputs(*(None if t is None else t[rows] for t in o))

    whole = Batch(labels, {"row": torch.arange(examples)})
    found = [(part.objective, part.batch.inputs["row"], part.batch.labels) for part in parts(whole, objective, size)]

    def compare(expected, got):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)

    def each(call):
        return [call(o, cut(student, r), [cut(t, r) for t in teachers], y, cut(tangents, r)) for o, r, y in found]

    compare(objective.hard(student.logits, labels), sum(each(lambda o, s, t, y, u: o.hard(s.logits, y))))
    compare(
        objective.distil(student, teachers, labels, weights),
        sum(each(lambda o, s, t, y, u: o.distil(s, t, y, weights))),
    )
    for i in (0, 1):
        expected = objective.slopes_along(student, tangents, teachers, labels, weights)[i]
        got = each(lambda o, s, t, y, u, i=i: o.slopes_along(s, u, t, y, weights)[i])
        compare(expected, [torch.cat(pieces) for pieces in zip(*got, strict=True)])
    compare(
        objective.slopes(student, teachers, labels, weights)[1],
        [torch.cat(p) for p in zip(*each(lambda o, s, t, y, u: o.slopes(s, t, y, weights)[1]), strict=True)],
    )
    expected, _ = objective.cotangents(student, teachers, labels, tangents, weights)
    got = each(lambda o, s, t, y, u: o.cotangents(s, t, y, u, weights)[0])
    for k, whole_c in enumerate(expected):
        compare(whole_c.given(), [torch.cat(p) for p in zip(*(g[k].given() for g in got), strict=True)])
    learned = weights.clone().requires_grad_()
    _, expected = objective.cotangents(student, teachers, labels, tangents, learned)
    compare(expected, sum(each(lambda o, s, t, y, u: o.cotangents(s, t, y, u, learned)[1])))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "settings",
    [
        {}, {"pilots": 2}, {"optimizer": "adamw", "pilots": 2}, {"weights": "learned"}, {"features": True},
        {"checkpointing": "both"}, {"soft_loss": "mse_prob", "quizzes": 2}, {"features": "tinybert"},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("size", [1, 2])
def test_meta_gradients_are_those_of_the_whole_batch(strategy, settings, size):
    """Without dropout, whose masks are drawn part by part."""
    whole = Scene("distilbert", ["bert", "bert"], dropout=0.0, **settings)
    in_parts = Scene("distilbert", ["bert", "bert"], dropout=0.0, micro_batch=size, **settings)
    losses, expected, _ = whole.run(STRATEGIES[strategy])
    found_losses, found, _ = in_parts.run(STRATEGIES[strategy])
    assert difference(found, expected) < TOLERANCE[strategy]
    torch.testing.assert_close(found_losses, losses, rtol=1e-12, atol=0)


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
        super().__init__(*args, **kwargs)
        for module in (self.student, *self.teachers):
            for m in module.modules():
                if isinstance(m, nn.Dropout):
                    m.p = 0.0
        self.student.norm = nn.Identity()  # a batch norm's statistics are those of the parts


@pytest.mark.parametrize("method", ["finetune", "kd", "metadistil"])
@pytest.mark.parametrize("independent_masks", [False, True])
def test_methods_take_the_same_steps(method, independent_masks):
    whole, in_parts = (WithoutDropout(method, size=2, independent_masks=independent_masks) for _ in range(2))
    in_parts.state.micro_batch = 4  # of 6
    if in_parts.state.meta_step:
        in_parts.state.meta_step.problem.micro_batch = 4
    for ours, theirs in zip(in_parts.run(), whole.run(), strict=True):
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-8, atol=0)
    for ours, theirs in zip([in_parts.student, *in_parts.teachers], [whole.student, *whole.teachers], strict=True):
        assert apart(ours, theirs) < AFTER_ADAMW


def test_a_meta_step_for_any_modules():
    """Inputs that are one tensor; a setting that cannot be."""

    def step(**settings):
        torch.manual_seed(0)
        student, teacher = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()
        return MetaStep(student, [teacher], pilot_lr=0.1, **settings), teacher

    torch.manual_seed(1)
    pairs = [(torch.randn(5, 3, dtype=torch.float64), torch.randint(2, (5,)))]
    gradients = []
    for given_settings in ({}, {"micro_batch_size": 2}):
        meta_step, teacher = step(**given_settings)
        meta_step.meta_gradient(pairs, pairs)
        gradients.append(teacher.weight.grad.clone())
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)
    with pytest.raises(ValueError, match="micro_batch_size is 0; it must be at least 1"):
        step(micro_batch_size=0)


def test_batches_of_the_scene_can_be_cut():
    """So that the comparisons above compare something."""
    assert len(parts(batch(0, 3), Objective(), 2)) == 2
