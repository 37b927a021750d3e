"""What holds memory (engine.profiling.ledger), on real tensors and on fake ones."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.profiling.ledger import CATEGORIES, Ledger
from engine.profiling.pretend import pretending
from engine.sections import section

KIB = 256  # numbers


@pytest.fixture(params=["real", "fake"])
def world(request):
    with nullcontext() if request.param == "real" else FakeTensorMode():
        yield


def held(ledger: Ledger, device: str = "cpu") -> dict[str, int]:
    """Only categories that hold something, in KiB."""
    found = ledger.at_peak(device)
    assert tuple(found) == CATEGORIES
    assert sum(found.values()) == ledger.peak(device)
    return {name: size // 1024 for name, size in found.items() if size}


def test_a_storage_counts_once_and_until_it_is_freed(world):
    ledger = Ledger()
    with ledger.following():
        a = torch.zeros(4, KIB)
        assert ledger.live("cpu") == 4096
        row, same = a[1], a.view(-1)
        same.add_(1)
        assert ledger.live("cpu") == 4096
        b = a + 1
        assert ledger.live("cpu") == 8192
        del a, same
        assert ledger.live("cpu") == 8192, "a view keeps its storage"
        del row
        assert ledger.live("cpu") == 4096
        del b
    assert (ledger.live("cpu"), ledger.peak("cpu")) == (0, 8192)


def test_sizes_are_those_of_blocks_also_of_a_resized_storage():
    ledger = Ledger()
    with ledger.following():
        a, b, nothing = torch.zeros(1), torch.zeros(17), torch.empty(0)
        assert ledger.live("cpu") == 64 + 128
        a.resize_(3 * KIB)
        assert ledger.live("cpu") == 3072 + 128
        del a, b, nothing
    ledger = Ledger()
    with pretending(torch.device("cuda")), ledger.following():
        c = torch.zeros(129, device="cuda")
        assert (ledger.live("cuda"), ledger.live("cpu")) == (1024, 0)
        del c


def test_what_a_graph_holds_is_freed_with_it(world):
    ledger = Ledger()
    with ledger.following():
        w = torch.zeros(KIB, requires_grad=True)
        y = (w.exp() * 2).sum()  # exp's output is kept, the product is not
        assert ledger.live("cpu") == 2048 + 64
        y.backward()
        del y
        assert ledger.live("cpu") == 2048, "the weight and its gradient"


def test_sections_have_their_own_peaks(world):
    ledger = Ledger()
    with ledger.following():
        a = torch.zeros(KIB)
        with section("pilot"):
            b = torch.zeros(4 * KIB)
            with section("optimizer"):
                c = torch.zeros(KIB)
                del c
            del b
        with section("quiz"):
            pass
        del a
    assert ledger.by_section("cpu") == {"other": 1024, "pilot": 6144 - 1024, "optimizer": 6144, "quiz": 1024}
    assert (ledger.peak("cpu"), ledger.peak_section("cpu")) == (6144, "optimizer")


def test_known_storages_have_their_category_from_before_and_from_later(world):
    weights, made = torch.zeros(2, KIB), []
    ledger = Ledger(lambda: [("weights", weights[0]), *(("snapshots", t) for t in made)])
    with torch.no_grad(), ledger.following():
        with section("rewind"):
            made.append(torch.zeros(3 * KIB))
        x = torch.zeros(KIB)
        del x
        made.clear()
    assert held(ledger) == {"weights": 2, "snapshots": 3, "other": 1}


class TwoLayers(nn.Module):
    """Width 16 on 64 rows: activations of 4 KiB, weights of 1."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).tanh()).tanh()


def followed(work, **settings) -> Ledger:
    model, x = TwoLayers(), torch.ones(64, 16)
    ledger = Ledger(
        lambda: [*(("weights", p) for p in model.parameters()), ("inputs", x)], [p.shape for p in model.parameters()]
    )
    with ledger.following():
        work(model, x)
    return ledger


def backward(model, x):
    # forward: both tanh are kept, their inputs are gone; backward: the incoming gradient, the next one and a weight's
    y = model(x)
    torch.autograd.grad(y.sum(), list(model.parameters()))


@torch.no_grad()
def forward(model, x):
    model(x)


def kept_gradients(model, x):
    found = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    big = torch.zeros(64 * KIB)  # the peak
    del found, big


def tangents(model, x):
    with section("JVP"), torch.no_grad():
        tangent = torch.zeros(8 * KIB)
        del tangent


def twice(model, x):
    first = torch.autograd.grad(model(x).square().sum(), list(model.parameters()), create_graph=True)
    big = torch.zeros(64 * KIB)
    del big
    torch.autograd.grad(first[0].sum(), list(model.parameters()))


class Recomputed(torch.autograd.Function):
    """Its forward records no graph, its backward runs it again."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return (x @ w).tanh()

    @staticmethod
    def backward(ctx, dy):
        with torch.enable_grad():
            x, w = (t.detach().requires_grad_() for t in ctx.saved_tensors)
            y = (x @ w).tanh()
        return torch.autograd.grad(y, (x, w), dy)


def computed_again(model, x):
    y = Recomputed.apply(x, model.one.weight)
    torch.autograd.grad(y.sum(), [model.one.weight])


def kept_for_a_backward(model, x):
    y = Recomputed.apply(Recomputed.apply(x, model.one.weight), model.two.weight).sum()
    with torch.no_grad():
        big = torch.zeros(64 * KIB)  # the peak
    del big
    torch.autograd.grad(y, list(model.parameters()))


@pytest.mark.parametrize(("work", "expected"), [
    (backward, {"gradients": 1, "activations": 8, "other": 8}), (forward, {"other": 8}),
    (kept_gradients, {"gradients": 2, "activations": 64}), (tangents, {"second order": 8}),
    (twice, {"activations": 72, "second order": 14}),  # the graph of the backward outlives it
    (computed_again, {"gradients": 1, "activations": 4, "other": 12}),  # the tanh that ran again; outputs belong to no backward
    (kept_for_a_backward, {"activations": 4, "other": 64}),
])  # fmt: skip
def test_what_a_storage_is_for(world, work, expected):
    assert held(followed(work)) == {"weights": 2, "inputs": 4} | expected


def test_the_timeline_is_bounded_and_keeps_the_peak(world):
    ledger = Ledger(timeline=16)
    with ledger.following():
        for i in range(200):
            with section("pilot"):
                a = torch.zeros(8 * KIB if i == 117 else KIB)
                del a
    points = ledger.timeline("cpu")
    assert 8 <= len(points) <= 16
    assert max(p.bytes for p in points) == ledger.peak("cpu") == 8192
    assert [p.event for p in points] == sorted(p.event for p in points)
    assert {p.section for p in points} == {"pilot"}


def test_the_same_twice_and_real_as_fake():
    found = []
    for mode in (nullcontext(), nullcontext(), FakeTensorMode()):
        with mode:
            ledger = followed(twice)
        found.append((ledger.at_peak("cpu"), ledger.timeline("cpu")))
    assert found[0] == found[1] == found[2]


def test_nobody_listens_behind_it():
    ledger = Ledger()
    with pytest.raises(ZeroDivisionError), ledger.following(), section("pilot"):
        _ = 1 / 0
    with section("quiz"):
        _kept = torch.zeros(KIB)
    assert ledger.peak("cpu") == 0 and "quiz" not in ledger.by_section("cpu")
