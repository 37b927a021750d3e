"""The compiled kernels of distillation on a CPU: at every width, number by number, bit by bit, and what they refuse.

Their derivatives with other settings are in the tests of every backend.
"""

import re
from itertools import cycle, product
from typing import NamedTuple

import pytest
import torch
from kernel_helpers import BF16 as B
from kernel_helpers import F16 as H
from kernel_helpers import F32 as F
from kernel_helpers import F64 as D
from kernel_helpers import Case, Problem, logits
from torch import Tensor

from engine.params import native_build

IGNORE = -100
# Up to so many classes rows are lanes of tiles, above it they are computed one by one.
FEW = int(re.search(r"FEW = (\d+);", (native_build.CSRC / "kd_rows.h").read_text())[1])
either = pytest.mark.parametrize("C", [7, FEW + 7], ids=["tiles", "rows"])
masked = pytest.mark.parametrize("more", [0, FEW], ids=["tiles", "rows"])  # classes at -inf


@pytest.fixture
def ops(compiled, monkeypatch):
    monkeypatch.setenv("ENGINE_KERNELS", "cpp")
    return compiled


class Call(NamedTuple):
    """What the ops take, in their order."""

    student: Tensor
    teachers: list[Tensor]
    labels: Tensor | None
    weights: Tensor | None
    constants: list[float]
    temperature: float = 5.0
    alpha: float = 0.3
    ignore_index: int = IGNORE
    soft_scale: float = 0.7
    hard_scale: Tensor | None = None

    @property
    def logits(self):
        return [self.student, *self.teachers]

    def first(self, ops, rows=True, wanted=None, upstream=None):
        return ops.kd_first(*self, upstream, rows, wanted or [True] * len(self.logits))

    def second(self, ops, upstream, cotangents, wanted=None):
        given, present = [c is not None for c in cotangents], [c for c in cotangents if c is not None]
        return ops.kd_second(upstream, *self, present, given, wanted or [True] * len(self.logits))

    def in_place(self, ops):
        """The rows, and the student's memory, which holds its gradient then."""
        memory = self.student.clone()
        return [ops.kd_rows_(memory, *self[1:]), memory]

    def everything(self, ops, upstream, cotangents):
        """What has no student in it is the last."""
        meta = ops.kd_cotangent(self.teachers, cotangents[0], None, self.constants, self.temperature, 1.5)
        first, second = self.first(ops, upstream=upstream), self.second(ops, upstream, cotangents)
        return [*first, *second, *self.in_place(ops), *meta]


def call(shape=(5, 7), K=2, dtypes=(F,), **changes):
    """Weights as constants that do not sum to 1; every third label is ignored; scales that are not 1."""
    student, *teachers = (logits(*shape, seed=k, dtype=dtypes[k % len(dtypes)]) for k in range(K + 1))
    row = torch.arange(student[..., 0].numel())
    labels = torch.where(row % 3 == 1, IGNORE, 5 * row % shape[-1]).reshape(shape[:-1])
    scale = torch.tensor(1.5, dtype=D if D in dtypes else F)
    made = Call(student, teachers, labels, None, [0.9 / (k + 1) for k in range(K)], hard_scale=scale)
    return made._replace(**changes)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# Numbers


@pytest.mark.parametrize("C", [1, 2, 3, 15, 16, 17, FEW - 1, FEW, FEW + 1, 127, 1000, 1024, 1025])
def test_classes(ops, C):
    """What nearly cancels is measured against 0.05: the terms are about 1."""
    settings = cycle(product((0.5, 1, 5, 20), (0, 0.3, 1)))
    for K, dtype, labels in product((1, 2, 3), (F, D), ("some", None)):
        T, alpha = next(settings)
        Problem(Case(C=C, leading=(5,), K=K, T=T, alpha=alpha, labels=labels, dtypes=(dtype,))).agree(floor=0.05)


@either
@pytest.mark.parametrize("weights", [None, "list", "tensor"])
@pytest.mark.parametrize("dtypes", [(B,), (H,), (F, B), (B, F, H), (H, D), (D, F, B, H)], ids=str)
def test_dtypes(ops, dtypes, weights, C):
    for T, reduction in ((1, "mean"), (5, "none")):
        Problem(Case(C=C, leading=(2, 3), K=3, T=T, weights=weights, reduction=reduction, dtypes=dtypes)).agree(
            floor=0.05
        )


@either
def test_weights_of_any_sign_and_layout(ops, C):
    listed = call((5, C), K=3, constants=[-0.5, 0.0, 1.5])
    for dtype in (F, D, B, H):
        tensor = torch.tensor([-0.5, 9, 0, 9, 1.5], dtype=dtype)[::2]
        assert same(listed._replace(weights=tensor, constants=[]).first(ops), listed.first(ops))
    assert (listed.first(ops)[3] == 0).all(), "of no weight"


@masked
def test_exponentials(ops, more):
    """With p = (1, 0) the second gradient is q = e / (1 + e) for a logit of log e: to 3 roundings, and in the end 0."""
    x = torch.linspace(0, -110, 20001)
    student = torch.stack([torch.zeros_like(x), x, *[torch.full_like(x, -torch.inf)] * more], -1)
    teacher = torch.tensor([0] + [-torch.inf] * (1 + more)).expand_as(student)
    (got,) = ops.kd_first(
        student, [teacher], None, None, [1.0], 1.0, 1.0, IGNORE, 1.0, None, None, False, [True, False]
    )
    correct = x.double().sigmoid()
    large = x > -87.3
    assert ((got[:, 1] - correct).abs() <= 2e-7 * correct)[large].all()
    assert (got[x < -87.4] == 0).all()


@either
@pytest.mark.parametrize("K", [1, 2])
def test_what_is_wanted_and_given(ops, K, C):
    """Alone, each result has the bits that it has among all; what is not given is 0."""
    one, upstream = call((5, C), K=K), logits(5, seed=20)
    cotangents = [logits(5, C, seed=30 + i) for i in range(K + 1)]
    everything, second = one.first(ops, upstream=upstream), one.second(ops, upstream, cotangents)
    for mask in range(2 ** (K + 1)):
        flags = [bool(mask >> i & 1) for i in range(K + 1)]
        picked = [i for i in range(K + 1) if flags[i]]
        assert same(one.first(ops, False, flags, upstream), [everything[1 + i] for i in picked])
        assert same(one.first(ops, True, flags, upstream), [everything[0]] + [everything[1 + i] for i in picked])
        assert same(one.second(ops, upstream, cotangents, flags), [second[0]] + [second[1 + i] for i in picked])
        some = [c if flag else None for c, flag in zip(cotangents, flags, strict=True)]
        zeros = [c if flag else torch.zeros_like(c) for c, flag in zip(cotangents, flags, strict=True)]
        assert same(one.second(ops, upstream, some), one.second(ops, upstream, zeros))


@either
@pytest.mark.parametrize("dtype", [F, D, B], ids=str)
def test_upstream_of_any_dtype_and_layout(ops, dtype, C):
    one, cotangents = call((4, 3, C)), [logits(4, 3, C, seed=k, dtype=d) for k, d in enumerate((H, B, D))]
    number, numbers = torch.tensor(-2.5).to(dtype), logits(4, 3, dtype=B).to(dtype)  # the same in every dtype
    for upstream in (number, number.expand(4, 3), numbers[:, :1].expand(4, 3), numbers.T.contiguous().T):
        plain = upstream.to(F).expand(4, 3).contiguous()
        assert same(one.first(ops, upstream=upstream), one.first(ops, upstream=plain))
        wide = [c.to(D) for c in cotangents]
        assert same(one.second(ops, upstream, cotangents), one.second(ops, plain, wide))
    assert same(one.first(ops), one.first(ops, upstream=torch.ones((), dtype=dtype)))


@pytest.mark.parametrize("dtype", [F, D, B, H], ids=str)
def test_rows_in_place(ops, dtype):
    for shape in ((5, 33), (2, 3, 1030), (2, 25, 6)):
        one = call(shape, dtypes=(dtype, F))
        assert same(one.in_place(ops), one.first(ops, wanted=[True, False, False]))


@pytest.mark.parametrize(("rows", "C"), [(67, 1003), (9001, 5)], ids=["rows", "tiles"])
@pytest.mark.parametrize("T", [1.0, 5.0])
@pytest.mark.parametrize("dtype", [F, D, B, H], ids=str)
def test_same_bits_with_any_number_of_threads(ops, dtype, T, rows, C):
    one, upstream = call((rows, C), dtypes=(dtype,), temperature=T), logits(rows, seed=20)
    cotangents = [logits(rows, C, seed=30 + i, dtype=dtype) for i in range(3)]
    runs, threads = [], torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            runs.append(one.everything(ops, upstream, cotangents))
    finally:
        torch.set_num_threads(threads)
    assert same(runs[0], runs[1]) and same(runs[0], runs[2])


# 16 bits


@masked
@pytest.mark.parametrize("dtype", [B, H], ids=str)
def test_reads_every_number(ops, dtype, more):
    """With p = (1/2, 1/2) and a tangent (x, -x), p (u - <p, u>) is x / 2."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    tangent = torch.stack([x, -x, *[x] * more], -1)
    teacher = torch.tensor([0.0, 0] + [-torch.inf] * more).expand(tangent.shape)
    for u in (tangent, tangent.T.contiguous().T):
        (got,) = ops.kd_cotangent([teacher], u, None, [1.0], 1.0, 2.0)
        finite = x.isfinite()
        assert torch.equal(got[finite, 0], x[finite].float())
        assert not got[~finite, :2].isfinite().any()


@masked
@pytest.mark.parametrize("dtype", [B, H], ids=str)
def test_rounds_as_torch_does(ops, dtype, more):
    """With q = (1/2, 1/2) and p = (1, 0), the second gradient is half the upstream: every upper half of a float32 with
    the lower halves around the ties."""
    halves = torch.tensor(
        [0, 1, 0x7FF, 0x800, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32
    )
    u = (torch.arange(-(2**15), 2**15, dtype=torch.int32)[:, None] * 2**16 + halves).flatten().view(F)
    u = u[u.isfinite()]
    student = torch.tensor([0, 0] + [-torch.inf] * more, dtype=dtype).expand(len(u), 2 + more)
    teacher = torch.tensor([0] + [-torch.inf] * (1 + more)).expand(student.shape)
    (got,) = ops.kd_first(student, [teacher], None, None, [1.0], 1.0, 1.0, IGNORE, 1.0, None, u, False, [True, False])
    assert torch.equal(got[:, 1], (u.double() / 2).float().to(dtype))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.nan, "all -inf"], ids=str)
@pytest.mark.parametrize("C", [6, 1030])
@pytest.mark.parametrize("dtype", [F, D, B, H], ids=str)
def test_bad_rows_stay_alone(ops, dtype, value, C):
    """A NaN of either sign, +inf or nothing above -inf: this row is NaN in every result, the others keep their bits."""
    upstream, cotangents = logits(5, seed=20), [logits(5, C, seed=30 + i) for i in range(3)]
    masked, rest = value == "all -inf", torch.tensor([0, 1, 2, 4])
    for which, column in product(range(3), (0, C * 2 // 3, C - 1)):
        one = call((5, C), dtypes=(dtype,))
        if which and not masked:
            one.constants[which - 1] *= -1  # which must not make a mask of a +inf
        before = one.everything(ops, upstream, cotangents)
        one.logits[which][3, slice(None) if masked else column] = -torch.inf if masked else value
        after = one.everything(ops, upstream, cotangents)
        for a, b in list(zip(after, before, strict=True))[: None if which else -2]:
            assert a[3].isnan().all()
            assert torch.equal(a[rest], b[rest])


@pytest.mark.parametrize("scale", [torch.inf, torch.nan])
@either
def test_nothing_of_the_scale_enters_where_no_label_counts(ops, scale, C):
    one = call((5, C))
    upstream, cotangents = logits(5, seed=20), [logits(5, C, seed=30 + i) for i in range(3)]
    for labels in (None, torch.full((5,), IGNORE)):
        some = one._replace(labels=labels, hard_scale=torch.tensor(scale))
        other = one._replace(labels=None, hard_scale=None)
        assert same(some.first(ops), other.first(ops))
        assert same(some.second(ops, upstream, cotangents), other.second(ops, upstream, cotangents))


# What is refused


@pytest.mark.parametrize("bad", [-1, 7, -101, 2**40])
def test_labels_outside(ops, bad):
    one = call((2, 3, 7))
    one.labels[1, 1] = bad
    before = one.student.clone()
    for op, run in {
        "kd_first": lambda: one.first(ops),
        "kd_second": lambda: one.second(ops, torch.ones(()), [None] * 3),
        "kd_rows_": lambda: ops.kd_rows_(*one),
    }.items():
        message = rf"metadistil::{op}: the label of row 4 is {bad}; it must be 0 to 6, or ignore_index -100\."
        with pytest.raises(IndexError, match=message):
            run()
    assert torch.equal(one.student, before)


def cotangent(ops, teacher, tangent, constants=(1.0,), T=1.0):
    return ops.kd_cotangent(teacher, tangent, None, list(constants), T, 1.0)


x, y, FITS = torch.ones(5, 7), torch.ones(5, 8), "it must be float32, float64, bfloat16 or float16"
FIRST = [
    ({"student": x.long()}, f"student is int64 [5, 7] on cpu; {FITS}, with at least one class"),
    ({"student": x[:, :0]}, "student is float32 [5, 0] on cpu; it must"),
    ({"teachers": []}, "teachers is empty; there must be at least one"),
    ({"teachers": [x, y]}, f"teachers[1] is float32 [5, 8] on cpu; {FITS} [5, 7] on cpu, to fit student"),
    ({"teachers": [x.int(), x]}, "teachers[0] is int32 [5, 7] on cpu; it must be"),
    ({"labels": torch.zeros(5).int()}, "labels is int32 [5] on cpu; it must be int64 [5] on cpu, to fit student"),
    ({"weights": torch.ones(3)}, f"weights is float32 [3] on cpu; {FITS} [2] on cpu, one for each teacher"),
    ({"constants": [1.0]}, "constants has 1 numbers; it must have 2, one for each teacher"),
    ({"temperature": 0.0}, "temperature is 0; it must be above 0"),
    ({"hard_scale": torch.tensor(1.0, dtype=D)}, "hard_scale is float64 [] on cpu; it must be float32 [] on cpu"),
    ({"hard_scale": torch.ones(1)}, "hard_scale is float32 [1] on cpu; it must be float32 [] on cpu"),
    ({"upstream": x[0]}, f"upstream is float32 [7] on cpu; {FITS} [] or [5] on cpu, to fit student"),
    ({"upstream": torch.tensor(1)}, "upstream is int64 [] on cpu"),
    ({"wanted": [True, False]}, "wanted has 2 flags; it must have 3, for the student and each teacher"),
]
OTHERS = {
    "kd_rows_: student is not contiguous; it is overwritten": lambda ops: ops.kd_rows_(torch.ones(7, 5).T, *call()[1:]),
    "kd_rows_: argument tensors share memory": lambda ops: ops.kd_rows_(x, *call(teachers=[x, x])[1:]),
    "kd_second: wanted has 1 flags; it must have 3": lambda ops: call().second(ops, x.sum(), [x] * 3, [True]),
    "kd_second: given has 2 flags; it must have 3": lambda ops: call().second(ops, x.sum(), [x] * 2),
    "kd_second: there are 1 cotangents; given names 2":
        lambda ops: ops.kd_second(x.sum(), *call(), [x], [True, True, False], [True] * 3),
    f"kd_second: cotangents[1] is float32 [5, 8] on cpu; {FITS} [5, 7] on cpu, to fit student":
        lambda ops: call().second(ops, x.sum(), [x, None, y]),
    "kd_second: upstream is float32 [7] on cpu": lambda ops: call().second(ops, x[0], [x] * 3),
    "kd_cotangent: teachers is empty": lambda ops: cotangent(ops, [], x, []),
    f"kd_cotangent: teachers[0] is float32 [5, 8] on cpu; {FITS} [5, 7] on cpu, to fit tangent":
        lambda ops: cotangent(ops, [y], x),
    "kd_cotangent: constants has 2 numbers; it must have 1": lambda ops: cotangent(ops, [x], x, [1.0, 1.0]),
    "kd_cotangent: temperature is 0": lambda ops: cotangent(ops, [x], x, T=0.0),
    "kd_cotangent: tangent is int64 [5, 7]": lambda ops: cotangent(ops, [x], x.long()),
}  # fmt: skip


def test_bad_arguments(ops):
    for changes, says in FIRST:
        settings = {name: changes[name] for name in changes.keys() & set(Call._fields)}
        with pytest.raises(ValueError, match=re.escape(f"metadistil::kd_first: {says}")):
            call(**settings).first(ops, **{name: changes[name] for name in changes.keys() - settings.keys()})
    for says, run in OTHERS.items():
        with pytest.raises(ValueError, match=re.escape(f"metadistil::{says}")):
            run(ops)
