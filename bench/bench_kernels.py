"""The kernels beside what people write: time, share of what the device can do, memory; every row is checked first.

The same on a CUDA device, where there is one, and on a CPU, with sizes that fit each. Implementations of a pass over
one case are timed in turns, caches flushed; `kernel_cases.py` says what passes and implementations are.

    pytest bench/bench_kernels.py --benchmark-json kernels.json [--full] [-k "backward and bf16"]
"""

from __future__ import annotations

import gc

import torch

from bench import kernel_cases as cases
from bench.devices import Host
from bench.kernel_cases import DTYPES, FUSED, LAUNCH, LOGITS, Case, Inputs, operations, rows_of, traffic
from bench.kernel_truth import validate
from bench.replay import Group, Run, interleaved
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


def passes(small: bool, full: bool) -> list[tuple[str, Case]]:
    """Every pass over every case."""
    if small:
        return [*((name, Case(1000, 64, "fp32")) for name in LOGITS), ("fused", Case(1000, 16, "fp32", hidden=16))]
    found = [(name, case) for case in (cuda_cases() if CUDA else cpu_cases()) for name in LOGITS] + fused_cases()
    return [(name, case) for name, case in found if full or not case.full]


def groups(small: bool, full: bool) -> dict[str, tuple[tuple[str, Case], list[str]]]:
    return {f"{name}-{case.name}": ((name, case), rows_of(name, case, CUDA)) for name, case in passes(small, full)}


def test_kernels(play):
    play()


def measured(given: tuple[str, Case], device: Host, budget: float | None) -> Group:
    """A pass over a case: its implementations, or why one is left out. Raises WrongError before timing."""
    name, case = given
    x = Inputs(name, case, device.device)
    runs, left_out = (cases.fused_runs if name in FUSED else cases.logits_runs)(name, case, x, device)
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
    rounds = interleaved(device, runs, budget, small=traffic(name, case) < LAUNCH)
    common = {
        "device": device.name, "backend": backends.backend(device.name).name, "pass": name, "classes": case.classes,
        "rows": case.rows, "hidden": case.hidden, "dtype": case.dtype, "teachers": case.teachers,
        "bytes": traffic(name, case), "inputs": size(x.tensors(name)),
    }  # fmt: skip
    if rounds:
        common["copy_rate"] = device.rate
    if rounds and name in FUSED:
        columns = min(case.classes, 2**15)
        rate = device.product_rate(case.rows, case.hidden, columns, DTYPES[case.dtype])
        common |= {"operations": operations(case), "product_rate": rate}
    info = {n: common | {"error": found[n], "outputs": outputs[n], "peak": peaks[n]} for n in runs}
    return Group(info, rounds, left_out)


def peak(device: Host, run: Run) -> int:
    run.before()
    return device.peak(run.call)


def size(tensors: list[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
