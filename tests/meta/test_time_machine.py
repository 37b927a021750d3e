"""A rewound module is the same to the last bit, and so is a gradient from a graph that was kept over an excursion."""

import copy
from contextlib import nullcontext

import pytest
import torch
from fake_apex import FusedAdam
from time_machine_helpers import BUFFERS, FROZEN, Model, differing, everything, follow, ids, make, pilot, random_step
from torch import nn
from torch.func import functional_call

from engine.meta.time_machine import TimeMachine
from engine.params.flat import FlatParameters
from engine.params.optim import FlatAdamW

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
GPU = [pytest.mark.gpu, NO_GPU]
PLACES = [("cpu", "device"), ("cpu", "pinned"), *(pytest.param("cuda", s, marks=GPU) for s in ("device", "pinned"))]
everywhere = pytest.mark.parametrize(("device", "store"), PLACES)
tables = pytest.mark.parametrize("table_rows", [1, 99], ids=["rows", "dense"])  # tables by rows, or there are none


# Excursions


@everywhere
@tables
@pytest.mark.parametrize("raises", [False, True])
def test_excursion_comes_back_bit_exact(raises, table_rows, device, store):
    """Also when the body raises, and from weights that are no numbers."""
    module, flat, machine = make(table_rows, store, device)
    before = everything(module)
    for _ in range(2):  # the storage is used again
        with pytest.raises(ZeroDivisionError) if raises else nullcontext(), machine.excursion():
            for name in range(3):
                pilot(module, flat, machine, name, seed=name)
            assert differing(before, everything(module)) == before.keys() - FROZEN
            machine.advance(random_step(flat, 0, whole=True).scaled(float("nan")), 1.0)
            assert all(p.isnan().all() for p in flat.parameters.values())
            with machine.perturbed(random_step(flat, 1), torch.tensor(0.1, device=device)):
                _ = 1 / (not raises)
        assert differing(before, everything(module)) == set()


# Steps and snapshots


@everywhere
@tables
@pytest.mark.parametrize("whole", [False, True], ids=["some rows", "whole tables"])
@pytest.mark.parametrize("scale", [-0.3, "scalar"])
def test_advance_adds_to_the_trainable_weights(scale, whole, table_rows, device, store):
    """One rounding of the product and one of the sum; a GPU may fuse them. Buffers move with a pilot, not with a step."""
    module, flat, machine = make(table_rows, store, device)
    before, step = everything(module), random_step(flat, 3, whole)
    versions = [p._version for p in module.parameters()]
    factor = torch.tensor(-0.3, device=device)
    machine.advance(step, factor if scale == "scalar" else scale)
    moved = dict(flat.views(step.dense, flat.dense_names))
    moved |= {t.name: part if whole else part.dense(t.weight) for t, part in zip(flat.tables, step.tables, strict=True)}
    same = torch.equal if device == "cpu" else torch.allclose
    for name, now in everything(module).items():
        if name in moved:
            assert same(now, before[name] + factor * moved[name]), name
            still = (moved[name] == 0).all(-1) if moved[name].ndim == 2 else moved[name] == 0
            assert torch.equal(now[still], before[name][still])
        else:
            assert torch.equal(now, before[name]), name
    assert versions == [p._version for p in module.parameters()]


@everywhere
@tables
def test_a_snapshot_holds_everything(table_rows, device, store):
    """Writes by an optimizer, which reach every row and are known to autograd, are undone as well."""
    module, flat, machine = make(table_rows, store, device)
    before = everything(module)
    machine.snapshot()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    module(ids(flat)).sum().backward()
    optimizer.step()
    assert not torch.equal(module.words.weight, before["words.weight"])
    machine.rewind()
    assert differing(before, everything(module)) == BUFFERS


def test_a_name_taken_over_and_over_needs_no_more_memory():
    module, flat, machine = make()
    storage = set()
    for name in ("a", "b"):
        machine.advance(random_step(flat, 0), 0.1, name)
    for seed in range(20):
        machine.advance(random_step(flat, seed), 0.1, "b")
        storage |= {snapshot.dense.data_ptr() for snapshot in machine._stack.values()}
    assert len(storage) == 2
    before = everything(module)
    with machine.excursion():
        for seed in range(20):
            machine.advance(random_step(flat, seed), 0.1, "b")
            storage |= {snapshot.dense.data_ptr() for snapshot in machine._stack.values()}
    assert len(storage) == 4  # of before, for what the excursion comes back to, and for the latest
    assert differing(before, everything(module)) == set()


def test_stores():
    with pytest.raises(ValueError, match="store is 'host'; it must be device or pinned"):
        TimeMachine(FlatParameters(Model()), "host")


@pytest.mark.parametrize("store", [pytest.param(s, marks=GPU) for s in ("device", "pinned")])
def test_on_a_gpu_nothing_waits_and_nothing_is_overwritten_too_early(store):
    """Sizes for which a copy is still under way when the next operation is given."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4096, 4096), nn.Linear(4096, 4096)).cuda()
    flat = FlatParameters(module)
    machine, step = TimeMachine(flat, store), random_step(flat, 0)
    before = flat.weights.clone()

    def go():
        with machine.excursion():
            for name in range(3):
                machine.advance(step, 0.1, name)
            for name in (2, 1, 0):
                machine.rewind(name)

    go()  # allocates
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            go()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(flat.weights, before)


SEQUENCE = [
    ("advance", "a", 1, False), ("advance", "b", 2, True), ("snapshot", "c"), ("advance", "a", 3, False), ("rewind", "b"),
    ("advance", "a", 4, False),
    ("excursion", 0, [("advance", "a", 5, True), ("rewind", "b"), ("perturbed", 6, [("advance", "b", 7, False)], True)], False),
    ("perturbed", 8, [("perturbed", 9, [], False), ("rewind", "a")], False), ("rewind", "b"), ("rewind", "c"),
]  # fmt: skip


@everywhere
@tables
@pytest.mark.parametrize("low_precision", [False, True])
def test_a_sequence_is_as_if_everything_had_been_copied(low_precision, table_rows, device, store):
    """Rewinds over several steps and to names taken again, perturbations in excursions."""
    follow(make(table_rows, store, device, low_precision)[2], SEQUENCE)


# What depends on the weights


class Counting(torch.optim.SGD):
    """State that is no tensor, as some optimizers' step counts."""

    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["step"] = self.state[p].get("step", 0) + 1
                with torch.no_grad():
                    p.mul_(1 - 0.01 * self.state[p]["step"])


OPTIMIZERS = {
    "AdamW": lambda ps, flat: torch.optim.AdamW(ps, lr=0.05, weight_decay=0.1),
    "fused AdamW": lambda ps, flat: torch.optim.AdamW(ps, lr=0.05, fused=True),
    "FlatAdamW": lambda ps, flat: FlatAdamW(flat, lr=0.05, weight_decay=0.1),
    "FusedAdam": lambda ps, flat: FusedAdam(ps, lr=0.05),
    "capturable FusedAdam": lambda ps, flat: FusedAdam(ps, lr=0.05, capturable=True),
    "momentum": lambda ps, flat: torch.optim.SGD(ps, lr=0.05, momentum=0.9),
    "counting": lambda ps, flat: Counting(ps, lr=0.05),
}


def state_of(optimizer):
    """Copied: the state of every weight, and the groups' counts, where they count."""
    found = copy.deepcopy(optimizer.state_dict())
    return found["state"], [group.get("step") for group in found["param_groups"]]


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_optimizer_is_rewound(kind, steps):
    """Also to having no state; counts of groups stay the tensors that they were. A run with an excursion in it goes on as
    one without."""
    results = []
    for excursion in (True, False):
        module, flat, _ = make()
        optimizer = OPTIMIZERS[kind](list(flat.parameters.values()), flat)
        machine = TimeMachine(flat, optimizer=optimizer)

        def train(seed, module=module, flat=flat, optimizer=optimizer):
            torch.manual_seed(seed)
            module(ids(flat, seed)).square().mean().backward()
            flat.gradients  # noqa: B018  (takes in what autograd left)
            optimizer.step()
            flat.clear_gradients()

        for step in range(steps):
            train(step)
        before, counts = state_of(optimizer), [group.get("step") for group in optimizer.param_groups]
        if excursion:
            with pytest.raises(ZeroDivisionError), machine.excursion():
                machine.snapshot()
                train(7)
                train(8)
                raise ZeroDivisionError
            torch.testing.assert_close(state_of(optimizer), before, rtol=0, atol=0)
            assert bool(before[0]) == bool(steps)
            for group, count in zip(optimizer.param_groups, counts, strict=True):
                assert group.get("step") is count
        for step in range(steps, steps + 3):
            train(step)
        results.append(everything(module))
    assert differing(*results) == set()


@tables
@pytest.mark.parametrize("low_precision", [False, True], ids=["fp32", "bf16"])
def test_a_kept_graph_outlives_an_excursion(low_precision, table_rows):
    """What the real step takes over from the pilot: a backward after the rewind, on leaves that were written to."""
    module, flat, machine = make(table_rows, low_precision=low_precision, batch_norm=not low_precision)
    leaves = flat.leaves(low_precision)

    def forward():
        frozen = {"norm.bias": module.norm.bias.to(next(iter(leaves.values())).dtype)}
        with flat.lookups() as lookups:
            return functional_call(module, {**leaves, **frozen}, (ids(flat),)).float().square().mean(), lookups

    def backward(loss, lookups):
        vector = flat.gradients_of([loss], None, leaves, lookups, retain_graph=True)
        return [vector.dense, *(t for part in vector.tables for t in part)]

    kept = forward()
    first = backward(*kept)
    with machine.excursion():
        for name in range(2):
            machine.advance(random_step(flat, name), 0.1, name)
            inside = backward(*forward())
        flat.leaves(low_precision)  # asked for in between, as every forward does
    second = backward(*kept)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first[:1], inside[:1], strict=True))
