"""What the benchmark of the kernels measures: shapes, passes, and the implementations of one function.

forward      the loss, no gradient
backward     the loss and its gradient to the student
double       the student's gradient g with create_graph, then what <g, u> sends to the student and the teachers
cotangent    what <g, u> sends to the teachers, which needs no cross-entropy: `meta_cotangent`
fused        last layers, loss and gradients to the student's hidden states and weights: `fused_linear_kd`
fused_kl     the same without labels at T 1 and alpha 1, the function of LigerFusedLinearJSD with beta 0
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.devices import Host
from bench.replay import Run
from engine.kernels import fused_linear_kd, kd_loss, meta_cotangent
from engine.kernels.ops.kd_loss import naive
from engine.kernels.ops.meta_cotangent import naive as naive_cotangent

T, ALPHA = 4.0, 0.5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LOGITS = ("forward", "backward", "double", "cotangent")
FUSED = ("fused", "fused_kl")
LAUNCH = 2**20  # bytes: below, the time is that of launching


class Case(NamedTuple):
    classes: int
    rows: int
    dtype: str
    teachers: int = 1
    hidden: int = 0  # of the fused passes
    full: bool = False  # only with --full

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.classes}-{self.dtype}-K{self.teachers}" + f"-H{self.hidden}" * (self.hidden > 0)


def traffic(name: str, case: Case) -> int:
    """Bytes that a pass has to move: each input read once, each gradient written once, labels included."""
    size, K, labels = DTYPES[case.dtype].itemsize, case.teachers, 8 * case.rows
    if name in FUSED:
        weight, hidden = case.classes * case.hidden, case.rows * case.hidden
        return size * ((1 + K) * (weight + hidden) + weight + hidden) + labels * (name == "fused")
    logits = case.rows * case.classes
    read, written = {"forward": (1 + K, 0), "backward": (1 + K, 1), "double": (2 + K, 2 + K), "cotangent": (1 + K, 0)}[
        name
    ]
    if name == "cotangent":  # its results are float32
        return size * logits * read + 4 * logits * K
    return size * logits * (read + written) + labels


def operations(case: Case) -> int:
    """Of the matrix products of a fused pass: one for each model's logits, two for the student's gradients."""
    return 2 * case.rows * case.hidden * case.classes * (1 + case.teachers + 2)


class Inputs:
    """Of one case, the same every time; a tensor requires a gradient where the pass differentiates by it."""

    def __init__(self, name: str, case: Case, device: torch.device):
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, scale: float) -> Tensor:
            found = torch.empty(shape, device=device, dtype=DTYPES[case.dtype])
            return found.normal_(0, scale, generator=generator)

        self.labels = torch.randint(case.classes, (case.rows,), device=device, generator=generator)
        if name in FUSED:
            self.hidden = [normal(case.rows, case.hidden, scale=1) for _ in range(1 + case.teachers)]
            self.weights = [normal(case.classes, case.hidden, scale=3 / case.hidden**0.5) for _ in self.hidden]
            self.hidden[0].requires_grad_(), self.weights[0].requires_grad_()
            return
        self.student, self.tangent, *self.teachers = (
            normal(case.rows, case.classes, scale=3) for _ in range(2 + case.teachers)
        )
        self.student.requires_grad_(name != "forward")
        for teacher in self.teachers:
            teacher.requires_grad_(name in ("double", "cotangent"))

    def tensors(self, name: str) -> list[Tensor]:
        """What the pass has to read."""
        if name in FUSED:
            return [*self.hidden, *self.weights, *([self.labels] if name == "fused" else [])]
        if name == "cotangent":  # the closed form does not read the student's logits
            return [*self.teachers, self.tangent]
        return [self.student, *self.teachers, *([self.tangent] if name == "double" else []), self.labels]


# Implementations of the loss: (student, teachers, labels or None) -> []


def ours(student: Tensor, teachers: list[Tensor], labels: Tensor | None) -> Tensor:
    return kd_loss(student, teachers, labels, temperature=T, alpha=ALPHA)


def by_reference(student: Tensor, teachers: list[Tensor], labels: Tensor | None) -> Tensor:
    return naive.kd_loss(student, teachers, labels, temperature=T, alpha=ALPHA)


def mean(teachers: list[Tensor]) -> Tensor:
    return reduce(torch.add, (t.float() for t in teachers)) / len(teachers) if teachers[1:] else teachers[0].float()


def eager(student: Tensor, teachers: list[Tensor], labels: Tensor | None, T: float = T, alpha: float = ALPHA) -> Tensor:
    """What people write."""
    student = student.float()
    soft = F.kl_div(F.log_softmax(student / T, -1), F.softmax(mean(teachers) / T, -1), reduction="batchmean")
    soft = soft * T * T * alpha
    return soft if labels is None else soft + (1 - alpha) * F.cross_entropy(student, labels)


def liger() -> Callable[..., Tensor]:
    """Its divergence takes log-probabilities; its cross-entropy overwrites the student's logits with their gradient."""
    from liger_kernel.transformers import LigerCrossEntropyLoss, LigerKLDIVLoss

    divergence, hard = LigerKLDIVLoss(reduction="batchmean"), LigerCrossEntropyLoss()

    def loss(student: Tensor, teachers: list[Tensor], labels: Tensor) -> Tensor:
        soft = divergence(F.log_softmax(student.float() / T, -1), F.softmax(mean(teachers) / T, -1))
        return soft * T * T * ALPHA + (1 - ALPHA) * hard(student, labels)

    return loss


def liger_fused(name: str, compiled: bool = True) -> Callable[..., Tensor]:
    """Both give KL(teacher || student) at beta 0, averaged over rows and without the T^2."""
    if name == "fused":
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        return LigerFusedLinearJSDLoss(
            weight_hard_loss=1 - ALPHA, weight_soft_loss=ALPHA * T * T, beta=0.0, temperature=T, compiled=compiled
        )
    from liger_kernel.transformers import LigerFusedLinearJSD

    return LigerFusedLinearJSD(jsd_beta=0.0)


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})


def missing(implementation: str, device: str) -> str:
    """Why it is left out; empty where it runs."""
    if implementation == "liger":
        if device != "cuda":
            return "its kernels need CUDA"
        return "" if find_spec("liger_kernel") else "liger-kernel is not installed"
    if implementation == "torch.compile" and not shutil.which(os.environ.get("CXX", "g++").split()[0]):
        return "there is no C++ compiler"
    return ""


def rows_of(name: str, case: Case, cuda: bool) -> list[str]:
    """The implementations of a pass, those included that a machine may have to leave out."""
    if name in FUSED:
        return ["ours", "reference", "eager", "liger"]
    if name == "cotangent":
        return ["ours", "reference", "eager"]
    if name == "double":
        return ["ours", "eager"]
    graph = ["graph"] if cuda and traffic(name, case) < LAUNCH else []
    return ["ours", "reference", "eager", "torch.compile", "liger", *graph]


# Passes: name -> implementation -> run, whose call returns what is compared with the truth


def first(loss: Callable[..., Tensor], x: Inputs, student: Tensor) -> list[Tensor]:
    found = loss(student, x.teachers, x.labels)
    return [found.detach(), *torch.autograd.grad(found, student)]


def second(loss: Callable[..., Tensor], x: Inputs, labels: Tensor | None, targets: list[Tensor]) -> list[Tensor]:
    found = loss(x.student, x.teachers, labels)
    (gradient,) = torch.autograd.grad(found, x.student, create_graph=True)
    return [gradient.detach(), *torch.autograd.grad(gradient, targets, x.tangent)]


def logits_runs(name: str, case: Case, x: Inputs, device: Host) -> tuple[dict[str, Run], dict[str, str]]:
    """The runs of a pass over logits, and why others are left out."""
    losses: dict[str, Callable[..., Tensor]] = {"ours": ours, "reference": by_reference, "eager": eager}
    if name == "cotangent":
        settings = {"temperature": T, "alpha": ALPHA}
        return {
            "ours": Run(torch.no_grad()(lambda: meta_cotangent(x.student, x.teachers, x.tangent, **settings))),
            "reference": Run(
                torch.no_grad()(lambda: naive_cotangent.meta_cotangent(x.teachers, x.tangent, **settings))
            ),
            "eager": Run(lambda: second(eager, x, None, x.teachers)[1:]),
        }, {}
    if name == "double":
        del losses["reference"]
        targets = [x.student, *x.teachers]
        return {n: Run(lambda f=f: second(f, x, x.labels, targets)) for n, f in losses.items()}, {}
    left_out = {n: why for n in ("torch.compile", "liger") if (why := missing(n, device.name))}
    if "torch.compile" not in left_out:
        torch._dynamo.reset()  # or the ninth shape of the process would not be compiled
        losses["torch.compile"] = torch.compile(eager, dynamic=False, fullgraph=True)
    if "liger" not in left_out:
        losses["liger"] = liger()
    if name == "forward":
        runs = {n: Run(torch.no_grad()(lambda f=f: [f(x.student, x.teachers, x.labels)])) for n, f in losses.items()}
    else:
        runs = {n: Run(lambda f=f: first(f, x, x.student)) for n, f in losses.items()}
        if "liger" in runs:
            runs["liger"] = overwriting(losses["liger"], x)
    if device.name == "cuda" and traffic(name, case) < LAUNCH:
        runs["graph"] = Run(device.captured(runs["ours"].call))
    return runs, left_out


def overwriting(loss: Callable[..., Tensor], x: Inputs) -> Run:
    """A run on a copy of the student's logits that is made anew before each, untimed: in training they are not needed again."""
    work = x.student.detach().clone().requires_grad_()
    return Run(lambda: first(loss, x, work), lambda: work.detach().copy_(x.student.detach()))


def fused_runs(name: str, case: Case, x: Inputs, device: Host) -> tuple[dict[str, Run], dict[str, str]]:
    labels = x.labels if name == "fused" else None
    temperature, alpha = (T, ALPHA) if name == "fused" else (1.0, 1.0)

    def gradients(loss: Tensor) -> list[Tensor]:
        return [loss.detach(), *torch.autograd.grad(loss, [x.hidden[0], x.weights[0]])]

    def ours() -> list[Tensor]:
        arguments = x.hidden[0], x.weights[0], x.hidden[1:], x.weights[1:], labels
        return gradients(fused_linear_kd(*arguments, temperature=temperature, alpha=alpha))

    def by_reference() -> list[Tensor]:
        with environment("ENGINE_KERNELS", "reference"):
            return ours()

    def materialised() -> list[Tensor]:
        student, *teachers = (h @ w.T for h, w in zip(x.hidden, x.weights, strict=True))
        return gradients(eager(student, teachers, labels, temperature, alpha))

    runs = {"ours": Run(ours), "reference": Run(by_reference), "eager": Run(materialised)}
    if why := missing("liger", device.name):
        return runs, {"liger": why}
    loss = liger_fused(name)
    runs["liger"] = Run(lambda: gradients(loss(x.hidden[0], x.weights[0], x.hidden[1], x.weights[1], labels)))
    return runs, {}
