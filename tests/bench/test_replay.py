"""Rows that were timed in turns reach pytest-benchmark as they were recorded; devices time, count and flush as they say."""

import json
import sys
from statistics import median
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest
import torch
from pytest_benchmark.cli import main as compare
from torch.nn import functional as F

from bench import conftest, devices
from bench.devices import Cuda
from bench.measure import flops, growth
from bench.replay import Run, interleaved

pytest_plugins = ["pytester"]

ROUNDS = {"ours": [0.1, 0.3, 0.7, 1e-7], "eager, plain": [2.0, 1 / 3, 5.0]}
DEMO = f"""
from bench.replay import Group

BUDGET, ROUNDS, MEASURED = 2.0, {ROUNDS!r}, []


def groups(small, full):
    return {{name: (name, [*ROUNDS, "liger", "graph"]) for name in ("one", "two", "wrong", "late")[: 4 if full else 1]}}


def measured(given, device, budget):
    print(f"measured {{given}} on a {{device.name}} within {{budget}}")
    assert given not in MEASURED, "a group is measured once"
    MEASURED.append(given)
    if given == "wrong":
        raise AssertionError("it computes something else")
    info = {{name: {{"device": "cpu", "peak": 7}} for name in ROUNDS}}
    return Group(info, ROUNDS if budget is not None else {{}}, {{"liger": "it needs CUDA"}}, {{"graph": "replay 1 is off"}})


def test_demo(play):
    play()
"""


CONFTEST = """
from bench.conftest import *  # noqa: F403

def pytest_runtest_setup(item):
    if "late" in item.name:
        item.config.bench_started -= 1000
"""


@pytest.fixture
def bench(pytester):
    """Runs groups of two rows, one that is left out and one that failed; returns the result and the JSON."""
    pytester.makepyfile(bench_demo=DEMO)
    pytester.makeconftest(CONFTEST)

    def run(*arguments):
        result = pytester.runpytest_inprocess("bench_demo.py", "-rA", "--benchmark-json=x.json", *arguments)
        file = pytester.path / "x.json"
        return result, json.loads(file.read_text()) if file.exists() and file.stat().st_size else None

    return run


def test_medians_are_those_of_the_recorded_rounds(bench, pytester, monkeypatch, capsys):
    result, found = bench("--benchmark-only", "--full", "--seconds", "100")
    # two groups; one that is wrong and never timed; one that no time was left for
    result.assert_outcomes(passed=4, skipped=2 + 4, failed=2, errors=4)
    result.stdout.fnmatch_lines(["*AssertionError: it computes something else", "*replay 1 is off*",
                                 "*SKIPPED*it needs CUDA*", "*SKIPPED*no time is left*"])  # fmt: skip
    assert result.stdout.str().count("measured wrong on a") == 1
    assert found["machine_info"].keys() == {"hardware", "versions"} and "small" not in found
    rows = {row["param"]: row for row in found["benchmarks"]}
    assert rows.keys() == {f"{group}-{row}" for group in ("one", "two") for row in ("ours", "eager-plain")}
    for row in rows.values():
        name = row["extra_info"]["row"]
        assert row["stats"]["data"] == ROUNDS[name] and row["stats"]["median"] == median(ROUNDS[name])
        assert row["group"] == f"demo {row['params']['group']}" and row["extra_info"]["peak"] == 7
        assert row["extra_info"]["left_out"] == {"liger": "it needs CUDA", "graph": "replay 1 is off"}
    assert rows["one-ours"]["params"] == {"group": "one", "row": "ours"}
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["pytest-benchmark", "compare", str(pytester.path / "x.json")])
    monkeypatch.chdir(pytester.mkdir("elsewhere"))  # it would import the conftest.py of where it is
    compare()
    printed = capsys.readouterr().out
    assert "benchmark 'demo one': 2 tests" in printed and "test_demo[one-ours]" in printed


def test_what_is_only_checked_and_what_is_small(bench):
    result, found = bench("--benchmark-disable")
    result.stdout.fnmatch_lines(["measured one on a * within None"])
    result.assert_outcomes(passed=2, skipped=1, failed=1)
    assert found is None
    small, output = SimpleNamespace(getoption=lambda name: name == "--small"), {}
    conftest.pytest_benchmark_update_json(small, output)
    assert output == {"small": True}  # which nothing keeps


def test_rounds_go_in_turns_and_flush_before_each(device, monkeypatch):
    done = []
    monkeypatch.setattr(device, "flush", lambda: done.append("flush"))
    runs = {name: Run(lambda name=name: done.append(name), lambda: done.append("before")) for name in "ab"}
    found = interleaved(device, runs, budget=0)
    one = ["before", "flush", "a", "before", "flush", "b"]
    assert done == ["before", "a", "before", "b"] + (one + one[3:] + one[:3]) * 2 + one
    assert [len(rounds) for rounds in found.values()] == [5, 5] and all(s > 0 for s in found["a"])
    assert interleaved(device, runs, budget=None) == {}


def test_the_cuda_device_calls_what_torch_has(monkeypatch):
    """Signatures of torch.cuda, without a GPU."""
    for name in ("memory_allocated", "max_memory_allocated", "reset_peak_memory_stats", "synchronize", "stream",
                 "current_stream", "graph", "Stream", "CUDAGraph", "get_device_properties", "empty_cache",
                 "memory_reserved"):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, create_autospec(getattr(torch.cuda, name)))
    event = create_autospec(torch.cuda.Event)
    event.return_value.elapsed_time.return_value = 3.0
    monkeypatch.setattr(torch.cuda, "Event", event)
    torch.cuda.memory_allocated.return_value, torch.cuda.max_memory_allocated.return_value = 100, 350
    torch.cuda.get_device_properties.return_value = SimpleNamespace(L2_cache_size=1024)
    monkeypatch.setattr(devices.torch, "zeros", lambda *size, **settings: None)
    found = Cuda()
    assert found.cache() == 2048
    assert found.seconds(lambda: None, repeat=3) == pytest.approx(1e-3)
    assert found.peak(lambda: None) == 250
    assert found.captured(lambda: 7)() == 7
    torch.cuda.memory_reserved.return_value = 500
    assert found.reserved() == 500 and torch.cuda.empty_cache.called


def test_memory_and_operations(device):
    x = torch.ones(1000)
    assert device.peak(lambda: x.exp().sqrt()) == 8000
    assert device.peak(lambda: x.sqrt_()) == 0
    assert 0.9 * 2**26 < growth(lambda: torch.ones(2**24)) < 2**27
    q, k, v = (torch.randn(2, 3, 80, 16, requires_grad=True) for _ in range(3))
    attention = 4 * 2 * 3 * 80 * 80 * 16  # two products
    assert flops(lambda: F.scaled_dot_product_attention(q.detach(), k.detach(), v.detach())) == attention
    # backward: the scores again, then four products
    assert flops(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward()) == attention + attention // 2 * 5
