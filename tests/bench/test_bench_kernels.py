"""The benchmark of the kernels: what it counts, that a wrong kernel is never timed, and the table of its results."""

from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest
import torch

from bench import bench_kernels, devices, kernel_cases, table
from bench.devices import Cuda, Host, Run, interleaved
from bench.kernel_cases import FUSED, LOGITS, Case, Inputs, fused_runs, logits_runs, traffic
from bench.kernel_table import NOT_YET, duration
from bench.kernel_truth import WrongError, validate
from bench.records import merged

CPU = torch.device("cpu")


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setattr(Host, "cache", lambda self: 1024)
    found = Host()
    found.rate = 1e9
    return found


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Nothing is compiled."""
    left_out = {"torch.compile": "this is a test", "liger": "this is a test"}
    monkeypatch.setattr(kernel_cases, "missing", lambda implementation, device: left_out[implementation])


def run_of(name: str, case: Case, x: Inputs, device: Host) -> dict[str, Run]:
    return (fused_runs if name in FUSED else logits_runs)(name, case, x, device)[0]


# What is counted


def test_traffic_is_each_input_once_and_each_gradient_once():
    case = Case(classes=10, rows=4, dtype="bf16", teachers=2)
    logits, labels = 10 * 4 * 2, 4 * 8
    assert traffic("forward", case) == 3 * logits + labels
    assert traffic("backward", case) == 4 * logits + labels
    # student, teachers, u; the student's gradient, then three more
    assert traffic("double", case) == 8 * logits + labels
    assert traffic("cotangent", case) == 3 * logits + 2 * (2 * logits)  # written in float32, and no labels
    fused = Case(classes=10, rows=4, dtype="fp32", hidden=3)
    weight, hidden = 10 * 3 * 4, 4 * 3 * 4
    assert traffic("fused", fused) == 3 * (weight + hidden) + labels
    assert traffic("fused_kl", fused) == 3 * (weight + hidden)


def test_traffic_is_that_of_inputs_and_gradients():
    """Counted apart from the tensors that a run is given and returns."""
    for name in (*LOGITS, *FUSED):
        case = Case(7, 5, "fp32", 1 if name in FUSED else 2, hidden=3 * (name in FUSED))
        x = Inputs(name, case, CPU)
        results = run_of(name, case, x, SimpleNamespace(name="cpu"))["ours"].call()
        found = bench_kernels.size(x.tensors(name)) + bench_kernels.size([t for t in results if t.dim()])
        assert traffic(name, case) == found, name


def test_peak_on_a_cpu_is_exact(device):
    x = torch.ones(1000)
    assert device.peak(lambda: x.exp().sqrt()) == 8000
    assert device.peak(lambda: x.sqrt_()) == 0


def test_rounds_go_in_turns_and_flush_before_each(device, monkeypatch):
    done = []
    monkeypatch.setattr(device, "flush", lambda: done.append("flush"))
    runs = {name: Run(lambda name=name: done.append(name), lambda: done.append("before")) for name in "ab"}
    found = interleaved(device, runs, budget=0)
    one = ["before", "flush", "a", "before", "flush", "b"]
    assert done == ["before", "a", "before", "b"] + (one + one[3:] + one[:3]) * 2 + one
    assert found["a"]["rounds"] == 5
    assert (
        found["a"]["fastest"]
        <= found["a"]["lower"]
        <= found["a"]["seconds"]
        <= found["a"]["upper"]
        <= found["a"]["slowest"]
    )


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


def test_rates_are_measured_once(device, monkeypatch):
    asked = []
    monkeypatch.setattr(Host, "product_rate", lambda self, *sizes: asked.append(sizes) or 5.0)
    assert [device.dense_rate(d) for d in (torch.float32, torch.bfloat16, torch.float32)] == [5.0] * 3
    assert asked == [(2048, 2048, 2048, torch.float32), (2048, 2048, 2048, torch.bfloat16)]
    monkeypatch.setattr(Host, "copy_rate", lambda self: asked.append("copy") or 7.0)
    other = Host()
    assert other.rate == other.rate == 7.0 and asked[2:] == ["copy"]


# A wrong kernel is not timed


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [*LOGITS, *FUSED])
def test_every_implementation_computes_the_function(name, dtype):
    case = Case(7, 5, dtype, 1 if name in FUSED else 2, hidden=6 * (name in FUSED))
    x = Inputs(name, case, CPU)
    runs = run_of(name, case, x, SimpleNamespace(name="cpu"))
    found = validate(name, case, x, {n: run.call() for n, run in runs.items()})
    assert found.keys() == runs.keys() >= {"ours", "eager"}


def wrong(results: list[torch.Tensor], how: str) -> list[torch.Tensor]:
    results = [t.clone() for t in results]
    if how == "scaled":
        return [1.01 * t for t in results]
    if how == "one number":
        results[-1].view(-1)[3] += 0.02 * results[-1].abs().max()
    elif how == "NaN":
        results[-1].view(-1)[3] = torch.nan
    elif how == "loss":
        results[0] *= 1.01
    return results


@pytest.mark.parametrize("how", ["scaled", "one number", "NaN", "loss"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_wrong_result_raises(how, dtype):
    case = Case(7, 5, dtype)
    x = Inputs("backward", case, CPU)
    right = run_of("backward", case, x, SimpleNamespace(name="cpu"))["eager"].call()
    validate("backward", case, x, {"ours": right})
    with pytest.raises(WrongError, match="ours, backward 5x7"):
        validate("backward", case, x, {"ours": wrong(right, how)})


@pytest.mark.parametrize("name", ["forward", "backward", "double"])
def test_a_kernel_that_is_a_hundredth_off_is_never_timed(monkeypatch, device, name):
    honest = kernel_cases.ours
    monkeypatch.setattr(kernel_cases, "ours", lambda *arguments: 1.01 * honest(*arguments))
    monkeypatch.setattr(bench_kernels, "interleaved", lambda *arguments: pytest.fail("it was timed"))
    with pytest.raises(WrongError):
        bench_kernels.measured(name, Case(7, 5, "bf16"), device, budget=0)


def test_rows(device):
    rows = bench_kernels.measured("backward", Case(1000, 100, "fp32"), device, budget=0)
    by_name = {row["row"]: row for row in rows}
    assert by_name["liger"]["left_out"] == by_name["torch.compile"]["left_out"] == "this is a test"
    for name in ("ours", "reference", "eager"):
        row = by_name[name]
        assert row["part"] == "cpu backward 100x1000-fp32-K1"
        assert row["inputs"] == 2 * 400_000 + 800
        assert row["outputs"] == 400_004
        assert row["peak"] >= row["outputs"]
        assert row["seconds"] > 0
    rendered = table.render({"kind": "kernels", **merged({"rows": []}, rows, {"cpu": machine("cpu")})})
    assert "| forward and backward | 100 x 1,000 | fp32 | 1 |" in rendered


# The table


def machine(device: str, name: str = "a processor") -> dict:
    versions = {"torch": "2", "python": "3", "triton": "4", "liger-kernel": "5", "cuda": "13.0", "driver": "580"}
    return {"hardware": {"device": device, "name": name, "threads": 2}, "versions": versions}


def row(device: str, implementation: str, milliseconds: float, **settings) -> dict:
    seconds = milliseconds / 1e3
    return {
        "part": f"{device} backward", "device": device, "backend": "cpp", "pass": "backward", "classes": 1000, "rows": 4096,
        "hidden": 0, "dtype": "fp32", "teachers": 1, "bytes": 48_000_000, "copy_rate": 48e9, "row": implementation,
        "seconds": seconds, "lower": 0.9 * seconds, "upper": 1.1 * seconds, "fastest": seconds, "slowest": seconds,
        "rounds": 5, "error": 1e-7, "inputs": 32_000_000, "outputs": 16_000_000, "peak": 16_000_000,
    } | settings  # fmt: skip


CPU_ROWS = [
    row("cpu", "ours", 2), row("cpu", "eager", 9, peak=64_000_000), row("cpu", "torch.compile", 40),
    {k: v for k, v in row("cpu", "liger", 1, left_out="its kernels need CUDA").items() if k not in ("seconds", "peak")},
]  # fmt: skip


def test_a_table_without_gpu_rows_says_so():
    rendered = table.render({"kind": "kernels", **merged({"rows": []}, CPU_ROWS, {"cpu": machine("cpu")})})
    lines = rendered.splitlines()
    assert lines[0] == NOT_YET
    assert lines[2] == "On a CPU, `cpp` kernels:"
    assert (
        lines[6] == "| forward and backward | 4,096 x 1,000 | fp32 | 1 | 2 ms | 50 % | 4.5 x | 20 x |  | 1.00 | 2.00 |"
    )
    assert "Liger is left out: its kernels need CUDA." in rendered
    assert "quartiles lie 20 % of the median apart (20 % at most)" in rendered
    assert rendered.endswith("a processor, 2 threads, torch 2, Python 3.")


def test_devices_stand_side_by_side_and_keep_their_machines():
    launch = {"pass": "forward", "part": "cuda forward", "bytes": 800, "backend": "triton", "classes": 2, "rows": 32}
    gpu = [
        row("cuda", "ours", 0.02, **launch), row("cuda", "eager", 0.2, **launch), row("cuda", "graph", 0.004, **launch),
        row("cuda", "liger", 0.1, **launch), row("cuda", "ours", 3, operations=2e9, product_rate=1e12, hidden=64,
                                                 part="cuda fused", **{"pass": "fused"}),
        row("cuda", "eager", 6, part="cuda fused", **{"pass": "fused"}),
    ]  # fmt: skip
    first = merged({"rows": []}, CPU_ROWS, {"cpu": machine("cpu")})
    both = merged(first, gpu, {"cuda": machine("cuda", "a GPU")})
    assert [m["hardware"]["name"] for m in both["machines"]] == ["a processor", "a GPU"]
    rendered = table.render({"kind": "kernels", **both})
    assert NOT_YET not in rendered
    assert "| forward | 32 x 2 | fp32 | 1 | 20 µs (4 µs as a CUDA graph) |  | 10 x |  | 5.0 x |  |  |" in rendered
    assert "| last layers and loss | 4,096 x 1,000, hidden 64 | fp32 | 1 | 3 ms | 67 % (products) | 2.0 x |" in rendered
    assert "a GPU, torch 2, triton 4, liger-kernel 5, CUDA 13.0, driver 580, Python 3." in rendered
    assert rendered.index("On a GPU") < rendered.index("On a CPU")


def test_a_part_that_is_measured_again_replaces_its_rows_alone():
    old = {"hardware": {"name": "old"}, "versions": {}, "rows": [{"part": "a", "n": 1}, {"part": "b", "n": 2}]}
    new = {"hardware": {"name": "new"}, "versions": {}}
    once = merged(old, [{"part": "b", "n": 3}], {"cpu": new})
    assert [(r["part"], r["n"], once["machines"][r["machine"]]["hardware"]["name"]) for r in once["rows"]] == [
        ("a", 1, "old"), ("b", 3, "new"),
    ]  # fmt: skip
    twice = merged(once, [{"part": "a", "n": 4}], {"cpu": new})
    assert twice["machines"] == [new]  # of the old one no row is left
    assert [(r["part"], r["n"], r["machine"]) for r in twice["rows"]] == [("b", 3, 0), ("a", 4, 0)]


def test_durations():
    assert [duration(s) for s in (1.234, 0.01234, 12.34e-6)] == ["1.23 s", "12.3 ms", "12.3 µs"]
