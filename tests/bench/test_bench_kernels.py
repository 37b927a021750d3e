"""The benchmark of the kernels: what it counts, and that a wrong kernel is never timed."""

from types import SimpleNamespace

import pytest
import torch

from bench import bench_kernels, kernel_cases
from bench.kernel_cases import FUSED, LOGITS, Case, Inputs, fused_runs, logits_runs, rows_of, traffic
from bench.kernel_truth import WrongError, validate

CPU = torch.device("cpu")
LEFT_OUT = {"torch.compile": "this is a test", "liger": "this is a test"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Nothing is compiled."""
    monkeypatch.setattr(kernel_cases, "missing", lambda implementation, device: LEFT_OUT[implementation])


def runs_of(name, case, x):
    return (fused_runs if name in FUSED else logits_runs)(name, case, x, SimpleNamespace(name="cpu"))


def case_of(name, dtype="fp32"):
    return Case(7, 5, dtype, 1 if name in FUSED else 2, hidden=6 * (name in FUSED))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [*LOGITS, *FUSED])
def test_every_implementation_computes_the_function(name, dtype):
    case = case_of(name, dtype)
    x = Inputs(name, case, CPU)
    runs, left_out = runs_of(name, case, x)
    results = {n: run.call() for n, run in runs.items()}
    assert validate(name, case, x, results).keys() == runs.keys() >= {"ours", "eager"}
    assert set(rows_of(name, case, cuda=False)) == {*runs, *left_out}
    # each input once and each gradient once: counted apart from the tensors that a run is given and returns
    found = bench_kernels.size(x.tensors(name)) + bench_kernels.size([t for t in results["ours"] if t.dim()])
    assert traffic(name, case) == found


def wrong(results, how):
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
    right = runs_of("backward", case, x)[0]["eager"].call()
    validate("backward", case, x, {"ours": right})
    with pytest.raises(WrongError, match="ours, backward 5x7"):
        validate("backward", case, x, {"ours": wrong(right, how)})


@pytest.mark.parametrize("name", ["forward", "backward", "double"])
def test_a_kernel_that_is_a_hundredth_off_is_never_timed(monkeypatch, device, name):
    honest = kernel_cases.ours
    monkeypatch.setattr(kernel_cases, "ours", lambda *arguments: 1.01 * honest(*arguments))
    monkeypatch.setattr(bench_kernels, "interleaved", lambda *arguments, **more: pytest.fail("it was timed"))
    with pytest.raises(WrongError):
        bench_kernels.measured((name, Case(7, 5, "bf16")), device, budget=0)


def test_what_is_kept_of_a_kernel(device):
    group = bench_kernels.measured(("backward", Case(1000, 100, "fp32")), device, budget=0)
    assert group.left_out == LEFT_OUT
    assert group.info.keys() == group.rounds.keys() == {"ours", "reference", "eager"}
    for info in group.info.values():
        assert info["inputs"] == 2 * 400_000 + 800
        assert info["outputs"] == 400_004
        assert info["peak"] >= info["outputs"]
        assert info["copy_rate"] == 1e9
    fused = bench_kernels.measured(("fused", Case(1000, 16, "fp32", hidden=16)), device, budget=0)
    assert fused.info["ours"]["product_rate"] == 1e12
    assert fused.info["ours"]["operations"] == 2 * 16 * 16 * 1000 * 4
