"""The plain torch kernels against the formulas written out, and their first and second derivatives."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from engine.kernels import kd_loss, mean_logits, meta_cotangent

# Relative to the largest expected value. float64: rounding of a few operations. float32: the KL is a difference of
# logarithms near each other, multiplied by T^2 (400 at most here). bf16 is converted first, so it is float32's.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-5, torch.bfloat16: 5e-5}
WEIGHTS = {1: [None, [0.7]], 2: [None, [0.25, 0.75]], 3: [None, [0.2, 0.5, 0.4]]}  # they need not sum to 1
IGNORE = -100


def logits(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def case(K=2, B=5, C=4, dtype=torch.float64):
    labels = torch.arange(B) % C
    labels[1] = IGNORE
    return logits(B, C, dtype=dtype), [logits(B, C, seed=k + 1, dtype=dtype) for k in range(K)], labels


def plain(student, teachers, labels, T, alpha, weights, reduction):
    """The loss in float64, row by row, with exponentials as they stand in the formula."""
    weights = weights or [1 / len(teachers)] * len(teachers)
    soft, hard = [], []
    for r in range(len(student)):
        z = student[r].double()
        mean = sum(w * t[r].double() for w, t in zip(weights, teachers, strict=True))
        p, q = (mean / T).exp(), (z / T).exp()
        p, q = p / p.sum(), q / q.sum()
        soft.append(alpha * T**2 * (p * (p / q).log()).sum())
        if labels is None or labels[r] == IGNORE:
            hard.append(torch.zeros((), dtype=torch.float64))
        else:
            hard.append(-(1 - alpha) * (z.exp() / z.exp().sum())[labels[r]].log())
    soft, hard = torch.stack(soft), torch.stack(hard)
    counted = 1 if labels is None else (labels != IGNORE).sum()
    if reduction == "mean":
        return soft.sum() / len(soft) + hard.sum() / counted
    return (soft + hard).sum() if reduction == "sum" else soft + hard


def error(got, expected):
    return ((got.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("alpha", [0, 0.3, 1])
@pytest.mark.parametrize("T", [0.5, 1, 5, 20])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_loss(dtype, T, alpha, reduction):
    for K, choices in WEIGHTS.items():
        student, teachers, labels = case(K, dtype=dtype)
        for weights in choices:
            for y in (labels, None):
                if alpha == 0 and y is None:
                    continue  # no loss is left
                got = kd_loss(
                    student, teachers, y, temperature=T, alpha=alpha, weights=weights, reduction=reduction
                )  # fmt: skip
                assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
                assert error(got, plain(student, teachers, y, T, alpha, weights, reduction)) < TOLERANCE[dtype]


def test_no_teacher_weight_is_left_without_soft_loss():
    student, teachers, _ = case()
    assert kd_loss(student, teachers, None, temperature=5, alpha=0).item() == 0


def test_other_ignored_label():
    student, teachers, labels = case()
    other = torch.where(labels == IGNORE, 7, labels)
    settings = {"temperature": 2, "alpha": 0.3}
    assert torch.equal(
        kd_loss(student, teachers, other, ignore_index=7, **settings), kd_loss(student, teachers, labels, **settings)
    )


def test_any_number_of_leading_dimensions():
    student, teachers, labels = case(B=6)
    flat = kd_loss(student, teachers, labels, temperature=2, alpha=0.3, reduction="none")
    shaped = kd_loss(
        student.view(2, 3, 4), [z.view(2, 3, 4) for z in teachers], labels.view(2, 3), temperature=2, alpha=0.3,
        reduction="none",
    )  # fmt: skip
    assert shaped.shape == (2, 3)
    assert torch.equal(shaped.flatten(), flat)


def test_equal_logits_lose_nothing_and_far_ones_stay_finite():
    student, _, labels = case()
    assert kd_loss(student, [student, student], None, temperature=5, alpha=1).abs() < 1e-14
    far = torch.full((2, 3), -1e4)
    far[:, 0] = 1e4
    loss = kd_loss(far.flip(-1).requires_grad_(), [far], labels[:2].clamp_min(0), temperature=1, alpha=0.5)
    assert loss.isfinite()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("K", "T", "alpha"), [(1, 0.5, 0.3), (2, 5, 0.3), (3, 20, 1), (3, 1, 0)])
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_derivatives(check, K, T, alpha, reduction):
    student, teachers, labels = case(K, B=3, C=3)
    weights = WEIGHTS[K][1]
    leaves = [z.requires_grad_() for z in [student, *teachers]]

    def loss(student, *teachers):
        return kd_loss(
            student, teachers, labels, temperature=T, alpha=alpha, weights=weights, reduction=reduction
        )  # fmt: skip

    assert check(loss, leaves)


def test_derivatives_forward_over_reverse():
    """What the walk back over several pilot steps needs."""
    student, teachers, labels = case(2, B=3, C=3)
    leaves = [z.requires_grad_() for z in [student, *teachers]]
    assert gradgradcheck(
        lambda s, *t: kd_loss(s, t, labels, temperature=5, alpha=0.3), leaves, check_fwd_over_rev=True
    )  # fmt: skip


def test_gradient_formula_in_the_docstring():
    student, teachers, labels = case(3)
    T, alpha, weights, R = 5, 0.3, [0.2, 0.5, 0.3], len(student)
    leaves = [z.requires_grad_() for z in [student, *teachers]]
    loss = kd_loss(student, teachers, None, temperature=T, alpha=alpha, weights=weights)
    dz_S, *dz = torch.autograd.grad(loss, leaves)
    p = torch.softmax(sum(w * z for w, z in zip(weights, teachers, strict=True)) / T, -1)
    q = torch.softmax(student / T, -1)
    g = p.log() - q.log()
    assert error(dz_S, alpha * T / R * (q - p)) < 1e-13
    for w, d in zip(weights, dz, strict=True):
        assert error(d, alpha * T / R * w * p * (g - (p * g).sum(-1, keepdim=True))) < 1e-13


@pytest.mark.parametrize("T", [0.5, 1, 5, 20])
@pytest.mark.parametrize("K", [1, 2, 3])
def test_meta_cotangent(K, T):
    """d/dz_k < dL/dz_S, u >, with the labels in L: the cross-entropy must carry nothing."""
    alpha = 0.3
    for weights in WEIGHTS[K]:
        student, teachers, labels = case(K)
        u = logits(*student.shape, seed=9)
        leaves = [z.requires_grad_() for z in [student, *teachers]]
        loss = kd_loss(student, teachers, labels, temperature=T, alpha=alpha, weights=weights)
        (slope,) = torch.autograd.grad(loss, student, create_graph=True)
        expected = torch.autograd.grad((slope * u).sum(), leaves[1:])
        got = meta_cotangent(student, teachers, u, temperature=T, alpha=alpha, weights=weights)
        for a, b in zip(got, expected, strict=True):
            assert (a - b).abs().max() < 1e-14 * max(1, b.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_meta_cotangent_in_low_precision_computes_in_float32(dtype):
    student, teachers, _ = case(2, dtype=dtype)
    u = logits(*student.shape, seed=9, dtype=dtype)
    settings = {"temperature": 5, "alpha": 0.3}
    expected = meta_cotangent(student.double(), [z.double() for z in teachers], u.double(), **settings)
    for a, b in zip(meta_cotangent(student, teachers, u, **settings), expected, strict=True):
        assert a.dtype == torch.float32
        assert error(a, b) < 1e-5  # float32 rounding of u - <p, u>


def test_weights_may_be_a_tensor_that_learns():
    student, teachers, labels = case(2)
    weights = torch.tensor([0.25, 0.75], dtype=torch.float64, requires_grad=True)
    settings = {"temperature": 2, "alpha": 0.3}
    loss = kd_loss(student, teachers, labels, weights=weights, **settings)
    assert torch.equal(loss, kd_loss(student, teachers, labels, weights=[0.25, 0.75], **settings))
    assert gradcheck(lambda w: kd_loss(student, teachers, labels, weights=w, **settings), weights)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"teachers": []}, "at least one teacher"),
        ({"temperature": 0}, "temperature must be above 0; got 0"),
        ({"temperature": -1.0}, "temperature must be above 0; got -1.0"),
        ({"student": torch.zeros(5, 3)}, r"\(5, 3\).*\(5, 4\)"),
        ({"teachers": [torch.zeros(5, 4), torch.zeros(5, 3)]}, r"share one shape.*\(5, 3\)"),
        ({"weights": [1.0]}, "1 weights for 2 teachers"),
        ({"weights": [0.2, 0.3, 0.5]}, "3 weights for 2 teachers"),
        ({"reduction": "batchmean"}, "'batchmean'"),
    ],
)
def test_refusals_name_what_was_given(change, says):
    student, teachers, labels = case(2)
    given = {"student": student, "teachers": teachers, "labels": labels, "temperature": 5, "alpha": 0.3} | change
    with pytest.raises(ValueError, match=says):
        kd_loss(**given)


def test_refusals_of_the_others():
    student, teachers, _ = case(2)
    settings = {"temperature": 5, "alpha": 0.3}
    with pytest.raises(ValueError, match="at least one teacher"):
        mean_logits([])
    with pytest.raises(ValueError, match="at least one teacher"):
        meta_cotangent(student, [], student, **settings)
    with pytest.raises(ValueError, match="1 weights for 2 teachers"):
        meta_cotangent(student, teachers, student, weights=[1.0], **settings)


def test_cotangents_refuse_what_does_not_fit():
    z = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="temperature"):
        meta_cotangent(z, [z], z, temperature=0.0, alpha=0.5)
    with pytest.raises(ValueError, match="tangent"):
        meta_cotangent(z, [z], z[0], temperature=1.0, alpha=0.5)
