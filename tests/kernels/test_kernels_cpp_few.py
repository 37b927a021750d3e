"""The tiles of csrc/kd_few.cpp, 32 rows at a time up to FEW classes, against float64 autograd and the rows one by one."""

from itertools import product

import pytest
import test_kernels_cpp as cpp
import torch
from kernel_helpers import Case, Problem, logits, near, tolerance
from test_kernels_cpp import FEW, IGNORE, B, D, F, H, call, same

ops = cpp.ops
CLASSES = [1, 2, 3, 4, 5, FEW]  # up to 4 have loops of their own


def wider(x, value=-torch.inf):
    """More classes, so that rows are computed one by one."""
    return torch.cat([x, torch.full((*x.shape[:-1], FEW), value, dtype=x.dtype)], -1)


@pytest.mark.parametrize("C", CLASSES)
def test_ragged(ops, C):
    for rows, (K, T), dtypes in product((1, 31, 32, 33, 4097), ((1, 5), (2, 1)), ((F,), (D,), (B,), (H, D), (F, H))):
        Problem(Case(C=C, leading=(rows,), K=K, T=T, dtypes=dtypes)).agree(floor=0.05)


@pytest.mark.parametrize("C", CLASSES)
@pytest.mark.parametrize("rows", [31, 4097])
@pytest.mark.parametrize("dtype", [F, D, B, H], ids=str)
def test_like_the_rows_one_by_one(ops, dtype, rows, C):
    """The same rows with classes that carry nothing; in both, bad rows and classes that are masked in some rows."""
    wide = D if dtype == D else F
    for K, T in ((1, 1.0), (2, 5.0)):
        one = call((rows, C), K=K, temperature=T, dtypes=(dtype,))
        upstream, cotangents = logits(rows, seed=20), [logits(rows, C, seed=30 + i) for i in range(K + 1)]
        for i, z in enumerate(one.logits):
            z[7 + i :: 40, C // 2] = [torch.nan, torch.inf, -torch.nan][i]
            if C > 3:
                z[3::5, 2] = -torch.inf
        one.labels[one.labels == 2] = 1
        other = one._replace(student=wider(one.student), teachers=[wider(z) for z in one.teachers])
        found = one.everything(ops, upstream, cotangents)
        by_row = other.everything(ops, upstream, [wider(c, 1.0) for c in cotangents])
        for got, row in zip(found, by_row, strict=True):
            if row.dim() == 2:
                row, behind = row[:, :C], row[:, C:]
                assert (behind.nan_to_num(0) == 0).all()
            assert torch.equal(got.isnan(), row.isnan())
            wide = D if dtype == D else F
            near(got.nan_to_num(0), row.double().nan_to_num(0), got.dtype, tolerance(got.dtype, wide), floor=0.05)


@pytest.mark.parametrize("C", CLASSES)
@pytest.mark.parametrize("dtype", [F, D, B, H], ids=str)
def test_same_bits_wherever_a_tile_begins(ops, dtype, C):
    """A row depends on none around it: on no bad one, and on none that fills up the last tile."""
    one, upstream = call((75, C), dtypes=(dtype,)), logits(75, seed=20)
    cotangents = [logits(75, C, seed=30 + i, dtype=dtype) for i in range(3)]
    whole = one.everything(ops, upstream, cotangents)
    for begin, end in ((0, 1), (1, 75), (17, 49), (30, 34), (74, 75)):
        some = slice(begin, end)
        student, *teachers = (z[some] for z in one.logits)
        part = one._replace(student=student, teachers=teachers, labels=one.labels[some])
        assert same(part.everything(ops, upstream[some], [c[some] for c in cotangents]), [x[some] for x in whole])
    odd = torch.arange(75) % 2 == 1
    for z in one.logits:
        z[~odd] = torch.nan
    spoiled = one.everything(ops, upstream, cotangents)
    assert same([x[odd] for x in spoiled], [x[odd] for x in whole])
    assert all(x[~odd].isnan().all() for x in spoiled)


@pytest.mark.parametrize("dtype", [F, D], ids=str)
def test_logarithms(ops, dtype):
    """Losses where they are logarithms of sums alone, log(1 + e) - log 2 and log(1 + e), and where they nearly vanish."""
    x = torch.linspace(0, -80, 20001, dtype=dtype)
    student, teacher = torch.stack([torch.zeros_like(x), x], -1), torch.zeros(20001, 2, dtype=dtype)
    labels = torch.zeros(20001, dtype=torch.int64)
    wide = student.double().log_softmax(-1)
    for alpha, correct in ((0, -wide[:, 0]), (1, -wide.mean(-1) - torch.tensor(2.0, dtype=D).log())):
        rows = ops.kd_first(
            student, [teacher], labels, None, [1.0], 1.0, alpha, IGNORE, 1.0, None, None, True, [False, False]
        )[0]
        error, roundings = (rows.double() - correct).abs(), 4 * torch.finfo(dtype).eps
        assert (error <= roundings * (1 + correct) / 2).all()
        assert rows[0] == (0 if alpha else torch.tensor(2.0, dtype=D).log().to(dtype))
