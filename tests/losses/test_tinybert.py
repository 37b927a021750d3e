"""TinyBERT's loss (methods 7) and its weights by example (methods 6), against the sums that they are written as."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from engine.batch import Batch
from engine.losses.objectives import Objective
from engine.meta.micro_batches import parts
from engine.models.features import over_real, over_real_pairs
from engine.models.network import Outputs

B, C, LAYERS, L, H, HEADS = 3, 3, 2, 4, 5, 2
LENGTHS = torch.tensor([4, 1, 3])
MASK = (torch.arange(L) < LENGTHS[:, None]).long()
LABELS = torch.tensor([0, 2, 1])
T, ALPHA, BETA = 2.0, 0.6, 3.0


class States:
    """What a model computes: logits, hidden states, attention scores, with numbers also where a token is padding."""

    def __init__(self, seed, domain=True):
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.logits, self.hidden = randn(B, C), randn(B, LAYERS, L, H)
        self.scores = randn(B, LAYERS, HEADS, L, L)
        self.domain = randn(B, H) if domain else None

    def outputs(self):
        return Outputs(self.logits, over_real(self.hidden, MASK), over_real_pairs(self.scores, MASK), self.domain)


def mean(numbers):
    numbers = list(numbers)
    return sum(numbers) / len(numbers)


def of_example(student, teacher, b):
    """Of one example, number by number: attention, hidden states and domain features, each a mean over real tokens."""
    n, total = int(LENGTHS[b]), 0.0
    for i in range(LAYERS):
        total += mean(
            (student.hidden[b, i, t, h] - teacher.hidden[b, i, t, h]) ** 2 for t in range(n) for h in range(H)
        )
        total += mean(
            (student.scores[b, i, a, q, k] - teacher.scores[b, i, a, q, k]) ** 2
            for a in range(HEADS)
            for q in range(n)
            for k in range(n)
        )
    if student.domain is not None:
        total += mean((student.domain[b, h] - teacher.domain[b, h]) ** 2 for h in range(H))
    return total


def written(student, teachers, weights, by_example):
    return mean(
        by_example[b] * sum(w * of_example(student, t, b) for w, t in zip(weights, teachers, strict=True))
        for b in range(B)
    )


def objective(**changes):
    return Objective("kl", T, ALPHA, False, "tinybert", BETA, **changes)


@pytest.mark.parametrize("by_example", [None, [0.2, 1.5, 0.7]], ids=["alike", "by example"])
@pytest.mark.parametrize("weights", [None, [0.3, 0.7]])
@pytest.mark.parametrize("domain", [False, True])
def test_the_loss_is_the_written_one(domain, weights, by_example):
    student, teachers = States(0, domain), [States(1, domain), States(2, domain)]
    expected = BETA * written(student, teachers, weights or [0.5, 0.5], by_example or [1.0] * B)
    more = [None if w is None else torch.tensor(w, dtype=torch.float64) for w in (weights, by_example)]
    outputs = student.outputs(), [t.outputs() for t in teachers], LABELS
    got = objective(on_logits=False).distil(*outputs, *more)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)
    on_logits = Objective("kl", T, ALPHA).distil(*outputs, more[0])
    torch.testing.assert_close(objective().distil(*outputs, *more), on_logits + expected, rtol=1e-13, atol=0)


def test_without_logits_the_head_learns_nothing():
    student, teacher = States(0), States(1)
    loss, slopes = objective(on_logits=False).slopes(student.outputs(), [teacher.outputs()], LABELS)
    assert loss > 0 and not slopes[0].any() and all(s.any() for s in slopes[1:])
    student.logits += 5
    assert objective(on_logits=False).distil(student.outputs(), [teacher.outputs()], LABELS) == loss
    with pytest.raises(ValueError, match="needs a feature_loss"):
        Objective(on_logits=False)


def test_every_example_has_its_own_weight():
    """Where weights collapse into their mean, as in the published code, every one of these would hold with any weights."""
    student, teacher = States(0).outputs(), States(1).outputs()
    given = objective(on_logits=False)

    def slopes(w):
        return given.slopes(student, [teacher], LABELS, None, torch.tensor(w, dtype=torch.float64))

    _, alike = slopes([1.0, 1.0, 1.0])
    weights = [0.5, 2.0, 3.0]
    loss, found = slopes(weights)
    for got, plain in zip(found[1:], alike[1:], strict=True):
        for b, w in enumerate(weights):
            torch.testing.assert_close(got[b], w * plain[b], rtol=1e-13, atol=1e-16)
    for permuted in ([2.0, 0.5, 3.0], [3.0, 2.0, 0.5]):
        other_loss, other = slopes(permuted)
        assert (other_loss - loss).abs() > 1e-3 and not torch.allclose(other[1], found[1])
    _, silent = slopes([0.0, 1.0, 1.0])
    assert not silent[1][0].any() and silent[1][1].any()
    assert (slopes([1.0, 4.0, 6.0])[0] / loss).item() == pytest.approx(2)  # not divided by their sum


@settings(max_examples=15, deadline=None)
@given(size=st.integers(1, 4), seed=st.integers(0, 9))
def test_parts_of_a_batch_add_up(size, seed):
    student, teachers = States(seed).outputs(), [States(seed + 1).outputs(), States(seed + 2).outputs()]
    w = torch.rand(B, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    batch = Batch(LABELS, {"row": {"number": torch.arange(B)}}, columns={"w": w})

    def cut(outputs, rows):
        return Outputs(*(t[rows] for t in outputs))

    found = []
    for part, share in parts(batch, objective(), size):
        rows = part.inputs["row"]["number"]
        each = cut(student, rows), [cut(t, rows) for t in teachers], part.labels, None, part.columns["w"]
        found.append(share.slopes(*each))
    loss, slopes = objective().slopes(student, teachers, LABELS, None, w)
    torch.testing.assert_close(sum(value for value, _ in found), loss, rtol=1e-13, atol=0)
    for i, whole in enumerate(slopes):
        torch.testing.assert_close(torch.cat([s[i] for _, s in found]), whole, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("on_logits", [True, False])
def test_differentiable_twice(on_logits):
    """Reverse over reverse for `double_backward`, forward over reverse for `exact`; by example, weights, every output."""
    weights = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    by_example = torch.tensor([0.5, 2.0], dtype=torch.float64)
    models = [States(k) for k in range(2)]
    leaves = []
    for states in models:
        for t in (
            states.logits[:2, :2],
            states.hidden[:2, :1, :2, :1],
            states.scores[:2, :1, :1, :2, :2],
            states.domain[:2, :2],
        ):
            leaves.append(t.clone().requires_grad_())
    mask = torch.tensor([[1, 1], [1, 0]])

    def loss(weights, *tensors):
        student, *teachers = (
            Outputs(tensors[i], over_real(tensors[i + 1], mask), over_real_pairs(tensors[i + 2], mask), tensors[i + 3])
            for i in range(0, len(tensors), 4)
        )
        return objective(on_logits=on_logits).distil(student, teachers, torch.tensor([0, 1]), weights, by_example)

    assert gradcheck(loss, [weights, *leaves], check_forward_ad=True)
    assert gradgradcheck(loss, [weights, *leaves], check_fwd_over_rev=True)


@pytest.mark.parametrize("learned", [False, True])
def test_cotangents_are_autograds(learned):
    """d/do < dL/do_S, u > for what every teacher gives, its domain features included."""
    student, u, teachers = States(0).outputs(), States(3).outputs(), [States(1).outputs(), States(2).outputs()]
    student, teachers = student.detached(True), [t.detached(True) for t in teachers]
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64, requires_grad=learned)
    loss = objective().distil(student, teachers, LABELS, weights)
    slopes = torch.autograd.grad(loss, student.given(), create_graph=True)
    inner = sum((s * t).sum() for s, t in zip(slopes, u.given(), strict=True))
    leaves = [*(t for o in teachers for t in o.given()), *([weights] if learned else [])]
    expected = torch.autograd.grad(inner, leaves)
    got, slope = objective().cotangents(student, teachers, LABELS, u, weights)
    found = [*(c for o in got for c in o.given()), *([slope] if learned else [])]
    for a, b in zip(found, expected, strict=True):
        assert b.any()
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def changed(name, **shapes):
    """Outputs of one shape wrong, or one kind missing."""
    states = States(1)
    for attribute, shape in shapes.items():
        setattr(states, attribute, None if shape is None else torch.zeros(shape, dtype=torch.float64))
    return pytest.param(Outputs(states.logits, states.hidden, states.scores, states.domain), id=name)


@pytest.mark.parametrize(
    "teacher",
    [
        changed("fewer heads", scores=(B, LAYERS, 1, L, L)),
        changed("another width", hidden=(B, LAYERS, L, H + 1)),
        changed("width 1, which would be stretched", hidden=(B, LAYERS, L, 1)),
        changed("fewer layers", hidden=(B, 1, L, H)),
        changed("other tokens", hidden=(B, LAYERS, L + 1, H), scores=(B, LAYERS, HEADS, L + 1, L + 1)),
        changed("no scores", scores=None),
        changed("no states", hidden=None),
        changed("no domain", domain=None),
    ],
)
def test_states_that_do_not_fit(teacher):
    student = States(0).outputs()
    for pair in ((student, teacher), (teacher, student)):
        with pytest.raises(ValueError, match=r"tinybert loss compares states of one shape.*--feature-loss none"):
            objective().distil(pair[0], [student, pair[1]], LABELS)


def test_models_that_give_no_scores_on_either_side():
    bare = Outputs(States(0).logits, States(0).hidden)
    with pytest.raises(ValueError, match="tinybert loss compares states of one shape"):
        objective().distil(bare, [bare], LABELS)
