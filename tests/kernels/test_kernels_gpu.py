"""The distillation kernels on a GPU: against float64 on it, in a CUDA graph, and without a single wait for it."""

from itertools import product

import pytest
import torch
from kernel_helpers import near as within
from kernel_helpers import plain

pytest.importorskip("triton")

from engine.kernels import fused_linear_kd, kd_loss, meta_cotangent

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# Relative to the largest expected number. float32: sums over 131072 classes, times T^2 over a small difference of
# logarithms. bfloat16: computed in float32, rounded to 8 bits (2^-8), and again when the upstream is known.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 8.2e-3, torch.float64: 1e-11}
T, ALPHA = 2.0, 0.3
SIZES = [(4096, 2), (64, 1000), (33, 8192), (16, 32000), (8, 131072), (1, 131072)]
SETTINGS = {"temperature": T, "alpha": ALPHA}
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
some_sizes = pytest.mark.parametrize(("rows", "classes"), [(4096, 2), (64, 1000), (16, 32000), (8, 131072)])


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    """Plans that are tried here, not what an earlier run found."""
    monkeypatch.setenv("ENGINE_KERNELS", "triton")
    monkeypatch.setenv("METADISTIL_CACHE", str(tmp_path_factory.getbasetemp() / "plans"))


def inputs(rows, classes, dtype, teachers=2):
    generator = torch.Generator("cuda").manual_seed(rows + classes)
    made = [3 * torch.randn(rows, classes, device="cuda", generator=generator) for _ in range(teachers + 1)]
    labels = torch.randint(classes, (rows,), device="cuda", generator=generator)
    labels[1::3] = -100
    return [z.to(dtype).requires_grad_() for z in made], labels


def near(got, expected, dtype, what=""):
    within(got, expected, dtype, TOLERANCE[dtype], what)


class Both:
    """Inputs, and what the formula makes of them in float64: gradients and their derivatives."""

    def __init__(self, rows, classes, dtype, teachers=2, reduction="mean"):
        self.leaves, self.labels = inputs(rows, classes, dtype, teachers)
        self.settings = {"reduction": reduction, **SETTINGS}
        self.wide = [z.detach().double().requires_grad_() for z in self.leaves]
        self.cotangents = [torch.randn_like(z) for z in self.leaves]
        self.correct = plain(self.wide[0], self.wide[1:], self.labels, **self.settings)
        self.upstream = torch.rand(self.correct.shape, device="cuda")
        self.first = torch.autograd.grad(self.correct, self.wide, self.upstream.double(), create_graph=True)
        self.second = torch.autograd.grad(self.first, self.wide, [c.double() for c in self.cotangents])

    def agree(self, dtype, what=""):
        loss = kd_loss(self.leaves[0], self.leaves[1:], self.labels, **self.settings)
        near(loss.detach(), self.correct.detach(), torch.float32, f"{what} loss")
        quick = torch.autograd.grad(loss, self.leaves, self.upstream, retain_graph=True)
        first = torch.autograd.grad(loss, self.leaves, self.upstream, create_graph=True)
        second = torch.autograd.grad(first, self.leaves, self.cotangents)
        for found, wanted in ((quick, self.first), (first, self.first), (second, self.second)):
            for a, b in zip(found, wanted, strict=True):
                near(a.detach(), b.detach(), dtype, what)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@dtypes
@pytest.mark.parametrize(("rows", "classes"), SIZES)
def test_numbers(rows, classes, dtype, reduction):
    """Values, first and second derivatives and cotangents: every tuned plan and the one that is taken untried."""
    both = Both(rows, classes, dtype, reduction=reduction)
    both.agree(dtype)
    found = meta_cotangent(both.leaves[0], both.leaves[1:], both.cotangents[0], **SETTINGS)
    p, u = torch.softmax((both.wide[1] + both.wide[2]).detach() / 2 / T, -1), both.cotangents[0].double()
    for c in found:
        near(c.detach(), -ALPHA / 2 / rows * p * (u - (p * u).sum(-1, keepdim=True)), torch.float32, "cotangent")


def test_every_plan(monkeypatch):
    """All those between which a device may choose."""
    from engine.kernels.ops.common import triton_launch, tuning

    both = Both(40, 20000, torch.bfloat16, teachers=1)
    every = tuning.plans(20000, triton_launch.ON_CHIP, triton_launch.TILES)
    for plan in [*every, tuning.Plan(False, 1, 32768, 16), tuning.Plan(True, 1, 256, 4)]:
        monkeypatch.setattr(triton_launch, "plans", lambda *_, plan=plan: [plan])
        both.agree(torch.bfloat16, plan)


@pytest.mark.parametrize(("rows", "classes"), [(64, 1000), (5, 8192), (3, 50257)])
def test_masked_classes_and_bad_rows(rows, classes):
    leaves, labels = inputs(rows, classes, torch.float32)
    dead = slice(classes // 4, classes // 2)
    labels[:] = classes - 1
    with torch.no_grad():
        for z in leaves:
            z[:, dead] = -torch.inf
    finite = [z.detach().clone() for z in leaves]

    def run(logits):
        logits = [z.clone().requires_grad_() for z in logits]
        loss = kd_loss(logits[0], logits[1:], labels, reduction="none", **SETTINGS)
        first = torch.autograd.grad(loss.sum(), logits, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), logits)
        return [loss.detach(), *(g.detach() for g in first), *second]

    before = run(finite)
    assert all(x.isfinite().all() for x in before)
    assert all((x[:, dead] == 0).all() for x in before[1:])
    keep = torch.arange(rows, device="cuda") != 1
    for who, value in product(range(3), (torch.nan, torch.inf)):
        bad = [z.clone() for z in finite]
        bad[who][1, classes - 3] = value
        after = run(bad)
        assert after[0].isnan().nonzero().flatten().tolist() == [1]
        assert all(torch.equal(a[keep], b[keep]) for a, b in zip(after[:4], before[:4], strict=True))


def test_a_label_out_of_range_makes_the_loss_nan():
    leaves, labels = inputs(8, 1000, torch.float32)
    labels[0] = 1000
    rows = kd_loss(leaves[0], leaves[1:], labels, reduction="none", **SETTINGS)
    assert rows.isnan().tolist() == [True] + [False] * 7


@some_sizes
@dtypes
def test_cuda_graph(rows, classes, dtype):
    """Forward and backward captured and replayed with other numbers have the bits of eager."""
    leaves, labels = inputs(rows, classes, dtype)
    scale = torch.tensor(0.5, device="cuda")

    def step():
        loss = kd_loss(leaves[0], leaves[1:], labels, **SETTINGS)
        return [loss.detach(), *torch.autograd.grad(scale * loss, leaves)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # plans are chosen, kernels compiled
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for z in leaves:
            z.copy_(z.flip(0))
        labels.copy_(labels.roll(1))
        scale.fill_(2.0)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


@some_sizes
@dtypes
def test_nothing_waits_for_the_device(rows, classes, dtype):
    leaves, labels = inputs(rows, classes, dtype)
    weights = torch.tensor([0.25, 0.6], device="cuda")
    tangent = torch.randn_like(leaves[0])
    hidden, layer = torch.randn(rows, 16, device="cuda"), torch.randn(classes, 16, device="cuda")
    hidden.requires_grad_(), layer.requires_grad_()

    def step():
        for given in (None, [0.25, 0.6], weights):
            loss = kd_loss(leaves[0], leaves[1:], labels, weights=given, **SETTINGS)
            torch.autograd.grad(3 * loss, leaves)
            loss = kd_loss(leaves[0], leaves[1:], labels, weights=given, **SETTINGS)
            (slope,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
            torch.autograd.grad((slope * tangent).sum(), leaves[1:])
            meta_cotangent(leaves[0], leaves[1:], tangent, weights=given, **SETTINGS)
        fused_linear_kd(hidden, layer, [hidden.detach()], [layer.detach()], labels, **SETTINGS).backward()

    step()  # plans are chosen, kernels compiled
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_a_plan_of_the_file_has_the_same_bits():
    """What one process tuned, the next one takes: a resumed run goes on with the same numbers."""
    from engine.kernels.ops.common import tuning

    leaves, labels = inputs(16, 32000, torch.bfloat16)

    def step():
        loss = kd_loss(leaves[0], leaves[1:], labels, **SETTINGS)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    first = step()
    tuning._known.cache_clear()
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(step(), first, strict=True))


@dtypes
def test_fused(dtype, monkeypatch):
    """Three chunks against logits, whole in float64."""
    from engine.kernels.ops.fused_linear_kd import op as module

    generator = torch.Generator("cuda").manual_seed(0)
    # whole numbers: the logits have no rounding
    hidden = torch.randint(-2, 3, (96, 24), device="cuda", generator=generator).to(dtype).requires_grad_()
    layer = (torch.randint(-1, 2, (32000, 24), device="cuda", generator=generator) / 2).to(dtype).requires_grad_()
    other = torch.randint(-1, 2, (32000, 24), device="cuda", generator=generator).to(dtype)
    labels = torch.randint(32000, (96,), device="cuda", generator=generator)
    monkeypatch.setitem(module.CHUNK, "cuda", 40 * 32000)
    loss = fused_linear_kd(hidden, layer, [hidden.detach()], [other], labels, **SETTINGS)
    found = torch.autograd.grad(loss, [hidden, layer])
    wide = [x.detach().double().requires_grad_() for x in (hidden, layer)]
    correct = plain(wide[0] @ wide[1].T, [wide[0].detach() @ other.double().T], labels, **SETTINGS)
    near(loss.detach(), correct.detach(), torch.float32, "loss")
    # the gradient at the logits is rounded, and so is its product
    monkeypatch.setitem(TOLERANCE, torch.float32, 1e-3)  # and a product of float32 may be one of TF32
    for a, b in zip(found, torch.autograd.grad(correct, wide), strict=True):
        near(a, b, dtype, "gradient")
