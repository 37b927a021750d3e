"""What the tests of the distillation kernels share: cases, the plain formula in float64, and how near is near enough."""

import os
from dataclasses import dataclass
from math import prod

import pytest
import torch
from torch import Tensor

from engine.kernels import kd_loss, meta_cotangent

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# Relative to the largest expected number of a tensor.
# float64: a few roundings of 1e-16, times T^2 (400 here) over a KL that is a difference of logarithms.
# float32: the same with 6e-8; the largest seen was a third of this.
# bfloat16, float16: computed in float32, then rounded to 8 or 11 bits: 2^-8, 2^-11, and a little for the float32.
TOLERANCE = {F64: 1e-12, F32: 1e-4, BF16: 4.1e-3, F16: 5.5e-4}

# Triton's interpreter takes seconds for these, whose numbers its quick tests compare with the formula's.
triton_is_slow = pytest.mark.parametrize(
    "backend", ["reference", "cpp", pytest.param("triton", marks=pytest.mark.slow)], indirect=True
)
# What a compiler and the dispatcher see is the ops, whatever computes behind them.
one_backend = pytest.mark.parametrize("backend", ["cpp", pytest.param("triton", marks=pytest.mark.slow)], indirect=True)


def tolerance(dtype: torch.dtype, wide: torch.dtype, roundings: int = 1) -> float:
    """For a result in `dtype` of arithmetic in `wide`."""
    if dtype == BF16 and os.environ.get("ENGINE_KERNELS") == "triton" and not torch.cuda.is_available():
        roundings *= 2  # Triton's interpreter cuts bfloat16 off
    return max(TOLERANCE[wide], (roundings if dtype in (BF16, F16) else 1) * TOLERANCE[dtype])


def logits(*shape, seed=0, dtype=F32, scale=3) -> Tensor:
    """On the device that is the default, the same numbers on each."""
    generator = torch.Generator("cpu").manual_seed(seed)
    made = scale * torch.randn(shape, generator=generator, dtype=F64, device="cpu")
    return made.to(torch.get_default_device(), dtype)


@dataclass(frozen=True)
class Case:
    """Settings of `kd_loss`, and of what tensors it is given."""

    proves: str = ""
    C: int = 5
    leading: tuple[int, ...] = (3,)
    K: int = 2
    T: float = 2.0
    alpha: float = 0.3
    labels: str | None = "some"  # "all"; "some": every third is ignored; "none": every one is; or no labels
    ignore: int = -100
    reduction: str = "mean"
    weights: str | None = None  # "list", "tensor" or "learned", else none given
    dtypes: tuple[torch.dtype, ...] = (F32,)  # of student and teachers in turn

    def __str__(self):
        return self.proves


class Problem:
    """A case's tensors, by which kernels and plain formula are both differentiated twice.

    `layouts` make views of student and teachers in turn, all of one shape.
    """

    def __init__(self, case: Case, *layouts, labels=lambda y: y):
        self.case, shape = case, (*case.leading, case.C)
        made = [logits(*shape, seed=k, dtype=case.dtypes[k % len(case.dtypes)]) for k in range(case.K + 1)]
        if layouts:
            made = [layouts[k % len(layouts)](z) for k, z in enumerate(made)]
        self.logits = [z.detach().requires_grad_() for z in made]
        shape = self.logits[0].shape
        self.wide = F64 if F64 in [z.dtype for z in self.logits] else F32
        self.labels = None
        if case.labels is not None:
            row = torch.arange(prod(shape[:-1]))
            left_out = {"all": row < 0, "some": row % 3 == 1, "none": row >= 0}[case.labels]
            self.labels = labels(torch.where(left_out, case.ignore, 7 * row % shape[-1]).reshape(shape[:-1]))
        numbers = [0.9 / (k + 1) for k in range(case.K)]  # that need not sum to 1
        self.weights = {None: None, "list": numbers}.get(case.weights, torch.tensor(numbers, dtype=self.wide))
        self.learned = [self.weights.requires_grad_()] if case.weights == "learned" else []
        self.settings = {"temperature": case.T, "alpha": case.alpha}
        self.reduced = {"ignore_index": case.ignore, "reduction": case.reduction}
        per_row = shape[:-1] if case.reduction == "none" else ()
        self.upstream = logits(*per_row, seed=20, dtype=self.wide, scale=1).requires_grad_()
        self.cotangents = [logits(*z.shape, seed=30 + i, dtype=z.dtype) for i, z in enumerate(self.leaves)]
        self.tangent = logits(*shape, seed=50, dtype=case.dtypes[0])

    @property
    def leaves(self) -> list[Tensor]:
        return [*self.logits, *self.learned]

    def loss(self, student: Tensor | None = None, teachers: list[Tensor] | None = None) -> Tensor:
        student, teachers = student if student is not None else self.logits[0], teachers or self.logits[1:]
        return kd_loss(student, teachers, self.labels, weights=self.weights, **self.settings, **self.reduced)

    def found(self) -> dict[str, Tensor]:
        """The loss, the gradients as training takes them, the first and second derivatives, the meta-cotangents."""
        loss = self.loss()
        upstream = self.upstream
        again = {"retain_graph": True, "materialize_grads": True}
        quick = torch.autograd.grad(loss, self.leaves, upstream.detach(), **again)
        first = torch.autograd.grad(loss, self.leaves, upstream, create_graph=True, materialize_grads=True)
        second = torch.autograd.grad(first, [upstream, *self.leaves], self.cotangents, materialize_grads=True)
        meta = meta_cotangent(*self.split(self.logits), self.tangent, weights=self.weights, **self.settings)
        return named({"loss": [loss], "gradient": quick, "first": first, "second": second, "meta": meta})

    def expected(self) -> dict[str, Tensor]:
        leaves = [z.detach().double().requires_grad_() for z in self.leaves]
        upstream = self.upstream.detach().double().requires_grad_()
        inputs, learned = leaves[: self.case.K + 1], leaves[self.case.K + 1 :]
        weights = learned[0] if learned else self.weights
        loss = plain(*self.split(inputs), self.labels, weights=weights, **self.settings, **self.reduced)
        first = torch.autograd.grad(loss, leaves, upstream, create_graph=True, materialize_grads=True)
        cotangents = [c.double() for c in self.cotangents]
        second = torch.autograd.grad(
            first, [upstream, *leaves], cotangents, retain_graph=True, materialize_grads=True
        )  # fmt: skip
        averaged = self.reduced | {"reduction": "mean"}
        loss_again = plain(*self.split(inputs), self.labels, weights=weights, **self.settings, **averaged)
        (slope,) = torch.autograd.grad(loss_again, inputs[0], create_graph=True)
        meta = torch.autograd.grad((slope * self.tangent.double()).sum(), inputs[1:], materialize_grads=True)
        return named({"loss": [loss], "gradient": first, "first": first, "second": second, "meta": meta})

    def agree(self, floor: float = 0.0) -> dict[str, Tensor]:
        """Numbers, dtypes and shapes; and no input is written. `floor` is the size of terms that may cancel."""
        before = [t.detach().clone() for t in self.tensors()]
        found, expected = self.found(), self.expected()
        assert found.keys() == expected.keys()
        dtypes = [z.dtype for z in self.leaves]
        dtypes = {"loss": [self.wide], "second": [self.wide, *dtypes], "meta": [self.wide] * self.case.K}.get
        for name, correct in expected.items():
            group, i = name.split()
            dtype = dtypes(group, [z.dtype for z in self.leaves])[int(i)]
            # what training takes is rounded in the forward, and again when the upstream is known
            near(found[name], correct, dtype, tolerance(dtype, self.wide, 2 if group == "gradient" else 1), name, floor)
        assert all(torch.equal(a, b) for a, b in zip(self.tensors(), before, strict=True))
        return found

    def tensors(self) -> list[Tensor]:
        more = [t for t in (self.labels, self.weights) if isinstance(t, Tensor)]
        return [*self.logits, *more, self.upstream, *self.cotangents, self.tangent]

    @staticmethod
    def split(logits: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        return logits[0], logits[1:]


def named(groups: dict) -> dict[str, Tensor]:
    return {f"{name} {i}": t.detach() for name, tensors in groups.items() for i, t in enumerate(tensors)}


def near(got: Tensor, expected: Tensor, dtype: torch.dtype, tolerance: float, what="", floor: float = 0.0) -> None:
    assert got.dtype == dtype, what
    assert got.shape == expected.shape, what
    if got.numel():
        error, largest = (got.double() - expected).abs().max(), expected.abs().max()
        assert error <= tolerance * max(largest, floor), f"{what}: {error:.2e} off, the largest is {largest:.2e}"


def plain(student, teachers, labels=None, *, temperature, alpha, weights=None, ignore_index=-100, reduction="mean"):
    """The loss as the formula stands, differentiable any number of times; a class at -inf takes no part in a softmax."""
    weights = [1 / len(teachers)] * len(teachers) if weights is None else weights
    mean = sum(w * z for w, z in zip(weights, teachers, strict=True))
    in_p, in_q = mean != -torch.inf, student != -torch.inf
    log_p, log_q = log_softmax(mean, in_p, temperature), log_softmax(student, in_q, temperature)
    p = torch.where(in_p, log_p, -torch.inf).exp()
    distance = torch.where(in_p, log_p - torch.where(in_q, log_q, -torch.inf), 0.0)
    rows = alpha * temperature**2 * (p * distance).sum(-1)
    rows = rows / max(1, rows.numel()) if reduction == "mean" else rows
    if labels is not None:
        counts = labels != ignore_index
        picked = -log_softmax(student, in_q, 1.0).gather(-1, torch.where(counts, labels, 0)[..., None])[..., 0]
        hard = torch.where(counts, (1 - alpha) * picked, 0.0)
        rows = rows + (hard / counts.sum().clamp_min(1) if reduction == "mean" else hard)
    return rows if reduction == "none" else rows.sum()


def log_softmax(z: Tensor, alive: Tensor, temperature: float) -> Tensor:
    """Where alive; finite elsewhere, so that what is not chosen has no NaN in its derivative."""
    top = torch.where(alive, z, -torch.inf).amax(-1, keepdim=True).detach() if z.numel() else 0.0
    z = torch.where(alive, z - top, 0.0) / temperature
    return z - torch.where(alive, z.exp(), 0.0).sum(-1, keepdim=True).log()
