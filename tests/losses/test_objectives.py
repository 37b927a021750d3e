"""Each loss of a student against its formula (methods 1 and 2), and what the meta-gradient takes from it."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from engine.losses.objectives import Objective
from engine.models.network import Outputs

CLASSIFICATION = ["kl", "mse_prob", "mse_logits"]
T, ALPHA, BETA = 3.0, 0.3, 7.0
B, C, LAYERS, H = 4, 3, 2, 5


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


def patient(student, teacher):
    """methods 2, row by row."""
    total = 0.0
    for b in range(student.shape[0]):
        for i in range(student.shape[1]):
            s, t = student[b, i], teacher[b, i]
            total = total + ((s / (s @ s).sqrt() - t / (t @ t).sqrt()) ** 2).sum()
    return total / student.numel()


def formula(kind, regression, student, teachers, labels, weights, features):
    mean = sum(w * t.logits for w, t in zip(weights, teachers, strict=True))
    loss = ALPHA * soft(kind, student.logits, mean) + (1 - ALPHA) * hard(student.logits, labels, regression)
    if features:
        pairs = zip(weights, teachers, strict=True)
        loss = loss + BETA * sum(w * patient(student.features, t.features) for w, t in pairs)
    return loss


class Case:
    """Outputs of a student and K teachers that require gradient, tangents u of the student's, labels, weights [K]."""

    def __init__(self, kind, regression, K, features, weights):
        generator = torch.Generator().manual_seed(K)

        def outputs(requires_grad=True):
            shapes = [(B, 1 if regression else C), *([(B, LAYERS, H)] if features else [])]
            found = [2 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
            return Outputs(*(t.requires_grad_(requires_grad) for t in found))

        self.student, self.u, self.teachers = outputs(), outputs(False), [outputs() for _ in range(K)]
        self.labels = torch.randn(B, generator=generator, dtype=torch.float64) if regression else torch.arange(B) % C
        self.weights = None
        if weights != "mean":
            self.weights = torch.softmax(torch.randn(K, generator=generator, dtype=torch.float64), 0)
            self.weights.requires_grad_(weights == "learned")
        self.objective = Objective(kind, T, ALPHA, regression, "patient" if features else "none", BETA)
        self.plain = self.weights is None and [1 / K] * K or self.weights
        self.settings = kind, regression, features

    def loss(self):
        return self.objective.distil(self.student, self.teachers, self.labels, self.weights)

    def formula(self):
        kind, regression, features = self.settings
        return formula(kind, regression, self.student, self.teachers, self.labels, self.plain, features)

    def taught(self):
        """Everything that the teachers bring, one tensor after the other."""
        learned = [self.weights] if self.weights is not None and self.weights.requires_grad else []
        return [*(t for o in self.teachers for t in o.given()), *learned]


CASES = [(kind, False, K) for kind in CLASSIFICATION for K in (1, 2, 3)] + [("mse_logits", True, K) for K in (1, 2)]
every = pytest.mark.parametrize(("kind", "regression", "K"), CASES)
featured = pytest.mark.parametrize("features", [False, True], ids=["logits", "features"])
weighted = pytest.mark.parametrize("weights", ["mean", "given", "learned"])


def close(got, expected, rtol):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * b.abs().max().item())


@every
@featured
@weighted
def test_loss_and_gradients(kind, regression, K, features, weights):
    case = Case(kind, regression, K, features, weights)
    got, expected = case.loss(), case.formula()
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)
    leaves = [*case.student.given(), *case.taught()]
    close(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves), 1e-12)


@every
@featured
@weighted
def test_cotangents(kind, regression, K, features, weights):
    """d/do < dL/do_S, u > for every output o of a teacher, and for weights that learn."""
    case = Case(kind, regression, K, features, weights)
    slopes = torch.autograd.grad(case.formula(), case.student.given(), create_graph=True)
    inner = sum((s * u).sum() for s, u in zip(slopes, case.u.given(), strict=True))
    expected = torch.autograd.grad(inner, case.taught())
    with torch.no_grad():  # the caller's gradient mode must not matter
        got, slope = case.objective.cotangents(case.student, case.teachers, case.labels, case.u, case.weights)
    assert len(got) == K and all((o.features is not None) == features for o in got)
    assert (slope is not None) == (weights == "learned")
    given = [*(c for o in got for c in o.given()), *([] if slope is None else [slope])]
    assert all(b.abs().max() > 1e-4 for b in expected)
    close(given, expected, 1e-12)
    assert not any(c.requires_grad for c in given)
    assert all(t.grad is None for t in [*case.student.given(), *case.taught()])


@every
@featured
@weighted
def test_slopes(kind, regression, K, features, weights):
    case = Case(kind, regression, K, features, weights)
    expected = torch.autograd.grad(case.formula(), case.student.given())
    with torch.no_grad():
        student = case.student.detached()  # the head alone: the models' graphs are not asked for
        loss, slopes = case.objective.slopes(student, case.teachers, case.labels, case.weights)
    torch.testing.assert_close(loss, case.formula().detach(), rtol=1e-13, atol=0)
    close(slopes, expected, 1e-12)
    assert not any(t.requires_grad for t in (loss, *slopes))


def test_an_output_that_no_loss_sees_has_zeros():
    case = Case("kl", False, 2, True, "mean")
    blind = Objective("kl", T, ALPHA)
    _, (_, slope) = blind.slopes(case.student, case.teachers, case.labels)
    assert slope.shape == (B, LAYERS, H) and not slope.any()
    assert all(o.features is None for o in blind.cotangents(case.student, case.teachers, case.labels, case.u)[0])
    other = Objective("mse_prob", T, ALPHA).cotangents(case.student, case.teachers, case.labels, case.u)[0]
    assert all(o.logits.any() and not o.features.any() for o in other)


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
    got = objective.distil(Outputs(student), [Outputs(mean)], torch.tensor([0]))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
    twice = Outputs(student.expand(2, 2)), [Outputs(mean.expand(2, 2))], torch.tensor([0, 0])
    torch.testing.assert_close(objective.distil(*twice), got, rtol=1e-6, atol=0)  # a mean over the batch


def test_size_of_the_feature_loss():
    """Lengths do not count; unit vectors at a right angle are 2 apart, over H = 4 entries."""
    student = torch.tensor([[[3.0, 0, 0, 0]]])
    logits, labels = torch.zeros(1, 2), torch.tensor([0])
    objective = Objective(alpha=1.0, feature_loss="patient", beta=10.0)
    for teacher, expected in (([0, 0, 0.1, 0], 2 / 4), ([7.0, 0, 0, 0], 0.0), ([-1.0, 0, 0, 0], 4 / 4)):
        given = Outputs(logits, torch.tensor([[teacher]]))
        assert objective.distil(Outputs(logits, student), [given], labels).item() == pytest.approx(10 * expected)


def test_features_of_length_0_have_finite_gradients():
    case = Case("kl", False, 1, True, "mean")
    with torch.no_grad():
        case.student.features[0, 0] = 0
        case.teachers[0].features[1, 1] = 0
    assert all(
        g.isfinite().all() for g in torch.autograd.grad(case.loss(), [*case.student.given(), *case.teachers[0].given()])
    )


@pytest.mark.parametrize(
    "shapes", [(None, (4, 2, 5)), ((4, 2, 5), None), ((4, 2, 5), (4, 2, 6)), ((4, 1, 5), (4, 2, 5))]
)
def test_features_that_cannot_be_compared(shapes):
    student, other = (Outputs(torch.zeros(B, C), None if s is None else torch.ones(s)) for s in shapes)
    objective = Objective(feature_loss="patient")
    fitting = student if student.features is not None else other
    with pytest.raises(ValueError, match=r"one shape.*--feature-loss none") as caught:
        objective.distil(student, [fitting, other], torch.zeros(B, dtype=torch.int64))
    assert all(str(shape) in str(caught.value) for shape in shapes)


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
    student = Outputs(torch.tensor([[0.0], [10.0]]))
    assert objective.distil(student, [student], torch.tensor([0.0, 10.0])).item() == 0


@pytest.mark.parametrize("kind", ["kl", "mse_prob"])
def test_one_output_has_no_soft_classes(kind):
    """methods 1: the softmax of one logit is constant, so that teachers would get and give nothing."""
    with pytest.raises(ValueError, match="mse_logits"):
        Objective(kind, T, ALPHA, regression=True)


@featured
@pytest.mark.parametrize(("kind", "regression"), [*((k, False) for k in CLASSIFICATION), ("mse_logits", True)])
def test_differentiable_twice(kind, regression, features):
    """Reverse over reverse for `double_backward`, forward over reverse for the walk back of `exact`; with weights."""
    case = Case(kind, regression, 2, features, "learned")
    each = 2 if features else 1
    leaves = [t.detach()[:2].clone().requires_grad_() for t in [*case.student.given(), *case.taught()[:-1]]]

    def loss(weights, *outputs):
        student, *teachers = (Outputs(*outputs[i : i + each]) for i in range(0, len(outputs), each))
        return case.objective.distil(student, teachers, case.labels[:2], weights)

    assert gradcheck(loss, [case.weights, *leaves], check_forward_ad=True)
    assert gradgradcheck(loss, [case.weights, *leaves], check_fwd_over_rev=True)
