"""How the distillation ops of every backend stand in autograd, torch.compile and the dispatcher."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from kernel_helpers import F32, F64, TOLERANCE, Case, Problem, logits, near, one_backend, plain, triton_is_slow
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.library import opcheck

from engine.kernels import fused_linear_kd, kd_loss, meta_cotangent
from engine.kernels.ops.common import backends

SETTINGS = {"temperature": 2.0, "alpha": 0.3}
LABELS = torch.tensor([1, -100, 0])


def leaves(K=2, shape=(3, 5), dtype=F32):
    return [logits(*shape, seed=k, dtype=dtype).requires_grad_() for k in range(K + 1)]


def loss_of(leaves, labels=LABELS, **changes):
    return kd_loss(leaves[0], leaves[1:], labels, **SETTINGS | changes)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def launches(backend, monkeypatch):
    """What the kernels were asked for: (name, flags of what is wanted)."""
    if backend == "reference":
        pytest.skip("the reference has no kernels")
    found, kernels = [], backends.module("kd_loss", "cpu")

    def spied(name):
        def call(*arguments):
            found.append((name, list(arguments[-1])))
            return getattr(kernels, name)(*arguments)

        return call

    spies = {name: spied(name) for name in ("kd_first", "kd_second")}
    monkeypatch.setattr(backends, "module", lambda op, device: SimpleNamespace(**spies))
    return found


# Derivatives; the first two of a loss are in test_kernels.py


@triton_is_slow
@pytest.mark.parametrize("learned", [False, True])
def test_finite_differences_of_cotangents(learned, backend):
    tangent, weights = logits(2, 3, seed=7, dtype=F64), torch.tensor([0.25, 0.6], dtype=F64, requires_grad=learned)
    given = [weights, tangent.requires_grad_(not learned), *leaves(1, (2, 3), F64)]

    def cotangents(weights, tangent, *teachers):
        return tuple(meta_cotangent(tangent, teachers, tangent, weights=weights, **SETTINGS))

    assert gradcheck(cotangents, given, fast_mode=True)
    assert learned or gradgradcheck(cotangents, given, fast_mode=True)


@pytest.mark.parametrize("some", [[0, 1, 2], [0], [2]])
def test_third_derivative(some, backend):
    """Also behind a second one that starts from some of the gradients."""

    def third(loss, leaves):
        first = torch.autograd.grad(loss(leaves).square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(first[i].square().sum() for i in some), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in second), leaves)

    given = leaves(2, (3, 3), F64)
    found = third(lambda z: loss_of(z, reduction="none"), given)
    wanted = third(lambda z: plain(z[0], z[1:], LABELS, reduction="none", **SETTINGS), given)
    for a, b in zip(found, wanted, strict=True):
        near(a, b, F64, TOLERANCE[F64])


def test_forward_mode(backend):
    """A derivative along a direction, and forward over reverse, which the walk back over several pilot steps takes."""
    given, directions = leaves(2, (3, 4), F64), [logits(3, 4, seed=9 + k, dtype=F64) for k in range(3)]
    gradients = torch.autograd.grad(loss_of(given), given, create_graph=True)
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    wanted = torch.autograd.grad(slope, given)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(z, d) for z, d in zip(given, directions, strict=True)]
        loss = loss_of(duals)
        near(forward_ad.unpack_dual(loss).tangent.detach(), slope.detach(), F64, TOLERANCE[F64])
        for g, b in zip(torch.autograd.grad(loss, duals, create_graph=True), wanted, strict=True):
            near(forward_ad.unpack_dual(g).tangent.detach(), b, F64, TOLERANCE[F64])


# One backward and another


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_second_backward_has_the_same_bits(reduction, backend):
    given = leaves()
    for upstream in (None, torch.tensor(0.7)):
        loss = loss_of(given, reduction=reduction)
        first, second, third = (torch.autograd.grad(loss, given, upstream, retain_graph=True) for _ in range(3))
        if upstream is None:
            assert equal(first, second)
        assert equal(second, third)
        for a, b in zip(first, second, strict=True):
            near(a, b.double(), F32, 1e-6)
    kept = [g.clone() for g in second]
    assert equal(torch.autograd.grad(loss, given[1:], upstream), kept[1:])  # some of what was computed ahead
    assert equal(second, kept)


def test_gradients_add_up(backend):
    """Also of two losses and more, where one tensor is student and teacher, and where `.grad` and the gradient are then the
    same memory."""
    given = leaves()
    alone, soft = (torch.autograd.grad(loss_of(given, labels), given) for labels in (LABELS, None))
    both, loss = 3 * loss_of(given) + given[0].square().sum() + 2 * loss_of(given, None), loss_of(given)
    for i, found in enumerate(torch.autograd.grad(both, given)):
        near(found, (3 * alone[i] + 2 * soft[i] + (2 * given[0] if i == 0 else 0)).detach().double(), F32, 1e-6)
    loss.backward(retain_graph=True)
    loss.backward()
    loss_of(given).backward()
    for z, g in zip(given, alone, strict=True):
        near(z.grad, 3 * g.double(), F32, 1e-6)
    student, teacher = leaves(1)
    (found,) = torch.autograd.grad(loss_of([student, student, teacher]), student)
    apart = [student.detach().clone().requires_grad_() for _ in range(2)]
    a, b = torch.autograd.grad(loss_of([*apart, teacher]), apart)
    near(found, (a + b).double(), F32, 1e-6)


@pytest.mark.parametrize("who", [0, 2])
def test_one_input_alone(who, backend):
    """Its derivatives are those that it has beside the others."""
    for reduction in ("mean", "none"):
        found, single = [], Problem(Case(reduction=reduction))
        for i, z in enumerate(single.logits):
            z.requires_grad_(i == who)
        for problem in (single, Problem(single.case)):
            loss, z, upstream = problem.loss(), problem.logits[who], problem.upstream
            (quick,) = torch.autograd.grad(loss, z, upstream.detach(), retain_graph=True)
            (first,) = torch.autograd.grad(loss, z, upstream, create_graph=True)
            found.append([loss, quick, first, *torch.autograd.grad(first, [upstream, z], problem.cotangents[who])])
        for a, b in zip(*found, strict=True):
            near(a.detach(), b.detach().double(), F32, TOLERANCE[F32])


def test_gradients_are_computed_with_the_loss_where_a_backward_follows(launches):
    given = leaves()
    torch.autograd.grad(loss_of(given), given)
    assert launches == [("kd_first", [True] * 3)]  # all of it: a logit is read once
    launches.clear()
    with torch.no_grad():
        loss_of(given)
    loss_of([z.detach() for z in given])
    loss_of([given[0], *(z.detach() for z in given[1:])])
    loss_of(given, reduction="none")
    assert launches == [("kd_first", flags) for flags in ([False] * 3, [False] * 3, [True, False, False], [False] * 3)]
    launches.clear()
    given[1].requires_grad_(False)
    for reduction in ("mean", "none"):
        (slope,) = torch.autograd.grad(loss_of(given, reduction=reduction).sum(), given[0], create_graph=True)
        torch.autograd.grad(slope.square().sum(), given[2])
        assert launches[1:] == [("kd_first", [True, False, True]), ("kd_second", [True, False, True])]
        launches.clear()


@pytest.mark.parametrize("order", [0, 1, 2])
def test_nothing_holds_on_to_the_inputs(order, backend):
    """No cycle keeps them until the garbage is collected."""
    given = leaves()
    alive = [weakref.ref(z) for z in given]
    loss = loss_of(given)
    if order:
        slopes = torch.autograd.grad(loss, given, create_graph=order == 2)
        if order == 2:
            torch.autograd.grad(slopes[0].square().sum(), given)
        del slopes
    del given, loss
    assert [z() for z in alive] == [None] * 3
    given = leaves()
    loss = loss_of(given)  # what was computed ahead is not kept beside `.grad`
    gradient = weakref.ref(torch.autograd.grad(loss, given, retain_graph=True)[0])
    assert gradient() is None


# Ways to call the losses that could give a wrong number without a word


@pytest.fixture
def student():
    return leaves(0)[0]


@pytest.fixture
def teachers():
    return [logits(3, 5, seed=k) for k in (1, 2)]


@one_backend
def test_inputs_that_change_before_the_backward(student, teachers, backend):
    labels, weights = LABELS.clone(), torch.tensor([0.5, 0.5])
    for changed in (labels, weights, teachers[1]):
        loss = kd_loss(student, teachers, labels, weights=weights, reduction="none", **SETTINGS)
        changed.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.sum().backward()


def test_teachers_that_ran_in_inference_mode(student, teachers, backend):
    with torch.inference_mode():
        frozen, y, theirs = [t.clone() for t in teachers], LABELS.clone(), ([logits(4, 7)], [logits(9, 7)])
    for reduction in ("mean", "none"):
        got, expected = (
            torch.autograd.grad(kd_loss(student, z, t, reduction=reduction, **SETTINGS).sum(), student)[0]
            for z, t in ((frozen, y), (teachers, LABELS))
        )
        assert torch.equal(got, expected)
    tangent = logits(3, 5, seed=3).requires_grad_()
    found = torch.autograd.grad(meta_cotangent(student, frozen, tangent, **SETTINGS)[0].square().sum(), tangent)[0]
    assert found.norm() > 0
    hidden = logits(4, 6).requires_grad_()
    fused_linear_kd(hidden, logits(9, 6, seed=1), *theirs, **SETTINGS).backward()
    assert hidden.grad.norm() > 0


def test_forward_mode_through_what_arrives(student, teachers, backend):
    """A kernel would scale by the primal and lose the tangent."""
    for primal in (1.0, 2.0):
        with forward_ad.dual_level():
            upstream = forward_ad.make_dual(torch.tensor(primal), torch.tensor(0.7))
            (gradient,) = torch.autograd.grad(kd_loss(student, teachers, **SETTINGS), student, upstream)
            gradient = forward_ad.unpack_dual(gradient)
            torch.testing.assert_close(gradient.tangent, gradient.primal * (0.7 / primal))


def test_forward_mode_through_weights(student, teachers, backend):
    weights, direction, student = torch.tensor([0.4, 0.6]), torch.tensor([1.0, -2.0]), student.detach()
    hidden, layer = logits(2, 3), logits(4, 3)

    def loss(weights):
        cotangents = meta_cotangent(student, teachers, logits(3, 5, seed=3), weights=weights, **SETTINGS)
        slopes = sum(c.square().sum() for c in cotangents)
        return kd_loss(student, teachers, LABELS, weights=weights, **SETTINGS) + slopes

    with forward_ad.dual_level():
        dual = forward_ad.make_dual(weights, direction)
        found = forward_ad.unpack_dual(loss(dual)).tangent
        with pytest.raises(RuntimeError, match="no forward mode"):
            fused_linear_kd(hidden, layer, [hidden] * 2, [layer] * 2, weights=dual, **SETTINGS)
    expected = (loss(weights + 1e-2 * direction) - loss(weights - 1e-2 * direction)) / 2e-2
    assert abs(found - expected) < 1e-2 * abs(expected)


def test_transforms_of_torch_func(student, teachers, backend):
    def loss(s):
        return kd_loss(s, teachers, LABELS, **SETTINGS)

    x = student.detach()
    torch.testing.assert_close(torch.func.grad(loss)(x), torch.autograd.grad(loss(student), student)[0])
    by_row = torch.vmap(lambda s, a, b, y: kd_loss(s, [a, b], y, **SETTINGS))(x, *teachers, LABELS)
    torch.testing.assert_close(by_row, kd_loss(x, teachers, LABELS, reduction="none", **SETTINGS))
    u = logits(3, 5, seed=4)
    h = torch.func.hessian(loss)(x)
    (gradient,) = torch.autograd.grad(loss(student), student, create_graph=True)
    (expected,) = torch.autograd.grad((gradient * u).sum(), student)
    torch.testing.assert_close(torch.einsum("abcd,cd->ab", h, u), expected)


def test_nothing_arrives(student, teachers, backend):
    """A function behind the loss whose derivative is None, which is not a gradient of one."""

    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, _):
            return None

    for reduction in ("mean", "none"):
        loss = kd_loss(student, teachers, reduction=reduction, **SETTINGS)
        assert torch.autograd.grad(Stop.apply(loss).sum(), student, allow_unused=True) == (None,)


# torch.compile


def step(student, teacher, labels, reduction):
    loss = kd_loss(student, [teacher, 2 * teacher], labels, reduction=reduction, **SETTINGS).sum()
    return loss, meta_cotangent(student, [teacher], student.detach(), **SETTINGS)


@one_backend
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_a_graph_break(compiler, reduction, backend):
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    for rows in (3, 4, 7):  # the second size makes the rows symbolic
        student, teacher = leaves(1, (rows, 5))
        labels = torch.arange(rows) % 5
        results = []
        for run in (step, compiled):
            loss, meta = run(student, teacher, labels, reduction)
            results.append([loss.detach(), *meta, *torch.autograd.grad(3 * loss, [student, teacher])])
        for found, wanted in zip(*reversed(results), strict=True):
            near(found.detach(), wanted.detach().double(), F32, 1e-5)


def test_compiles_without_gradients(backend):
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    with torch.no_grad():
        found, wanted = (run(*leaves(1), LABELS, "mean") for run in (compiled, step))
    assert torch.equal(found[0], wanted[0]) and equal(found[1], wanted[1])


# The dispatcher

ops = torch.ops.metadistil


def arguments_of(op):
    """Two calls: optional tensors given or not, one or two teachers, what is wanted and given."""
    for K, labels, weighted, reduction, shape in (
        (2, LABELS, False, "mean", (3, 5)),
        (1, None, True, "none", (2, 3, 5)),
    ):
        student, *teachers = leaves(K, shape)
        weights, per_row = torch.full((K,), 0.4) if weighted else None, reduction == "none"
        settings = (labels, weights, [0.5] * K, 2.0, 0.3, -100, reduction)
        upstream = (torch.rand(shape[:-1]) if per_row else torch.tensor(0.7)).requires_grad_()
        some = [not per_row, *[True] * K]
        if op == "kd_loss":
            yield student, teachers, *settings, [not per_row] * (K + 1)
        elif op == "kd_gradients":
            yield upstream, student, teachers, *settings, some
        elif op == "kd_double_backward":
            cotangents = [logits(*shape, seed=7 + k).requires_grad_() for k in range(K + 1)]
            yield upstream, student, teachers, *settings, cotangents[per_row:], some, some
        elif op == "meta_cotangent":
            yield teachers, student, weights, [0.5] * K, 2.0, 0.3


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_op_is_the_function(reduction, backend):
    """What a tracer sees, and what runs where nothing is traced, have the same bits."""
    if backend == "reference":
        pytest.skip("the reference has no ops")
    given = leaves()
    settings = (LABELS, None, [0.5, 0.5], 2.0, 0.3, -100, reduction, [reduction == "mean"] * 3)
    results = []
    for loss in (loss_of(given, reduction=reduction), ops.kd_loss(given[0], given[1:], *settings)[0]):
        first = torch.autograd.grad(loss.sum(), given, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), given, retain_graph=True)
        results.append([loss.detach(), *torch.autograd.grad(loss.sum(), given), *(g.detach() for g in first), *second])
    assert equal(*results)


@one_backend
@pytest.mark.parametrize("op", ["kd_loss", "kd_gradients", "kd_double_backward", "meta_cotangent"])
def test_opcheck(op, backend):
    """Schema, autograd registration, fake tensors, and compiled with symbolic sizes."""
    for arguments in arguments_of(op):
        assert set(opcheck(getattr(ops, op).default, arguments).values()) == {"SUCCESS"}
