"""The benchmark of the time machine: what it counts, and that a way which loses a bit is never timed."""

from types import SimpleNamespace

import pytest
import torch
from graph_simulator import SimulatedCapture
from torch import nn

from bench import bench_time_machine as bench
from bench.bench_time_machine import Machine, validate
from bench.step_cases import SIZES, Case, Setting, model
from bench.step_truth import WrongError
from engine.meta.time_machine import TimeMachine

CPU = torch.device("cpu")
SIZE = SIZES["miniature distilbert"]
SETTING = Setting(Case("metadistil", 4, 16, 1), SIZE, CPU)
passes = pytest.mark.parametrize("name", ["snapshot", "pilot"])


def module() -> nn.Module:
    torch.manual_seed(0)
    return model(SIZE, 1, student=True)


@passes
@pytest.mark.parametrize("cuda", [False, True])
def test_every_way_comes_back_bit_for_bit(monkeypatch, name, cuda):
    monkeypatch.setattr(bench, "CUDA", cuda)
    (_, rows) = bench.groups(small=True, full=False)[name]
    given = module()
    found = bench.implementations(SimpleNamespace(name="cuda" if cuda else "cpu"), name, given)
    more = {"time machine, pinned"} if cuda else {"time machine, rows"} if name == "pilot" else set()
    assert set(rows) == found.keys() == {*bench.WAYS, *more}
    for each in found.values():
        validate(name, each)
    found["foreach"].keep_and_move()  # each has weights of its own
    for each in (given, *(other.module for n, other in found.items() if n != "foreach")):
        assert torch.equal(each.classifier.weight, module().classifier.weight)


@passes
@pytest.mark.parametrize("way", [Machine, bench.OneBuffer, bench.Foreach, bench.DeepCopy])
def test_a_way_that_loses_a_bit_is_found_out(way, name):
    class Lossy(way):
        def back(self):
            super().back()
            bits = self.module.classifier.bias.data.view(torch.int32)
            bits[0] ^= 1

    with pytest.raises(WrongError, match=f"Lossy, {name}: classifier.bias did not come back"):
        validate(name, Lossy(module()))


def test_a_way_that_moves_nothing_or_elsewhere_is_found_out():
    class Still(Machine):
        def keep_and_move(self):
            self.keep()

    class Off(Machine):
        def keep_and_move(self):
            self.machine.advance(self.step, 1.01 * bench.SCALE)

    for way in (Still, Off):
        with pytest.raises(WrongError, match="did not move along the step"):
            validate("pilot", way(module()))


def test_a_machine_that_does_not_rewind_is_never_timed(monkeypatch, device):
    monkeypatch.setattr(TimeMachine, "rewind", lambda self, name="start": None)
    monkeypatch.setattr(bench, "interleaved", lambda *given: pytest.fail("it was timed"))
    with pytest.raises(WrongError, match="did not come back bit for bit"):
        bench.measured(("snapshot", SIZE), device, budget=0)


def test_bytes_of_each_way(device):
    group = bench.measured(("pilot", SIZE), device, budget=None)
    weights = sum(p.numel() for p in module().parameters())
    moved = {name: info["bytes"] for name, info in group.info.items()}
    flat = moved["time machine"] // 24  # the flat buffer has gaps between weights
    assert weights <= flat < 1.01 * weights and moved["one buffer"] == 24 * flat
    assert moved["foreach"] == moved["deepcopy"] == 24 * weights
    assert moved["time machine, rows"] <= 24 * flat


def test_rows_are_those_that_a_batch_looks_up():
    found = Machine(nn.Sequential(nn.Embedding(30_522, 2), nn.Linear(2, 2)), by_rows=True)
    (rows,) = (part.rows for part in found.step.tables)
    assert 4_000 < len(rows) < 4_500
    assert found.moved < 2 * 4_500 + 100
    validate("pilot", found)


# What the pinned store adds


def test_meta_steps_by_store(device, as_on_a_gpu):
    group = bench.meta_steps(SETTING, device, budget=None, capture=SimulatedCapture())
    assert list(group.info) == ["device", "device, graph", "pinned", "pinned, graph"] and not group.failed


def test_a_step_that_cannot_be_captured_is_said(device):
    group = bench.meta_steps(SETTING, device, budget=None)
    assert group.failed == dict.fromkeys(("device, graph", "pinned, graph"), "the device is cpu")
    assert list(group.info) == ["device", "pinned"]


def test_stores_that_end_elsewhere_are_found_out(monkeypatch):
    rewind, set_up = TimeMachine.rewind, TimeMachine.__init__

    def never_for_pinned(self, name="start"):
        if self.asked == "device":
            rewind(self, name)

    def remember(self, flat, store="device", *more):
        set_up(self, flat, store, *more)
        self.asked = store

    monkeypatch.setattr(TimeMachine, "__init__", remember)
    monkeypatch.setattr(TimeMachine, "rewind", never_for_pinned)
    with pytest.raises(WrongError, match="with the pinned store end .* from where they do with the device store"):
        bench.same_weights(SETTING, ("device", "pinned"))
