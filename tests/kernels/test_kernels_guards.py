"""Ways to call the losses that could give a wrong number without a word, on every backend."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from engine.kernels import fused_linear_kd, kd_loss, meta_cotangent
from engine.kernels.ops.common import checks
from engine.kernels.ops.fused_linear_kd.naive import kd_rows
from engine.kernels.ops.kd_loss import naive

SETTINGS = {"temperature": 2.0, "alpha": 0.3}


def logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def student() -> Tensor:
    return logits(3, 5).requires_grad_()


@pytest.fixture
def teachers() -> list[Tensor]:
    return [logits(3, 5, seed=1), logits(3, 5, seed=2)]


@pytest.fixture
def labels() -> Tensor:
    return torch.tensor([0, 1, 2])


@pytest.mark.parametrize("what", ["labels", "weights", "teacher"])
def test_inputs_that_change_before_the_backward(what, student, teachers, labels, backend):
    weights = torch.tensor([0.5, 0.5])
    loss = kd_loss(student, teachers, labels, weights=weights, reduction="none", **SETTINGS)
    {"labels": labels, "weights": weights, "teacher": teachers[1]}[what].zero_()
    if backend == "reference":  # whose operations keep what they need, and no more
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


def test_teachers_that_ran_in_inference_mode(student, teachers, labels, backend):
    with torch.inference_mode():
        frozen, y = [t.clone() for t in teachers], labels.clone()
    for reduction in ("mean", "none"):
        got, expected = (
            torch.autograd.grad(kd_loss(student, z, t, reduction=reduction, **SETTINGS).sum(), student)[0]
            for z, t in ((frozen, y), (teachers, labels))
        )
        assert torch.equal(got, expected)
    tangent = logits(3, 5, seed=3).requires_grad_()
    found = torch.autograd.grad(meta_cotangent(student, frozen, tangent, **SETTINGS)[0].square().sum(), tangent)[0]
    assert found.norm() > 0
    hidden, head = logits(4, 6).requires_grad_(), logits(9, 6, seed=1)
    with torch.inference_mode():
        theirs = [logits(4, 7)], [logits(9, 7)]
    fused_linear_kd(hidden, head, *theirs, **SETTINGS).backward()
    assert hidden.grad.norm() > 0


@pytest.mark.parametrize("primal", [1.0, 2.0])
def test_forward_mode_through_what_arrives(primal, student, teachers, backend):
    """A kernel would scale by the primal and lose the tangent."""
    tangent = 0.7
    with forward_ad.dual_level():
        upstream = forward_ad.make_dual(torch.tensor(primal), torch.tensor(tangent))
        loss = kd_loss(student, teachers, **SETTINGS)
        (gradient,) = torch.autograd.grad(loss, student, upstream)
        gradient = forward_ad.unpack_dual(gradient)
        torch.testing.assert_close(gradient.tangent, gradient.primal * (tangent / primal))


def test_forward_mode_through_weights(student, teachers, labels, backend):
    direction, eps = torch.tensor([1.0, -2.0]), 1e-2

    def loss(weights):
        found = meta_cotangent(student.detach(), teachers, logits(3, 5, seed=3), weights=weights, **SETTINGS)
        return kd_loss(student.detach(), teachers, labels, weights=weights, **SETTINGS) + sum(
            c.square().sum() for c in found
        )

    weights = torch.tensor([0.4, 0.6])
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(loss(forward_ad.make_dual(weights, direction))).tangent
    expected = (loss(weights + eps * direction) - loss(weights - eps * direction)) / (2 * eps)
    assert abs(found - expected) < 1e-2 * abs(expected)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward mode"):
        dual = forward_ad.make_dual(torch.ones(1), torch.ones(1))
        fused_linear_kd(logits(2, 3), logits(4, 3), [logits(2, 3)], [logits(4, 3)], weights=dual, **SETTINGS)


def test_transforms_of_torch_func(student, teachers, labels, backend):
    def loss(s):
        return kd_loss(s, teachers, labels, **SETTINGS)

    x = student.detach()
    torch.testing.assert_close(torch.func.grad(loss)(x), torch.autograd.grad(loss(student), student)[0])
    by_row = torch.vmap(lambda s, a, b, y: kd_loss(s, [a, b], y, **SETTINGS))(x, *teachers, labels)
    torch.testing.assert_close(by_row, kd_loss(x, teachers, labels, reduction="none", **SETTINGS))
    u = logits(3, 5, seed=4)
    h = torch.func.hessian(loss)(x)
    (gradient,) = torch.autograd.grad(loss(student), student, create_graph=True)
    (expected,) = torch.autograd.grad((gradient * u).sum(), student)
    torch.testing.assert_close(torch.einsum("abcd,cd->ab", h, u), expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nothing_arrives(reduction, student, teachers, backend):
    """A function behind the loss whose derivative is None, which is not a gradient of one."""

    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, _):
            return None

    loss = kd_loss(student, teachers, reduction=reduction, **SETTINGS)
    assert torch.autograd.grad(Stop.apply(loss).sum(), student, allow_unused=True) == (None,)


@pytest.mark.parametrize("name", ["temperature", "alpha"])
def test_settings_are_numbers(name, student, teachers, backend):
    given = {name: torch.tensor(0.5, requires_grad=True)}
    with pytest.raises(ValueError, match="must be numbers"):
        kd_loss(student, teachers, **(SETTINGS | given))
    with pytest.raises(ValueError, match="must be numbers"):
        meta_cotangent(student, teachers, student, **(SETTINGS | given))


def test_a_list_of_weights_may_hold_tensors(student, teachers, backend):
    w = torch.tensor(0.3, requires_grad=True)
    (found,) = torch.autograd.grad(kd_loss(student, teachers, weights=[w, 0.7], **SETTINGS), w)
    together = torch.tensor([0.3, 0.7], requires_grad=True)
    (expected,) = torch.autograd.grad(kd_loss(student, teachers, weights=together, **SETTINGS), together)
    torch.testing.assert_close(found, expected[0])


@pytest.mark.parametrize("weights", [torch.tensor(0.5), torch.ones(2, 1), torch.ones(2, dtype=torch.int64)], ids=str)
def test_weights_of_another_kind_are_refused(weights, student, teachers, backend):
    with pytest.raises(ValueError, match="floating tensor"):
        kd_loss(student, teachers, weights=weights, **SETTINGS)


@pytest.mark.parametrize("weights", [[1.5, -0.5], torch.tensor([1.5, -0.5])], ids=["list", "tensor"])
def test_a_negative_weight_makes_no_mask_of_infinity(weights, student, teachers, backend):
    teachers[1][1, 2] = torch.inf
    rows = kd_loss(student, teachers, weights=weights, reduction="none", **SETTINGS)
    assert rows.isnan().tolist() == [False, True, False]
    cotangents = meta_cotangent(student, teachers, logits(3, 5), weights=weights, **SETTINGS)
    assert all(c[1].isnan().all() and c[[0, 2]].isfinite().all() for c in cotangents)


@pytest.mark.parametrize("C", [5, 40])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_tangent_shows_where_the_teacher_has_no_probability(C, bad, backend):
    z, u = torch.zeros(3, C), logits(3, C)
    z[1, 2], u[1, 2] = -300.0, bad
    (found,) = meta_cotangent(z, [z], u, temperature=1.0, alpha=1.0)
    assert found[1].isnan().all() and found[[0, 2]].isfinite().all()
    student = logits(3, C, seed=1).requires_grad_()
    teacher = z.requires_grad_()
    loss = kd_loss(student, [teacher], temperature=1.0, alpha=1.0)
    gradients = torch.autograd.grad(loss, [student, teacher], create_graph=True)
    second = torch.autograd.grad(gradients, [student, teacher], [torch.zeros_like(u), u])
    assert all(not g[1].isfinite().all() and g[[0, 2]].isfinite().all() for g in second)


def test_labels_that_nobody_looked_at(student, teachers, monkeypatch):
    """As on CUDA: NaN instead of a device that stops."""
    monkeypatch.setattr(checks, "check_labels", lambda *_: None)
    labels = torch.tensor([0, 7, -1])
    rows = naive.kd_loss(student, teachers, labels, reduction="none", **SETTINGS)
    assert rows.isnan().tolist() == [False, True, True]
    gradient = student.detach().clone()
    loss = kd_rows(gradient, teachers, labels, None, [0.5, 0.5], 2.0, 0.3, -100, 1.0, None, in_place=True)
    assert loss.isnan().tolist() == [False, True, True] and gradient[1:].isnan().all() and gradient[0].isfinite().all()


def test_a_factor_of_the_fused_loss_has_no_second_derivative(backend):
    factor = torch.ones((), requires_grad=True)
    hidden, head = logits(4, 3).requires_grad_(), logits(6, 3).requires_grad_()
    loss = fused_linear_kd(hidden, head, [logits(4, 2)], [logits(6, 2)], **SETTINGS)
    plain = torch.autograd.grad(loss, [hidden, head], retain_graph=True)
    gradients = torch.autograd.grad(factor * loss, [hidden, head], create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients, strict=True))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(gradients[0].sum(), factor)


def test_fused_hidden_of_any_layout_is_what_the_compiler_was_told(backend):
    hidden = logits(3, 4).T.requires_grad_()
    arguments = (logits(6, 3), [logits(4, 2)], [logits(6, 2)], None, None, [1.0], 2.0, 0.3, -100, "mean", True, False)
    torch.library.opcheck(torch.ops.metadistil.fused_linear_kd.default, (hidden, *arguments), rtol=1e-4, atol=1e-5)


def test_fused_under_autocast(backend):
    hidden, head = logits(6, 4).requires_grad_(), logits(9, 4, seed=1).requires_grad_()
    theirs = [logits(6, 5)], [logits(9, 5)]
    expected = torch.autograd.grad(fused_linear_kd(hidden, head, *theirs, **SETTINGS), [hidden, head])
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(fused_linear_kd(hidden, head, *theirs, **SETTINGS), [hidden, head])
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 0.05 * b.norm()


@pytest.fixture
def tuning(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from engine.kernels.ops.common import tuning

    monkeypatch.setenv("METADISTIL_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a device")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    tuning._known.cache_clear()
    yield tuning
    tuning._known.cache_clear()


def choose(tuning, key, launch=lambda plan: None):
    choices = [tuning.Plan(False, 1, 2048, warps) for warps in (4, 8)]
    return tuning.choose([key], choices, launch, SimpleNamespace(type="cuda"))


def test_a_plan_that_does_not_fit_is_not_chosen(tuning, monkeypatch):
    def bench(launch, **_):
        launch()
        return 1.0

    def launch(plan):
        if plan.warps == 4:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(tuning.triton.testing, "do_bench", bench)
    assert choose(tuning, "C", launch).warps == 8


def test_processes_keep_each_others_plans(tuning, monkeypatch, tmp_path):
    """A resumed run must find the plan it began with, whoever else wrote since."""
    monkeypatch.setattr(tuning.triton.testing, "do_bench", lambda launch, **_: 1.0)
    choose(tuning, "mine")
    (file,) = (tmp_path / "kernels").iterdir()
    other = [False, 1, 2048, 8]
    file.write_text(json.dumps({"theirs": other}))
    choose(tuning, "third")
    kept = json.loads(file.read_text())
    assert set(kept) == {"mine", "theirs", "third"} and kept["theirs"] == other


@pytest.mark.parametrize("classes", [1025, 2048, 5000, 16384, 2**21, 2**23])
def test_plans_are_worth_trying(tuning, classes):
    for plan in tuning.plans(classes, 8192, 256):
        assert not plan.tiled or plan.block_c >= 2048
        assert plan.tiled or plan.block_c <= 64 * 32 * plan.warps
