"""How the distillation ops of every backend stand in autograd, torch.compile and the dispatcher."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from kernel_helpers import F32, F64, TOLERANCE, Case, Problem, logits, near, plain
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from engine.kernels import kd_loss, meta_cotangent
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


# Derivatives by finite differences


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
@pytest.mark.parametrize(
    ("K", "T", "alpha", "reduction"), [(1, 0.5, 0.3, "mean"), (2, 5, 0.3, "none"), (3, 20, 1, "sum"), (1, 1, 0, "mean")]
)
def test_finite_differences(K, T, alpha, reduction, check, backend):
    given = leaves(K, (3, 3), F64)
    settings = {"temperature": T, "alpha": alpha, "reduction": reduction, "weights": [0.2, 0.5, 0.4][:K]}
    assert check(lambda *z: loss_of(z, **settings), given, fast_mode=True)


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_finite_differences_of_learned_weights(reduction, check, backend):
    given, weights = leaves(2, (3, 3), F64), torch.tensor([0.25, 0.6], dtype=F64, requires_grad=True)
    assert check(lambda w, *z: loss_of(z, weights=w, reduction=reduction), [weights, *given], fast_mode=True)


def test_finite_differences_of_cotangents(backend):
    teachers, tangent = leaves(1, (2, 3), F64), logits(2, 3, seed=7, dtype=F64).requires_grad_()

    def cotangents(tangent, *teachers):
        return tuple(meta_cotangent(tangent, teachers, tangent, **SETTINGS))

    assert gradcheck(cotangents, [tangent, *teachers])
    assert gradgradcheck(cotangents, [tangent, *teachers], fast_mode=True)
    weights = torch.tensor([0.25, 0.6], dtype=F64, requires_grad=True)
    settings = SETTINGS | {"weights": weights}
    assert gradcheck(
        lambda w, *z: tuple(meta_cotangent(z[0], z, z[0], **settings | {"weights": w})), [weights, *teachers]
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_third_derivative(reduction, backend):
    def third(loss, leaves):
        first = torch.autograd.grad(loss(leaves).square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in second), leaves)

    given = leaves(2, (3, 3), F64)
    found = third(lambda z: loss_of(z, reduction=reduction), given)
    wanted = third(lambda z: plain(z[0], z[1:], LABELS, reduction=reduction, **SETTINGS), given)
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


def test_what_a_loss_is_part_of(backend):
    given = leaves()
    alone = torch.autograd.grad(loss_of(given), given)
    for a, b in zip(torch.autograd.grad(4 * loss_of(given), given), alone, strict=True):
        assert torch.equal(a, 4 * b)
    for a, b in zip(torch.autograd.grad(3 * loss_of(given), given), alone, strict=True):
        near(a, 3 * b.double(), F32, 1e-6)
    both = loss_of(given) + given[0].square().sum() + 2 * loss_of(given, None)
    soft = torch.autograd.grad(loss_of(given, None), given)
    for i, found in enumerate(torch.autograd.grad(both, given)):
        near(found, (alone[i] + 2 * soft[i] + (2 * given[0] if i == 0 else 0)).detach().double(), F32, 1e-6)


def test_gradients_add_up(backend):
    """Also where one tensor is student and teacher, and where `.grad` and the gradient are then the same memory."""
    given = leaves()
    alone = torch.autograd.grad(loss_of(given), given)
    for times in (1, 2, 3):
        loss_of(given).backward()
        for z, g in zip(given, alone, strict=True):
            near(z.grad, times * g.double(), F32, 1e-6)
    loss = loss_of(given)
    for z in given:
        z.grad = None
    loss.backward(retain_graph=True)
    loss.backward()
    for z, g in zip(given, alone, strict=True):
        near(z.grad, 2 * g.double(), F32, 1e-6)
    student, teacher = leaves(1)
    (found,) = torch.autograd.grad(loss_of([student, student, teacher]), student)
    apart = [student.detach().clone().requires_grad_() for _ in range(2)]
    a, b = torch.autograd.grad(loss_of([*apart, teacher]), apart)
    near(found, (a + b).double(), F32, 1e-6)


@pytest.mark.parametrize("who", [0, 1, 2])
def test_one_input_alone(who, backend):
    """Its derivatives are those that it has beside the others."""
    for reduction in ("mean", "none"):
        problem, single = (Problem(Case(reduction=reduction)) for _ in range(2))
        for i, z in enumerate(single.logits):
            z.requires_grad_(i == who)
        near(single.loss().detach(), problem.loss().detach().double(), F32, 1e-6)
        upstream = problem.upstream
        first = torch.autograd.grad(problem.loss(), problem.logits, upstream, create_graph=True)[who]
        (quick,) = torch.autograd.grad(single.loss(), single.logits[who], upstream.detach())
        (alone,) = torch.autograd.grad(single.loss(), single.logits[who], upstream, create_graph=True)
        near(quick, first.detach().double(), F32, 1e-6)
        near(alone.detach(), first.detach().double(), F32, 1e-6)
        cotangent = problem.cotangents[who]
        wanted = torch.autograd.grad(first, [upstream, problem.logits[who]], cotangent)
        found = torch.autograd.grad(alone, [upstream, single.logits[who]], cotangent)
        for a, b in zip(found, wanted, strict=True):
            near(a, b.double(), F32, TOLERANCE[F32])


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


def test_gradients_leave_with_the_backward(backend):
    """What was computed ahead is not kept beside `.grad`."""
    given = leaves()
    loss = loss_of(given)
    gradient = weakref.ref(torch.autograd.grad(loss, given, retain_graph=True)[0])
    assert gradient() is None


def test_activation_checkpointing(backend):
    given = leaves()
    wanted = torch.autograd.grad(loss_of([2 * z for z in given]), given)
    loss = checkpoint(lambda *z: loss_of([2 * x for x in z]), *given, use_reentrant=False)
    assert equal(torch.autograd.grad(loss, given), wanted)


# torch.compile


def step(student, teacher, labels, reduction):
    loss = kd_loss(student, [teacher, 2 * teacher], labels, reduction=reduction, **SETTINGS).sum()
    return loss, meta_cotangent(student, [teacher], student.detach(), **SETTINGS)


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
    with torch.no_grad():
        found = torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves(1), LABELS, "mean")
        wanted = step(*leaves(1), LABELS, "mean")
    assert torch.equal(found[0], wanted[0])
    assert equal(found[1], wanted[1])


# The dispatcher

ops = torch.ops.metadistil


def arguments_of(op):
    """Several calls: optional tensors given or not, one or two teachers, what is wanted and given."""
    for K, labels, weighted, reduction, shape in (
        (2, LABELS, False, "mean", (3, 5)),
        (1, None, True, "none", (2, 3, 5)),
    ):
        student, *teachers = leaves(K, shape)
        weights = torch.full((K,), 0.4) if weighted else None
        settings = (labels, weights, [0.5] * K, 2.0, 0.3, -100, reduction)
        upstream = (torch.rand(shape[:-1]) if reduction == "none" else torch.tensor(0.7)).requires_grad_()
        some = [False, *[True] * K]
        if op == "kd_loss":
            for wanted in ([reduction != "none"] * (K + 1), [False] * (K + 1)):
                yield student, teachers, *settings, wanted
        elif op == "kd_gradients":
            for wanted in ([True] * (K + 1), some):
                yield upstream, student, teachers, *settings, wanted
        elif op == "kd_double_backward":
            cotangents = [logits(*shape, seed=7 + k).requires_grad_() for k in range(K + 1)]
            yield upstream, student, teachers, *settings, cotangents, [True] * (K + 1), [True] * (K + 1)
            yield upstream, student, teachers, *settings, cotangents[1:], some, some
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


@pytest.mark.parametrize("op", ["kd_loss", "kd_gradients", "kd_double_backward", "meta_cotangent"])
@pytest.mark.parametrize("backend", ["cpp", pytest.param("triton", marks=pytest.mark.slow)], indirect=True)
def test_opcheck(op, backend):
    """Schema, autograd registration, fake tensors, and compiled with symbolic sizes."""
    for arguments in arguments_of(op):
        assert set(opcheck(getattr(ops, op).default, arguments).values()) == {"SUCCESS"}
