"""The kernels beside what people write: time, share of what the device can do, memory; every row is checked first.

The same on a CUDA device, where there is one, and on a CPU, with sizes that fit each. Implementations of a pass over
one case are timed in turns, caches flushed; `kernel_cases.py` says what passes and implementations are.

    pytest bench/bench_kernels.py --save [--full] [-k "backward and bf16"]

Each pass over a case is a part of bench/results/kernels.json, so runs of some of them, and on several devices, add up.
"""

from __future__ import annotations

import gc

import pytest
import torch

from bench.devices import Host, Run, interleaved
from bench.kernel_cases import DTYPES, FUSED, LAUNCH, LOGITS, Case, Inputs, fused_runs, logits_runs, operations, traffic
from bench.kernel_truth import validate
from engine.kernels.ops.common import backends

CUDA = torch.cuda.is_available()
BUDGET = 1.5  # seconds for a pass over a case, all implementations together


def cuda_cases() -> list[Case]:
    """2^30 bytes of student logits, many times the second-level cache; 2^22 rows of two classes; the engine's own shape."""
    cases = [Case(2, 32, "fp32")]
    for classes, power in ((2, 1), (1000, 10), (32768, 15), (131072, 17)):
        for dtype in ("bf16", "fp32"):
            rows = 2**22 if classes == 2 else 2**30 // DTYPES[dtype].itemsize >> power
            for teachers in (1, 2, 4):
                usual = teachers == 1 or (classes == 32768 and dtype == "bf16")
                cases.append(Case(classes, rows, dtype, teachers, full=not usual))
    return cases


def cpu_cases() -> list[Case]:
    """4 million logits, 16 MB in float32; the engine's own shape, [32, 2], and more rows of it."""
    cases = []
    for classes, rows in ((2, 32), (2, 4096), (1000, 4096), (32000, 128), (128000, 32)):
        for dtype in ("fp32", "bf16"):
            for teachers in (1, 2):
                usual = (dtype, teachers) == ("fp32", 1) or (classes == 32000 and (dtype, teachers) != ("bf16", 2))
                cases.append(Case(classes, rows, dtype, teachers, full=not usual))
    return cases


def fused_cases() -> list[tuple[str, Case]]:
    if CUDA:
        return [(name, Case(131072, 8192, "bf16", hidden=4096)) for name in FUSED]
    return [
        (name, Case(32000, 512, dtype, hidden=512, full=(name, dtype) != ("fused", "fp32")))
        for name in FUSED for dtype in ("fp32", "bf16")
    ]  # fmt: skip


def passes(small: bool) -> list[tuple[str, Case]]:
    """Every pass over every case."""
    if small:
        return [*((name, Case(1000, 64, "fp32")) for name in LOGITS), ("fused", Case(1000, 16, "fp32", hidden=16))]
    return [(name, case) for case in (cuda_cases() if CUDA else cpu_cases()) for name in LOGITS] + fused_cases()


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        found = passes(metafunc.config.getoption("--small"))
        metafunc.parametrize(("name", "case"), found, ids=[f"{name}-{case.name}" for name, case in found])


def test_kernels(request, record, device, name, case):
    if case.full and not request.config.getoption("--full"):
        pytest.skip("--full runs it")
    for row in measured(name, case, device, 0.0 if request.config.getoption("--small") else BUDGET):
        record(**row)


def measured(name: str, case: Case, device: Host, budget: float) -> list[dict]:
    """The rows of a pass over a case: of each implementation, or why it is left out. Raises WrongError before timing."""
    x = Inputs(name, case, device.device)
    runs, left_out = (fused_runs if name in FUSED else logits_runs)(name, case, x, device)
    results = {}
    for implementation, run in list(runs.items()):
        run.before()
        try:
            results[implementation] = [t.detach() for t in run.call()]
        except torch.OutOfMemoryError:
            left_out[implementation] = "out of memory"
            del runs[implementation]
    found = validate(name, case, x, results)
    outputs = {n: size(tensors) for n, tensors in results.items()}
    del results
    gc.collect()
    peaks = {n: peak(device, run) for n, run in runs.items()}
    small = traffic(name, case) < LAUNCH
    times = interleaved(device, runs, budget, small)
    common = {
        "part": f"{device.name} {name} {case.name}", "device": device.name, "backend": backends.backend(device.name).name,
        "pass": name, "classes": case.classes, "rows": case.rows, "hidden": case.hidden, "dtype": case.dtype,
        "teachers": case.teachers, "bytes": traffic(name, case), "copy_rate": device.rate,
    }  # fmt: skip
    if name in FUSED:
        columns = min(case.classes, 2**15)
        rate = device.product_rate(case.rows, case.hidden, columns, DTYPES[case.dtype])
        common |= {"operations": operations(case), "product_rate": rate}
    inputs = size(x.tensors(name))
    return [
        *({**common, "row": n, **times[n], "error": found[n], "inputs": inputs, "outputs": outputs[n], "peak": peaks[n]} for n in runs),
        *({**common, "row": n, "left_out": why} for n, why in left_out.items()),
    ]  # fmt: skip


def peak(device: Host, run: Run) -> int:
    run.before()
    return device.peak(run.call)


def size(tensors: list[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
