"""Whole training steps beside what people write in PyTorch: time, examples/s, share of the device's rate, memory.

Methods, batch sizes, lengths, numbers of teachers and precisions; `step_cases.py` says what the implementations are. Each
is held against plain PyTorch in float32 before it is timed (`step_truth.py`), a CUDA graph against the engine's eager steps.
Those of one case are timed in turns. On a GPU the models have the size of BERT-base and DistilBERT, on a CPU of MiniLM;
weights are random, dropout is on.

    pytest bench/bench_steps.py --save [--full] [-k "metadistil and bf16"]

Each case is a part of bench/results/steps.json, so runs of some of them, and on several devices, add up.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch

from bench.devices import Host, Run, interleaved
from bench.measure import flops
from bench.step_cases import DTYPES, SIZES, Case, NotCaptured, Setting, masters
from bench.step_truth import WrongError, validate, validate_graph

CUDA = torch.cuda.is_available()
BUDGET = 2.0  # seconds of timing for a case, all implementations together, where three rounds take no longer
METHODS = [("finetune", 0), ("kd", 1), ("metadistil", 1), ("kd", 2), ("metadistil", 2)]
# The published loop takes 25 s a step at 128 x 128 on two cores, and 12 GiB.
MOST_TOKENS = 2**30 if CUDA else 2**13


def cases(small: bool) -> list[Case]:
    """The usual ones first, those of one shape together: they share what is expected of them."""
    if small:
        return [Case(m, 4, 16, k, p) for m, k in METHODS for p in DTYPES]
    shapes = [(b, n) for b, n in product((32, 8, 128), (128, 64, 32)) if b * n <= MOST_TOKENS]
    found = [Case(m, *shape, k, p, not usual(m, *shape, k, p)) for shape in shapes for m, k in METHODS for p in DTYPES]
    return sorted(found, key=lambda case: case.full)


def usual(method: str, batch: int, length: int, teachers: int, precision: str) -> bool:
    """Whether it runs without --full."""
    shape = batch, length
    if CUDA:
        return shape == (32, 128) or (shape in ((8, 32), (128, 128)) and teachers < 2)
    if teachers == 2:
        return shape == (8, 32) and precision == "bf16"
    return shape == (32, 64) or (shape == (8, 32) and precision == "fp32")


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        found = cases(metafunc.config.getoption("--small"))
        metafunc.parametrize("case", found, ids=[case.name for case in found])


def test_steps(request, record, device, case):
    if case.full and not request.config.getoption("--full"):
        pytest.skip("--full runs it")
    small = request.config.getoption("--small")
    size = SIZES["miniature distilbert" if small else "base" if CUDA else "minilm"]
    rows = measured(Setting(case, size, device.device), device, 0.0 if small else BUDGET)
    for row in rows:
        record(**row)
    failed = [row["left_out"] for row in rows if row.get("failed")]
    assert not failed, failed  # the others of the case are kept


def measured(setting: Setting, device: Host, budget: float) -> list[dict]:
    """The rows of a case: of each implementation, or why it is left out. Raises WrongError before timing.

    A graph that is not what eager steps are is left out as failed.
    """
    case = setting.case
    masters(setting.size, case.teachers, setting.device)  # before memory is counted
    errors, runs, facts, left_out = {}, {}, {}, {}
    for name, build in setting.implementations().items():
        try:
            if name == "graph":
                validate_graph(setting)
            else:
                errors[name] = validate(setting, name)
            gc.collect()
            facts[name], runs[name] = prepared(device, build, counted=name != "graph")
        except torch.OutOfMemoryError:
            left_out[name] = {"left_out": "out of memory"}
        except (NotCaptured, WrongError) as error:
            if name != "graph":
                raise
            left_out[name] = {"left_out": str(error), "failed": True}
    if "graph" in runs:
        facts["graph"]["flops"], errors["graph"] = facts["engine"]["flops"], errors["engine"]
    times = interleaved(device, runs, budget)
    rate = device.dense_rate(DTYPES[case.precision])
    common = {
        "part": f"{device.name} {case.name}", "device": device.name, "models": setting.size.title, "method": case.method,
        "batch": case.batch, "length": case.length, "teachers": case.teachers, "precision": case.precision,
        "full": case.full, "dense_rate": rate,
    }  # fmt: skip
    return [
        *({**common, "row": n, **times[n], **facts[n], **rates(case, times[n]["seconds"], facts[n]["flops"], rate),
           "error": errors[n]} for n in runs),
        *({**common, "row": n, **why} for n, why in left_out.items()),
    ]  # fmt: skip


def prepared(device: Host, build: Callable[[], Callable[[], Any]], counted: bool) -> tuple[dict[str, int], Run]:
    """A step that is ready to be timed. `peak` is the most memory, in bytes, that it needed for all that it holds: weights,
    optimizer state, gradients, activations; `reserved` what torch's allocator took for it, on CUDA."""
    made: dict[str, Any] = {}

    def first_steps() -> None:
        made["call"] = build()
        made["flops"] = flops(made["call"]) if counted else 0
        made["call"]()

    before = device.reserved()
    peak = device.peak(first_steps)
    return {"peak": peak, "reserved": device.reserved() - before, "flops": made["flops"]}, Run(made["call"])


def rates(case: Case, seconds: float, operations: int, rate: float) -> dict[str, float]:
    """Quiz batches are no training examples. `mfu` is the share of the rate of a large matrix product."""
    return {
        "examples_per_second": case.batch / seconds,
        "tokens_per_second": case.batch * case.length / seconds,
        "mfu": operations / seconds / rate,
    }
