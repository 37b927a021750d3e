"""kd_loss and meta_cotangent of every backend against the formula in float64: values, first and second derivatives."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from kernel_helpers import BF16, F16, F32, F64, Case, Problem, logits, triton_is_slow

from engine.kernels import kd_loss, mean_logits

CASES = [
    Case("one class: every derivative is exactly zero", C=1, labels="all"),
    Case("as many rows as the benchmarks of text have classes", C=3, leading=(5,)),
    Case("three teachers", K=3),
    Case("four teachers of given weights", K=4, weights="list"),
    Case("a tensor of weights in float64", weights="tensor", dtypes=(F64,)),
    Case("weights that learn", weights="learned", dtypes=(F64,)),
    Case("weights that learn, row by row", weights="learned", reduction="none", K=3),
    Case("sharper than the logits", T=0.5),
    Case("nearly flat: the KL is a small difference", T=20),
    Case("cross-entropy alone", alpha=0),
    Case("KL alone, with labels", alpha=1),
    Case("no labels", labels=None),
    Case("no loss at all", labels=None, alpha=0),
    Case("no label counts, in a sum", labels="none", reduction="sum"),
    Case("an ignored label among the classes", ignore=3, leading=(7,)),
    Case("an ignored label behind the classes", ignore=255),
    Case("row by row", reduction="none"),
    Case("no leading dimension", leading=(), labels="all"),
    Case("two leading dimensions", leading=(2, 3), reduction="none"),
    Case("no row", leading=(0,), reduction="sum"),
    Case("a width that no block has", C=127, leading=(5,), K=3),
    Case("float64", dtypes=(F64,), C=127, T=20),
    Case("float16", dtypes=(F16,), C=127),
    Case("bfloat16, row by row", dtypes=(BF16,), reduction="none", T=20),
    Case("a student and teachers of other dtypes", dtypes=(F32, BF16, F16), K=3),
    Case("one teacher in float64", dtypes=(BF16, F64)),
    Case("a classifier of images, bfloat16, T of the published runs", C=1000, leading=(2,), dtypes=(BF16,), T=5),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case, backend):
    found = Problem(case).agree()
    if case.labels is None and case.alpha == 0 or case.C == 1:
        assert all((x == 0).all() for x in found.values())


@triton_is_slow
def test_a_vocabulary(backend):
    Problem(Case(C=50257, leading=(1,), K=1, labels="all", dtypes=(BF16,))).agree()


@settings(
    max_examples=10, deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(
    case=st.builds(
        Case,
        proves=st.just("a combination"),
        C=st.integers(1, 9),
        leading=st.lists(st.integers(0, 3), max_size=3).map(tuple),
        K=st.integers(1, 4),
        T=st.sampled_from([0.5, 1, 5, 20]),
        alpha=st.sampled_from([0, 0.3, 1]),
        labels=st.sampled_from([None, "all", "some", "none"]),
        ignore=st.sampled_from([-100, -1, 0, 2]),
        reduction=st.sampled_from(["mean", "sum", "none"]),
        weights=st.sampled_from([None, "list", "tensor", "learned"]),
        dtypes=st.lists(st.sampled_from([F32, F64, BF16, F16]), min_size=1, max_size=3).map(tuple),
    )
)
def test_combinations(backend, case):
    Problem(case).agree()


def test_a_list_of_weights_may_hold_tensors(backend):
    student, *teachers = (logits(3, 5, seed=k, dtype=F64) for k in range(3))
    weight = torch.tensor(0.25, dtype=F64, requires_grad=True)
    stacked = torch.tensor([0.25, 0.6], dtype=F64, requires_grad=True)
    losses = [kd_loss(student, teachers, weights=w, temperature=2.0, alpha=0.3) for w in ([weight, 0.6], stacked)]
    assert torch.equal(*losses)
    (found,), (both,) = torch.autograd.grad(losses[0], weight), torch.autograd.grad(losses[1], stacked)
    assert torch.equal(found, both[0])


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_what_agrees_loses_nothing(dtype, backend):
    """And sends nothing, though the terms are about T."""
    student = logits(3, 40, dtype=dtype)
    leaves = [student.clone().requires_grad_() for _ in range(3)]
    loss = kd_loss(leaves[0], leaves[1:], temperature=20.0, alpha=1.0)
    assert loss.abs() < (1e-12 if dtype == F64 else 2e-3)  # T^2 times some roundings of the logarithm of 40
    for gradient in torch.autograd.grad(loss, leaves):
        assert gradient.abs().max() < (1e-14 if dtype == F64 else 1e-5)


def test_mean_logits():
    first, second, third = (logits(2, 3, seed=k, dtype=d).requires_grad_() for k, d in enumerate((F32, BF16, F64)))
    assert mean_logits([first, second]).dtype == F32
    assert mean_logits([second, third]).dtype == F64
    assert torch.equal(mean_logits([first, second]), (first + second.float()) / 2)
    weights = torch.tensor([0.5, 2.0], requires_grad=True)
    found = mean_logits([first, second], weights)
    assert torch.equal(found, mean_logits([first, second], [0.5, 2.0]))
    found.sum().backward()
    assert torch.equal(first.grad, torch.full((2, 3), 0.5))
    assert torch.equal(second.grad, torch.full((2, 3), 2.0, dtype=BF16))
    assert torch.allclose(weights.grad, torch.stack([first.sum(), second.float().sum()]).detach())
