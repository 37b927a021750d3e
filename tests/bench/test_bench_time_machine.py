"""The benchmark of the time machine: what it counts, that a way which loses a bit is never timed, and its table."""

from types import SimpleNamespace

import pytest
import torch
from graph_simulator import SimulatedCapture
from torch import nn

from bench import bench_time_machine, table
from bench.bench_time_machine import (
    DeepCopy,
    Foreach,
    Machine,
    OneBuffer,
    implementations,
    meta_steps,
    same_weights,
    validate,
)
from bench.devices import Host
from bench.kernel_table import NOT_YET
from bench.records import merged
from bench.step_cases import SIZES, Case, Setting, model
from bench.step_truth import WrongError
from engine import kernels
from engine.meta.time_machine import TimeMachine
from engine.models.network import Network

CPU = torch.device("cpu")
HOST, CUDA = SimpleNamespace(name="cpu"), SimpleNamespace(name="cuda")
SIZE = SIZES["miniature distilbert"]
passes = pytest.mark.parametrize("name", ["snapshot", "pilot"])


def module() -> nn.Module:
    torch.manual_seed(0)
    return model(SIZE, 1, student=True)


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setattr(Host, "cache", lambda self: 1024)
    found = Host()
    found.rate = 1e9
    return found


@passes
def test_every_way_comes_back_bit_for_bit(name):
    found = implementations(HOST, name, module())
    assert found.keys() == {"time machine", "one buffer", "foreach", "deepcopy"} | (
        {"time machine, rows"} if name == "pilot" else set()
    )
    assert implementations(CUDA, name, module()).keys() == {
        "time machine", "one buffer", "foreach", "deepcopy", "time machine, pinned",
    }  # fmt: skip
    for each in found.values():
        validate(name, each)


def test_each_has_weights_of_its_own():
    given = module()
    found = implementations(HOST, "pilot", given)
    found["foreach"].keep_and_move()
    for each in (given, *(other.module for n, other in found.items() if n != "foreach")):
        assert torch.equal(each.classifier.weight, module().classifier.weight)


@passes
@pytest.mark.parametrize("way", [Machine, OneBuffer, Foreach, DeepCopy])
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
            self.machine.advance(self.step, 1.01 * bench_time_machine.SCALE)

    for way in (Still, Off):
        with pytest.raises(WrongError, match="did not move along the step"):
            validate("pilot", way(module()))


def test_a_machine_that_does_not_rewind_is_never_timed(monkeypatch, device):
    monkeypatch.setattr(TimeMachine, "rewind", lambda self, name="start": None)
    monkeypatch.setattr(bench_time_machine, "interleaved", lambda *given: pytest.fail("it was timed"))
    with pytest.raises(WrongError, match="did not come back bit for bit"):
        bench_time_machine.measured("snapshot", module(), device, budget=0)


def test_rows(device):
    given = module()
    rows = {row["row"]: row for row in bench_time_machine.measured("pilot", given, device, budget=0)}
    weights = sum(p.numel() for p in given.parameters())
    flat = rows["time machine"]["bytes"] // 24  # the flat buffer has gaps between weights
    assert weights <= flat < 1.01 * weights and rows["one buffer"]["bytes"] == 24 * flat
    assert rows["foreach"]["bytes"] == rows["deepcopy"]["bytes"] == 24 * weights
    assert rows["time machine, rows"]["bytes"] <= 24 * flat
    assert all(row["seconds"] > 0 and row["part"] == "cpu pilot" for row in rows.values())


def test_rows_are_those_that_a_batch_looks_up():
    found = Machine(nn.Sequential(nn.Embedding(30_522, 2), nn.Linear(2, 2)), by_rows=True)
    (rows,) = (part.rows for part in found.step.tables)
    assert 4_000 < len(rows) < 4_500
    assert found.moved < 2 * 4_500 + 100
    validate("pilot", found)


# What the pinned store adds, simulated


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setenv("ENGINE_KERNELS", "reference")
    monkeypatch.setattr(Network, "table_rows", None)
    monkeypatch.setattr(kernels.ops.common.checks, "check_labels", lambda *_, **__: None)


SETTING = Setting(Case("metadistil", 4, 16, 1), SIZE, CPU)


def test_meta_steps_by_store(device, as_on_a_gpu):
    rows = {row["row"]: row for row in meta_steps(SETTING, device, budget=0, capture=SimulatedCapture())}
    assert rows.keys() == {"device", "device, graph", "pinned", "pinned, graph"}
    assert all(row["seconds"] > 0 and row["part"] == "cpu meta-step fp32" for row in rows.values())


def test_a_step_that_cannot_be_captured_is_said(device):
    rows = {row["row"]: row for row in meta_steps(SETTING, device, budget=0)}
    assert rows["pinned, graph"] | {"left_out": "the device is cpu", "failed": True} == rows["pinned, graph"]
    assert rows["pinned"]["seconds"] > 0


def test_stores_that_end_elsewhere_are_found_out(monkeypatch):
    same_weights(SETTING, ("device", "pinned"))
    honest = TimeMachine.rewind

    def never_for_pinned(self, name="start"):
        if self.asked == "device":
            honest(self, name)

    set_up = TimeMachine.__init__

    def remember(self, flat, store="device", *more):
        set_up(self, flat, store, *more)
        self.asked = store

    monkeypatch.setattr(TimeMachine, "__init__", remember)
    monkeypatch.setattr(TimeMachine, "rewind", never_for_pinned)
    with pytest.raises(
        WrongError, match="with the pinned store end [0-9e-]+.* from where they do with the device store"
    ):
        same_weights(SETTING, ("device", "pinned"))


# The table


def machine(device):
    versions = {"torch": "2", "python": "3"}
    return {"hardware": {"device": device, "name": f"a {device}", "threads": 2}, "versions": versions}


def row(device, name, implementation, milliseconds, **settings):
    seconds = milliseconds / 1e3
    return {
        "part": f"{device} {name}", "device": device, "pass": name, "row": implementation, "weights": 1_000_000, "copy_rate": 20e9,
        "bytes": 4_000_000 * bench_time_machine.PASSES.get(name, 0), "seconds": seconds, "lower": 0.95 * seconds,
        "upper": 1.05 * seconds,
    } | settings  # fmt: skip


def test_the_table():
    cpu = [row("cpu", "snapshot", "time machine", 2), row("cpu", "snapshot", "deepcopy", 8), row("cpu", "pilot", "time machine", 2),
           row("cpu", "pilot", "time machine, rows", 1, bytes=12_000_000)]  # fmt: skip
    results = {"kind": "time-machine", **merged({"rows": []}, cpu, {"cpu": machine("cpu")})}
    lines = table.render(results).splitlines()
    assert lines[0] == NOT_YET
    assert lines[2] == "On a CPU, 1,000,000 weights:"
    assert lines[6] == "| time machine | 2 ms | 8 | 40 % | 2 ms | 12 | 60 % |"
    assert lines[7] == "| time machine, embeddings by rows |  |  |  | 1 ms | 12 | 60 % |"
    assert lines[8] == "| `deepcopy(state_dict())`, `load_state_dict` | 8 ms | 2 | 10 % |  |  |  |"
    step = {"precision": "bf16", "models": "models", "batch": 32, "length": 128}
    gpu = [row("cuda", "pilot", "time machine, pinned", 2), row("cuda", "meta-step", "device", 100, **step),
           row("cuda", "meta-step", "pinned", 103, **step), row("cuda", "meta-step", "device, graph", 50, **step),
           row("cuda", "meta-step", "pinned, graph", 51, **step)]  # fmt: skip
    both = table.render({"kind": "time-machine", **merged(results, gpu, {"cuda": machine("cuda")})})
    assert NOT_YET not in both and both.index("On a GPU") < both.index("On a CPU")
    assert (
        "Snapshots in pinned host memory add +3.0 % to an eager step of 100 ms and +2.0 % to a CUDA graph's of 50 ms "
        "(models, 32 x 128, bf16)."
    ) in both
