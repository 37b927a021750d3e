"""The distillation kernels on a GPU: against float64 on it, in a CUDA graph, and without a single wait for it."""

from itertools import product

import pytest
import torch
from kernel_helpers import BF16, F32, Case, Problem, near, plain

pytest.importorskip("triton")

from engine.kernels import fused_linear_kd, kd_loss, meta_cotangent

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SIZES = [(4096, 2), (64, 1000), (33, 8192), (16, 32000), (8, 131072), (1, 131072)]
SETTINGS = {"temperature": 2.0, "alpha": 0.3}
dtypes = pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
some_sizes = pytest.mark.parametrize(("rows", "classes"), [(4096, 2), (64, 1000), (16, 32000), (8, 131072)])


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    """Plans that are tried here, not what an earlier run found."""
    monkeypatch.setenv("ENGINE_KERNELS", "triton")
    monkeypatch.setenv("METADISTIL_CACHE", str(tmp_path_factory.getbasetemp() / "plans"))


def problem(rows, classes, dtype=F32, **settings) -> Problem:
    with torch.device("cuda"):  # where the tensors are made; the kernels have to find it by themselves
        return Problem(Case(C=classes, leading=(rows,), dtypes=(dtype,), **settings))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@dtypes
@pytest.mark.parametrize(("rows", "classes"), SIZES)
def test_numbers(rows, classes, dtype, reduction):
    """By every tuned plan and the one that is taken untried."""
    problem(rows, classes, dtype, reduction=reduction).agree()


def test_every_plan(monkeypatch):
    """All those between which a device may choose."""
    from engine.kernels.ops.common import triton_launch, tuning

    one, every = problem(40, 20000, BF16, K=1), tuning.plans(20000, triton_launch.ON_CHIP, triton_launch.TILES)
    for plan in [*every, tuning.Plan(False, 1, 32768, 16), tuning.Plan(True, 1, 256, 4)]:
        monkeypatch.setattr(triton_launch, "plans", lambda *_, plan=plan: [plan])
        one.agree()


@pytest.mark.parametrize(("rows", "classes"), [(64, 1000), (5, 8192), (3, 50257)])
def test_masked_classes_and_bad_rows(rows, classes):
    one, dead = problem(rows, classes, labels="all", reduction="none"), slice(classes // 4, classes // 2)
    one.labels[:] = classes - 1
    given = [z.detach() for z in one.logits]
    for z in given:
        z[:, dead] = -torch.inf
    before, keep = one.found(), torch.arange(rows, device="cuda") != 1
    assert all(x.isfinite().all() and (x.dim() == 1 or (x[:, dead] == 0).all()) for x in before.values())
    for z, value in product(given, (torch.nan, torch.inf)):
        right = z[1, classes - 3].clone()
        z[1, classes - 3] = value
        after = one.found()
        z[1, classes - 3] = right
        assert after["loss 0"].isnan().tolist() == [row == 1 for row in range(rows)]
        assert all(torch.equal(after[n][keep], before[n][keep]) for n in before if n.startswith(("loss", "first")))


def test_a_label_out_of_range_makes_the_loss_nan():
    one = problem(8, 1000, labels="all", reduction="none")
    one.labels[0] = 1000
    assert one.loss().isnan().tolist() == [True] + [False] * 7


@some_sizes
@dtypes
def test_cuda_graph(rows, classes, dtype):
    """Forward and backward captured and replayed with other numbers have the bits of eager."""
    one, scale = problem(rows, classes, dtype), torch.tensor(0.5, device="cuda")

    def step():
        loss = one.loss()
        return [loss.detach(), *torch.autograd.grad(scale * loss, one.logits)]

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
        for z in one.logits:
            z.copy_(z.flip(0))
        one.labels.copy_(one.labels.roll(1))
        scale.fill_(2.0)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


@some_sizes
@dtypes
def test_nothing_waits_for_the_device(rows, classes, dtype):
    one, weights = problem(rows, classes, dtype), torch.tensor([0.25, 0.6], device="cuda")
    leaves, labels, tangent = one.logits, one.labels, one.tangent
    hidden, layer = (torch.randn(n, 16, device="cuda", requires_grad=True) for n in (rows, classes))

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

    one = problem(16, 32000, BF16)
    first = one.found()
    tuning._known.cache_clear()
    for _ in range(2):
        assert all(torch.equal(a, first[name]) for name, a in one.found().items())


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
    near(loss.detach(), correct.detach(), F32, 1e-4, "loss")
    # the gradient at the logits is rounded, and so is its product, which of float32 may be one of TF32
    for a, b in zip(found, torch.autograd.grad(correct, wide), strict=True):
        near(a, b, dtype, 1e-3 if dtype == F32 else 8.2e-3, "gradient")
