"""Each loss of a student against its formula (methods 1), and what the meta-gradient takes from it."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from engine.objectives import Objective

CLASSIFICATION = ["kl", "mse_prob", "mse_logits"]
T, ALPHA = 3.0, 0.3


def softmax(z):
    e = z.exp()
    return e / e.sum(-1, keepdim=True)


def soft(kind, student, mean):
    """methods 1, as the sums that it writes."""
    B, C = student.shape
    p, q = softmax(mean / T), softmax(student / T)
    return {
        "kl": T**2 * (p * (p / q).log()).sum() / B,
        "mse_prob": T**2 * ((p - q) ** 2).sum() / (B * C),
        "mse_logits": ((mean - student) ** 2).sum() / (B * C),
    }[kind]


def hard(student, labels, regression):
    if regression:
        return ((student[:, 0] - labels) ** 2).sum() / len(labels)
    return -softmax(student)[range(len(labels)), labels].log().sum() / len(labels)


def formula(kind, regression, student, teachers, labels):
    mean = sum(teachers) / len(teachers)
    return ALPHA * soft(kind, student, mean) + (1 - ALPHA) * hard(student, labels, regression)


def case(K, regression=False, B=4, C=3):
    generator = torch.Generator().manual_seed(K)
    C = 1 if regression else C
    student, u, *teachers = (
        2 * torch.randn(B, C, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(K + 2)
    )
    student, teachers = student.detach().requires_grad_(), [z.detach().requires_grad_() for z in teachers]
    labels = torch.randn(B, generator=generator, dtype=torch.float64) if regression else torch.arange(B) % C
    return student, teachers, labels, u.detach()


CASES = [(kind, False, K) for kind in CLASSIFICATION for K in (1, 2, 3)] + [("mse_logits", True, K) for K in (1, 2)]
EVERY = pytest.mark.parametrize(("kind", "regression", "K"), CASES)


@EVERY
def test_loss_and_gradients(kind, regression, K):
    student, teachers, labels, _ = case(K, regression)
    objective = Objective(kind, T, ALPHA, regression)
    got = objective.distil(student, teachers, labels)
    expected = formula(kind, regression, student, teachers, labels)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)
    leaves = [student, *teachers]
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@EVERY
def test_cotangents(kind, regression, K):
    student, teachers, labels, u = case(K, regression)
    pilot_lr = 0.7
    loss = formula(kind, regression, student, teachers, labels)
    (slope,) = torch.autograd.grad(loss, student, create_graph=True)
    expected = torch.autograd.grad(-pilot_lr * (slope * u).sum(), teachers)
    objective = Objective(kind, T, ALPHA, regression)
    with torch.no_grad():  # the caller's gradient mode must not matter
        got = objective.cotangents(student, teachers, labels, u, pilot_lr)
    assert len(got) == K
    for a, b in zip(got, expected, strict=True):
        assert b.abs().max() > 1e-3
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert all(not c.requires_grad for c in got)


@pytest.mark.parametrize("kind", CLASSIFICATION)
def test_sizes(kind):
    """The scale that a user tunes alpha and T against: one row, two classes, probabilities 0.8 against 0.5."""
    mean, student = T * torch.tensor([[0.8, 0.2]]).log(), torch.zeros(1, 2)
    objective = Objective(kind, T, alpha=1.0)
    expected = {
        "kl": T**2 * (0.8 * torch.tensor(1.6).log() + 0.2 * torch.tensor(0.4).log()),
        "mse_prob": T**2 * torch.tensor(0.09),  # the mean over two equal entries, not their sum
        "mse_logits": (mean**2).mean(),
    }[kind]
    got = objective.distil(student, [mean], torch.tensor([0]))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
    twice = objective.distil(student.expand(2, 2), [mean.expand(2, 2)], torch.tensor([0, 0]))
    torch.testing.assert_close(twice, got, rtol=1e-6, atol=0)  # a mean over the batch


def test_hard_losses():
    labels = torch.tensor([0.0, 2.0])
    regression = Objective("mse_logits", regression=True)
    assert regression.hard(torch.tensor([[1.0], [4.0]]), labels).item() == (1 + 4) / 2
    quarter = torch.tensor([[0.25, 0.75]]).log()
    assert Objective().hard(quarter, torch.tensor([0])).item() == pytest.approx(1.386294, abs=1e-6)


def test_regression_of_one_row_does_not_broadcast():
    """[B, 1] against [B] would make [B, B] out of a missing squeeze, with B = 1 [1] against []."""
    objective = Objective("mse_logits", alpha=0.0, regression=True)
    assert objective.hard(torch.tensor([[3.0]]), torch.tensor([1.0])).item() == 4
    student = torch.tensor([[0.0], [10.0]])
    assert objective.distil(student, [student], torch.tensor([0.0, 10.0])).item() == 0


@pytest.mark.parametrize("kind", ["kl", "mse_prob"])
def test_one_output_has_no_soft_classes(kind):
    """methods 1: the softmax of one logit is constant, so that teachers would get and give nothing."""
    with pytest.raises(ValueError, match="mse_logits"):
        Objective(kind, T, ALPHA, regression=True)


@pytest.mark.parametrize(("kind", "regression"), [*((k, False) for k in CLASSIFICATION), ("mse_logits", True)])
def test_differentiable_twice(kind, regression):
    """Reverse over reverse for `double_backward`, forward over reverse for the walk back of `exact`."""
    student, teachers, labels, _ = case(2, regression, B=3)
    objective = Objective(kind, T, ALPHA, regression)

    def loss(student, *teachers):
        return objective.distil(student, teachers, labels)

    assert gradcheck(loss, [student, *teachers], check_forward_ad=True)
    assert gradgradcheck(loss, [student, *teachers], check_fwd_over_rev=True)
