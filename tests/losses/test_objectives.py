"""Each loss of a student against its formula (methods 1, 2, 6 and 7), and what the meta-gradient takes from it."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from engine.batch import Batch
from engine.losses.objectives import Objective
from engine.meta.micro_batches import parts
from engine.models.features import over_real, over_real_pairs
from engine.models.network import Outputs

T, ALPHA, BETA = 3.0, 0.3, 7.0
B, C, LAYERS, L, H, HEADS = 3, 3, 2, 4, 5, 2
LENGTHS = [4, 1, 3]
MASK = (torch.arange(L) < torch.tensor(LENGTHS)[:, None]).long()


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


def patient(student, teacher, b):
    """methods 2, of one example: the first tokens' states of length 1, their squared differences divided by all entries."""
    pairs = zip(student[1][b, :, 0], teacher[1][b, :, 0], strict=True)
    return sum(((s / (s @ s).sqrt() - t / (t @ t).sqrt()) ** 2).sum() for s, t in pairs) / (LAYERS * H)


def tinybert(student, teacher, b):
    """methods 7, of one example: attention, hidden states and domain features, each a mean over its real tokens."""
    n, total = LENGTHS[b], (student[3][b] - teacher[3][b]).square().mean()
    for i in range(LAYERS):
        total = total + (student[1][b, i, :n] - teacher[1][b, i, :n]).square().mean()
        total = total + (student[2][b, i, :, :n, :n] - teacher[2][b, i, :, :n, :n]).square().mean()
    return total


class Case:
    """What a student and K teachers compute, requiring gradient: logits and, for features, hidden states [B, layers, L, H],
    scores [B, layers, heads, L, L] and domain features [B, H], with numbers also where a token is padding."""

    def __init__(
        self, kind="kl", regression=False, K=2, features="none", weights="mean", by_example=None, on_logits=True
    ):
        generator = torch.Generator().manual_seed(K)

        def randn(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        shapes = [(B, 1 if regression else C), (B, LAYERS, L, H), (B, LAYERS, HEADS, L, L), (B, H)]
        models = [[(2 * randn(*shape)).requires_grad_() for shape in shapes] for _ in range(1 + K)]
        self.student, *self.teachers = models
        self.labels = randn(B) if regression else torch.arange(B) % C
        self.weights = None
        if weights != "mean":
            self.weights = torch.softmax(randn(K), 0).requires_grad_(weights == "learned")
        self.by_example = None if by_example is None else torch.tensor(by_example, dtype=torch.float64)
        self.features, self.kind, self.regression = features, kind, regression
        self.objective = Objective(kind, T, ALPHA, regression, features, BETA, on_logits)
        self.given = self.outputs(self.student), [self.outputs(t) for t in self.teachers], self.labels, self.weights
        self.u = Outputs(*(None if t is None else randn(*t.shape) for t in self.given[0]))

    def outputs(self, model):
        """As engine.models.features gives them; leaves, so that gradients are those of the outputs."""
        logits, hidden, scores, domain = (t.detach() for t in model)
        found = {"none": (logits,), "patient": (logits, hidden[:, :, 0]),
                 "tinybert": (logits, over_real(hidden, MASK), over_real_pairs(scores, MASK), domain)}  # fmt: skip
        return Outputs(*(t.clone().requires_grad_() for t in found[self.features]))

    def loss(self):
        return self.objective.distil(*self.given, self.by_example)

    def taught(self):
        """Everything that the teachers bring, one tensor after the other."""
        learned = [self.weights] if self.weights is not None and self.weights.requires_grad else []
        return [*(t for o in self.given[1] for t in o.given()), *learned]

    def formula(self):
        student, teachers = self.student, self.teachers
        w = [1 / len(teachers)] * len(teachers) if self.weights is None else self.weights
        loss = 0.0
        if self.objective.on_logits:
            mean = sum(share * t[0] for share, t in zip(w, teachers, strict=True))
            loss = ALPHA * soft(self.kind, student[0], mean) + (1 - ALPHA) * hard(
                student[0], self.labels, self.regression
            )
        if self.features != "none":
            compare = {"patient": patient, "tinybert": tinybert}[self.features]
            by_example = torch.ones(B) if self.by_example is None else self.by_example
            each = [sum(share * compare(student, t, b) for share, t in zip(w, teachers, strict=True)) for b in range(B)]
            loss = loss + BETA * sum(e * x for e, x in zip(by_example, each, strict=True)) / B
        return loss


CASES = [(kind, False, K) for kind in ("kl", "mse_prob", "mse_logits") for K in (1, 3)] + [("mse_logits", True, 2)]
every = pytest.mark.parametrize(("kind", "regression", "K"), CASES)
featured = pytest.mark.parametrize("features", ["none", "patient", "tinybert"])
weighted = pytest.mark.parametrize("weights", ["mean", "given", "learned"])


def close(got, expected, rtol=1e-12):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * b.abs().max().item())


@every
@featured
@weighted
def test_loss_slopes_and_cotangents(kind, regression, K, features, weights):
    """The value is the formula's; slopes and cotangents d/do < dL/do_S, u > are autograd's of that value, to every output."""
    case = Case(kind, regression, K, features, weights)
    loss = case.loss()
    torch.testing.assert_close(loss, case.formula(), rtol=1e-13, atol=1e-13)
    slopes = torch.autograd.grad(loss, case.given[0].given(), create_graph=True)
    inner = sum((s * u).sum() for s, u in zip(slopes, case.u.given(), strict=True))
    expected = torch.autograd.grad(inner, case.taught())
    with torch.no_grad():  # the caller's gradient mode must not matter
        value, found = case.objective.slopes(*case.given)
        got, slope = case.objective.cotangents(*case.given[:3], case.u, case.weights)
    torch.testing.assert_close(value, loss.detach(), rtol=1e-13, atol=0)
    close(found, [s.detach() for s in slopes])
    assert len(got) == K and (slope is not None) == (weights == "learned")
    cotangents = [*(c for o in got for c in o.given()), *([] if slope is None else [slope])]
    assert all(b.abs().max() > 1e-4 for b in expected)
    close(cotangents, expected)
    assert not any(t.requires_grad for t in (value, *found, *cotangents))
    assert all(t.grad is None for t in [*case.given[0].given(), *case.taught()])


@pytest.mark.parametrize(
    ("kind", "regression", "features"),
    [("kl", False, "tinybert"), ("kl", False, "none"), ("mse_prob", False, "none"), ("mse_logits", True, "patient")],
)
def test_differentiable_twice(kind, regression, features):
    """Reverse over reverse for `double_backward`, forward over reverse for the walk back of `exact`; with weights."""
    case, small = Case(kind, regression, 1, features, "learned"), (slice(2), slice(1), slice(1), slice(2), slice(2))
    cut = [[t.detach()[small[: t.ndim] if t.ndim > 2 else slice(2)].clone().requires_grad_() for t in o.given()]
           for o in (case.given[0], *case.given[1])]  # fmt: skip
    each, by_example = len(cut[0]), torch.tensor([0.5, 2.0], dtype=torch.float64)

    def loss(weights, *outputs):
        student, *teachers = (Outputs(*outputs[i : i + each]) for i in range(0, len(outputs), each))
        return case.objective.distil(student, teachers, case.labels[:2], weights, by_example)

    assert gradcheck(loss, [case.weights, *cut[0], *cut[1]], check_forward_ad=True)
    assert gradgradcheck(loss, [case.weights, *cut[0], *cut[1]], check_fwd_over_rev=True)


@pytest.mark.parametrize("on_logits", [True, False])
@pytest.mark.parametrize("features", ["patient", "tinybert"])
def test_every_example_has_its_own_weight(features, on_logits):
    """Where weights collapse into their mean, as in the published code, permuted ones would give one loss."""
    weights, losses = [0.5, 2.0, 0.0], []
    for by_example in (weights, weights[::-1], [1.0, 4.0, 0.0]):
        case = Case(features=features, by_example=by_example, on_logits=on_logits)
        losses.append(case.loss())
        torch.testing.assert_close(losses[-1], case.formula(), rtol=1e-13, atol=0)
    assert (losses[0] - losses[1]).abs() > 1e-3
    if not on_logits:
        assert (losses[2] / losses[0]).item() == pytest.approx(2)  # not divided by their sum
        case = Case(features=features, by_example=weights, on_logits=False)
        slopes = case.objective.slopes(*case.given, case.by_example)[1]
        assert not slopes[0].any() and all(s[1].any() and not s[2].any() for s in slopes[1:])
        with pytest.raises(ValueError, match="needs a feature_loss"):
            Objective(on_logits=False)


@pytest.mark.parametrize("labels", [[0, -100, 2], [-100, -100, 1], [-100] * B], ids=str)
@pytest.mark.parametrize("kind", ["kl", "mse_logits"])
def test_a_label_of_minus_100_does_not_count(kind, labels):
    """The mean of cross-entropies is over the others, 0 where there is none; soft and features are over all examples. So
    it is for the whole batch, and for its parts of one example, of which some have no label."""
    case = Case(kind, K=2, features="patient")
    counted = [b for b in range(B) if labels[b] != -100]
    case.labels = torch.tensor(labels)
    expected = hard(case.student[0][counted], case.labels[counted], False) if counted else 0.0
    torch.testing.assert_close(case.objective.hard(case.student[0], case.labels), expected + case.student[0].sum() * 0)
    teachers = [case.outputs(t) for t in case.teachers]
    loss, slopes = case.objective.slopes(case.given[0], teachers, case.labels)
    case.labels = torch.zeros(B).long()
    rest = case.formula() - (1 - ALPHA) * hard(case.student[0], case.labels, False)
    torch.testing.assert_close(loss, (rest + (1 - ALPHA) * expected).detach(), rtol=1e-13, atol=0)
    batch = Batch(torch.tensor(labels), {"row": {"number": torch.arange(B)}})
    found = []
    for part, objective in parts(batch, case.objective, 1):
        rows = part.inputs["row"]["number"]
        each = [Outputs(*(None if t is None else t[rows] for t in o)) for o in (case.given[0], *teachers)]
        found.append(objective.slopes(each[0], each[1:], part.labels))
    torch.testing.assert_close(sum(value for value, _ in found), loss, rtol=1e-12, atol=0)
    close([torch.cat([s[i] for _, s in found]) for i in range(2)], slopes)


@pytest.mark.parametrize(
    ("logits", "labels", "regression"),
    [((4, 2), (8,), True), ((4, 1), (5,), True), ((3,), (3, 1), True), ((4, 2), (8,), False), ((4, 2), (4, 2), False)],
)
def test_labels_that_do_not_fit_the_logits(logits, labels, regression):
    """Both shapes are said, by every soft loss: flattened, [4, 2] would pass for [8], and [4, 1] against [4] makes [4, 4]."""
    student, labels = torch.zeros(logits), torch.zeros(labels, dtype=torch.float32 if regression else torch.int64)
    for kind in ["mse_logits"] if regression else ["kl", "mse_prob", "mse_logits"]:
        objective = Objective(kind, T, ALPHA, regression)
        for loss in (
            lambda o=objective: o.hard(student, labels),
            lambda o=objective: o.distil(Outputs(student), [Outputs(student)], labels),
        ):
            with pytest.raises(ValueError) as error:
                loss()
            assert str(tuple(student.shape)) in str(error.value) and str(tuple(labels.shape)) in str(error.value)


def test_an_output_that_no_loss_sees_has_zeros():
    case = Case(features="patient")
    blind = Objective("kl", T, ALPHA)
    _, (_, slope) = blind.slopes(*case.given[:3])
    assert slope.shape == (B, LAYERS, H) and not slope.any()
    assert all(o.features is None for o in blind.cotangents(*case.given[:3], case.u)[0])
    other = Objective("mse_prob", T, ALPHA).cotangents(*case.given[:3], case.u)[0]
    assert all(o.logits.any() and not o.features.any() for o in other)


def test_features_of_length_0_have_finite_gradients():
    case = Case(K=1, features="patient")
    student, (teacher,) = case.given[:2]
    with torch.no_grad():
        student.features[0, 0] = teacher.features[1, 1] = 0
    assert all(g.isfinite().all() for g in torch.autograd.grad(case.loss(), [*student.given(), *teacher.given()]))


def states(features=(B, LAYERS, L, H), attention=(B, LAYERS, HEADS, L, L), domain=(B, H)):
    return Outputs(
        torch.zeros(B, C), *(None if shape is None else torch.ones(shape) for shape in (features, attention, domain))
    )


OTHER = {
    "fewer heads": {"attention": (B, LAYERS, 1, L, L)}, "another width": {"features": (B, LAYERS, L, H + 1)},
    "width 1, which would be stretched": {"features": (B, LAYERS, L, 1)}, "fewer layers": {"features": (B, 1, L, H)},
    "no scores": {"attention": None}, "no states": {"features": None}, "no domain": {"domain": None},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["patient", "tinybert"])
@pytest.mark.parametrize("name", OTHER)
def test_states_that_do_not_fit(name, kind):
    for student, teacher in ((states(), states(**OTHER[name])), (states(**OTHER[name]), states())):
        with pytest.raises(ValueError, match=rf"{kind} loss compares states of one shape.*--feature-loss none"):
            Objective(feature_loss=kind).distil(student, [student, teacher], torch.zeros(B).long())
    if name == "no scores" and kind == "tinybert":  # not even where both have none
        with pytest.raises(ValueError, match="tinybert loss compares states of one shape"):
            Objective(feature_loss=kind).distil(student, [student], torch.zeros(B).long())


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
