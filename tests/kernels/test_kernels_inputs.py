"""What kd_loss and meta_cotangent of every backend make of unusual inputs: layouts, masked classes, labels, mistakes."""

import pytest
import torch
from kernel_helpers import BF16, F32, F64, TOLERANCE, Case, Problem, logits, near

from engine.kernels import kd_loss, mean_logits, meta_cotangent
from engine.kernels.ops.common import checks
from engine.kernels.ops.fused_linear_kd.naive import kd_rows
from engine.kernels.ops.kd_loss import naive

INF, NAN = torch.inf, torch.nan
either = pytest.mark.parametrize("C", [5, 40])  # the C++ kernels take few classes in another way
SETTINGS = {"temperature": 2.0, "alpha": 0.3}


def widths(backend):
    """Few classes, and more than a block has; Triton's tiles are in test_kernels_plans.py."""
    return (5,) if backend == "triton" else (5, 1100)


# Layouts


def wide(z):  # every other class of a tensor that is twice as wide
    return torch.stack([z, torch.full_like(z, NAN)], -1).flatten(-2)[..., ::2]


LAYOUTS = {
    "all but the last position": [lambda z: z[:, :-1]],
    "every other position": [lambda z: z[:, ::2]],
    "neighbours: two slices of other places": [lambda z: z[:, 1:], lambda z: z[:, :-1]],
    "positions first": [lambda z: z.transpose(0, 1)],
    "classes strided": [wide],
    "classes first": [lambda z: z.permute(2, 0, 1).contiguous().permute(1, 2, 0)],
    "too many leading dimensions to be rows": [lambda z: z.reshape(2, 2, 2, -1).permute(2, 1, 0, 3)],
    "a teacher's row for every position": [lambda z: z, lambda z: z[:, :1].expand_as(z)],
    "a teacher's class for every class": [lambda z: z, lambda z: z[..., :1].expand_as(z)],
    "one row of everything": [lambda z: z[:1, :1].expand_as(z)],
    "not from the first number on": [lambda z: z[1:], lambda z: z[:-1]],
    "each in its own way": [lambda z: z, lambda z: z.transpose(0, 1).contiguous().transpose(0, 1), wide],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, backend):
    reduction = ["mean", "none"][len(layout) % 2]
    for C, dtype in ((3, F64), (40, F64), (3, BF16), (40, BF16)) if backend == "cpp" else ((3, F64),):
        case = Case(C=C, leading=(2, 4), K=2, reduction=reduction, dtypes=(dtype,), ignore=-1)
        Problem(case, *LAYOUTS[layout], labels=lambda y: torch.stack([y, y - 9], -1)[..., 0]).agree()


@pytest.mark.parametrize("change", [lambda x: x.T.contiguous().T, lambda x: x[:1, :1].expand_as(x)])
def test_layouts_of_labels_and_upstream(change, backend):
    problem = Problem(Case(leading=(3, 4), reduction="none"), labels=change)
    problem.upstream = change(problem.upstream.detach()).requires_grad_()
    problem.agree()


# Infinities


@pytest.mark.parametrize(("dtype", "weights"), [(F32, "list"), (F64, None), (BF16, "tensor")], ids=str)
def test_classes_that_all_mask_carry_nothing(dtype, weights, backend):
    """Not in any derivative; and all is as if they were not there."""
    for C in (7, 40) if backend == "cpp" else (7,):
        dead, case = torch.arange(C) % 3 == 1, Case(C=C, leading=(4,), dtypes=(dtype,), weights=weights)
        masked = Problem(case, lambda z, dead=dead: z.masked_fill(dead, -INF))
        short = Problem(case, lambda z, dead=dead: z[:, ~dead])
        masked.labels, short.labels = torch.tensor([0, -100, 5, 6]), torch.tensor([0, -100, 3, 4])
        short.cotangents = [c[:, ~dead] if c.dim() > 1 else c for c in masked.cotangents]
        short.tangent = masked.tangent[:, ~dead]
        found, wanted = masked.agree(), short.found()
        for name, got in found.items():
            assert got.isfinite().all(), name
            if got.dim():
                assert (got[:, dead] == 0).all(), name
                got = got[:, ~dead]
            near(got, wanted[name].double(), got.dtype, TOLERANCE[dtype], name)


@either
def test_classes_that_the_teachers_mask_take_no_part_in_the_kl(C, backend):
    dead = torch.arange(C) % 3 == 1  # for one of the teachers, hence for their mean
    problem = Problem(Case(C=C, reduction="none"), lambda z: z, lambda z: z, lambda z: z.masked_fill(dead, -INF))
    found = problem.agree()
    assert all((found[f"{name} {k}"][:, dead] == 0).all() for name in ("gradient", "first") for k in (1, 2))
    assert (found["first 0"][1, dead] != 0).all()  # its label is ignored: what the KL sends


@either
def test_a_class_that_the_student_alone_masks_costs_everything(C, backend):
    student, teacher = logits(3, C), logits(3, C, seed=1)
    student[1, 2] = -INF
    rows = kd_loss(student, [teacher], reduction="none", **SETTINGS)
    assert rows.isposinf().tolist() == [False, True, False]
    assert kd_loss(student, [teacher], **SETTINGS) == INF
    rows = kd_loss(student, [student], torch.tensor([0, 2, -100]), reduction="none", **SETTINGS)
    assert rows.isposinf().tolist() == [False, True, False]  # its cross-entropy alone
    assert rows[2] == 0


def test_a_teacher_probability_that_is_too_small_for_a_number_adds_nothing(backend):
    """Though the student masks this class, and is infinitely far away."""
    for C in widths(backend):
        problem, results = Problem(Case(C=C, K=1, leading=(2,))), []
        student, teacher = (z.detach() for z in problem.logits)
        teacher[:, 0] = 1e4
        for value in (-1e3, -INF):
            student[:, C - 2] = value
            results.append(problem.found())
        before, after = results
        assert all(after[name].isfinite().all() and torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
@pytest.mark.parametrize("T", [1, 20])
def test_extreme_logits(T, dtype, backend):
    far = torch.tensor([[1e4, -1e4, 0, 1e4], [-1e4, -1e4, 1e4, 5], [0, 1e4, 3, -1e4]], dtype=dtype)
    case = Case(C=4, K=1, T=T, labels="all", reduction="none", dtypes=(dtype,))
    problem = Problem(case, lambda z: far, lambda z: far.flip(-1))
    assert all(t.isfinite().all() for t in problem.agree(floor=1.0).values())


@pytest.mark.parametrize(("who", "value"), [(0, NAN), (0, INF), (2, NAN), (2, INF)])
def test_a_bad_number_shows_and_stays_in_its_row(who, value, backend):
    def run(logits, reduction):
        leaves = [z.clone().requires_grad_() for z in logits]
        loss = kd_loss(leaves[0], leaves[1:], torch.tensor([1, -100, 0]), reduction=reduction, **SETTINGS)
        return loss.detach(), *torch.autograd.grad(loss.sum(), leaves)

    for C in widths(backend):
        given = [logits(3, C, seed=k) for k in range(3)]
        before = run(given, "none")
        given[who][1, C - 2] = value
        after = run(given, "none")
        assert after[0].isnan().tolist() == [False, True, False]
        assert all(torch.equal(a[[0, 2]], b[[0, 2]]) for a, b in zip(after, before, strict=True))
        assert run(given, "mean")[0].isnan() and run(given, "sum")[0].isnan()


@pytest.mark.parametrize("weights", [[1.5, -0.5], torch.tensor([1.5, -0.5])], ids=["list", "tensor"])
def test_a_negative_weight_makes_no_mask_of_infinity(weights, backend):
    student, *teachers = (logits(3, 5, seed=k) for k in range(3))
    teachers[1][1, 2] = INF
    rows = kd_loss(student, teachers, weights=weights, reduction="none", **SETTINGS)
    assert rows.isnan().tolist() == [False, True, False]
    cotangents = meta_cotangent(student, teachers, logits(3, 5), weights=weights, **SETTINGS)
    assert all(c[1].isnan().all() and c[[0, 2]].isfinite().all() for c in cotangents)


@either
@pytest.mark.parametrize("bad", [NAN, INF])
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


# Labels


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("bad", [-1, 5, -101, 2**40])
def test_labels_out_of_range(bad, reduction, backend):
    student = logits(3, 5).requires_grad_()
    with pytest.raises(IndexError, match=rf"label .*{bad}"):
        kd_loss(student, [student.detach()], torch.tensor([0, bad, -100]), reduction=reduction, **SETTINGS)


def test_labels_that_nobody_looked_at(monkeypatch):
    """As on CUDA: NaN instead of a device that stops."""
    monkeypatch.setattr(checks, "check_labels", lambda *_: None)
    student, *teachers = (logits(3, 5, seed=k) for k in range(3))
    labels = torch.tensor([0, 7, -1])
    rows = naive.kd_loss(student, teachers, labels, reduction="none", **SETTINGS)
    assert rows.isnan().tolist() == [False, True, True]
    gradient = student.clone()
    loss = kd_rows(gradient, teachers, labels, None, [0.5, 0.5], 2.0, 0.3, -100, 1.0, None, in_place=True)
    assert loss.isnan().tolist() == [False, True, True] and gradient[1:].isnan().all() and gradient[0].isfinite().all()


# What is refused

z = torch.zeros(3, 5)
META = torch.zeros(3, 5, device="meta")
LONG = torch.zeros(3, dtype=torch.int64)
MISTAKES = {
    "at least one teacher's logits are needed; got none": {"teachers": []},
    r"share one shape; got \[\(3, 5\), \(3, 4\)\]": {"teachers": [z, z[:, 1:]]},
    r"student logits are \(3, 4\), teachers' are \(3, 5\)": {"student": z[:, 1:]},
    r"at least one class; got \(3, 0\)": {"student": z[:, :0], "teachers": [z[:, :0]]},
    r"at least one class; got \(\)": {"student": z[0, 0], "teachers": [z[0, 0]]},
    r"float16 or float64; got \['torch.int64', 'torch.float32'": {"student": z.long()},
    r"float16 or float64; got \['torch.float32', 'torch.float32', 'torch.int32'": {"teachers": [z, z.int()]},
    r"float16 or float64; got \['torch.float8_e5m2'": {"student": z.to(torch.float8_e5m2)},
    "temperature and alpha must be numbers; got a tensor": {"temperature": torch.tensor(2.0)},
    "temperature and alpha must be numbers": {"alpha": torch.tensor(0.3)},
    r"one device; got \['cpu', 'cpu', 'meta'\]": {"teachers": [z, META]},
    "temperature must be above 0; got nan": {"temperature": NAN},
    "1 weights for 2 teachers": {"weights": [1.0]},
    r"tensor \[K\] on the logits' device, cpu; got torch.float32 \(2, 1\)": {"weights": torch.ones(2, 1)},
    r"tensor \[K\] on the logits' device, cpu; got torch.float32 \(\)": {"weights": torch.tensor(0.5)},
    r"tensor \[K\] on the logits' device, cpu; got torch.int64 \(2,\)": {"weights": torch.ones(2).long()},
    r"tensor \[K\] on the logits' device, cpu; got torch.float32 \(5,\) on meta": {"weights": META[0]},
}
MISTAKES_OF_LOSSES = {
    "mean, sum or none; got 'batchmean'": {"reduction": "batchmean"},
    r"int64 \(3,\) on cpu, .* got torch.int32 \(3,\) on cpu": {"labels": LONG.int()},
    r"int64 \(3,\) on cpu, .* got torch.int64 \(3, 1\)": {"labels": LONG[:, None]},
    r"int64 \(3,\) on cpu, .* got torch.int64 \(3,\) on meta": {"labels": META[:, 0].long()},
}
MISTAKES_OF_TANGENTS = {
    r"tangent is torch.float32 \(2, 5\) on cpu, .* \(3, 5\) on cpu": {"tangent": z[1:]},
    r"tangent is torch.int64 \(3, 5\)": {"tangent": z.long()},
    r"tangent is torch.float32 \(3, 5\) on meta, .* on cpu": {"tangent": META},
}


def test_what_does_not_fit_is_refused():
    """Before a backend is asked."""
    fine = {"student": z, "teachers": [z, z], **SETTINGS}
    for says, changes in (MISTAKES | MISTAKES_OF_LOSSES).items():
        with pytest.raises(ValueError, match=says):
            kd_loss(**fine | changes)
    for says, changes in (MISTAKES | MISTAKES_OF_TANGENTS).items():
        with pytest.raises(ValueError, match=says):
            meta_cotangent(**fine | {"tangent": z} | changes)
    for says, given in {"at least one": [[]], "share one": [[z, z[1:]]], "1 weights for 2": [[z, z], [1.0]]}.items():
        with pytest.raises(ValueError, match=says):
            mean_logits(*given)
