"""Whole training steps beside what people write in PyTorch: time, examples/s, share of the device's rate, memory.

Methods, batch sizes, lengths, numbers of teachers and precisions; `step_cases.py` says what the implementations are. Each
is held against plain PyTorch in float32 before it is timed (`step_truth.py`), a CUDA graph against the engine's eager steps.
Those of one case are a group, timed in turns. On a GPU the models have the size of BERT-base and DistilBERT, on a CPU of MiniLM;
weights are random, dropout is on.

    pytest bench/bench_steps.py --benchmark-json steps.json [--full] [-k "metadistil and bf16"]
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import product
from statistics import median
from typing import Any

import torch

from bench.devices import Host
from bench.measure import flops
from bench.replay import Group, Run, interleaved
from bench.step_cases import DTYPES, SIZES, Case, NotCaptured, Setting, masters
from bench.step_truth import WrongError, validate, validate_graph

CUDA = torch.cuda.is_available()
BUDGET = 2.0  # seconds of timing for a case, all implementations together, where three rounds take no longer
METHODS = [("finetune", 0), ("kd", 1), ("metadistil", 1), ("kd", 2), ("metadistil", 2)]
# The published loop takes 25 s a step at 128 x 128 on two cores, and 12 GiB.
MOST_TOKENS = 2**30 if CUDA else 2**13


def cases(small: bool, full: bool) -> list[Case]:
    """The usual ones first, those of one shape together: they share what is expected of them."""
    if small:
        return [Case(m, 4, 16, k, p) for m, k in METHODS for p in DTYPES]
    shapes = [(b, n) for b, n in product((32, 8, 128), (128, 64, 32)) if b * n <= MOST_TOKENS]
    found = [Case(m, *shape, k, p, not usual(m, *shape, k, p)) for shape in shapes for m, k in METHODS for p in DTYPES]
    return sorted((case for case in found if full or not case.full), key=lambda case: case.full)


def usual(method: str, batch: int, length: int, teachers: int, precision: str) -> bool:
    """Whether it runs without --full."""
    shape = batch, length
    if CUDA:
        return shape == (32, 128) or (shape in ((8, 32), (128, 128)) and teachers < 2)
    if teachers == 2:
        return shape == (8, 32) and precision == "bf16"
    return shape == (32, 64) or (shape == (8, 32) and precision == "fp32")


def groups(small: bool, full: bool) -> dict[str, tuple[Setting, list[str]]]:
    size = SIZES["miniature distilbert" if small else "base" if CUDA else "minilm"]
    settings = [Setting(case, size, torch.device("cuda" if CUDA else "cpu")) for case in cases(small, full)]
    return {each.case.name: (each, list(each.implementations())) for each in settings}


def test_steps(play):
    play()


def measured(setting: Setting, device: Host, budget: float | None) -> Group:
    """A case: its implementations, or why one is left out. Raises WrongError before timing.

    A graph that is not what eager steps are has failed, and the others of the case are kept.
    """
    case = setting.case
    masters(setting.size, case.teachers, setting.device)  # before memory is counted
    errors, runs, facts, left_out, failed = {}, {}, {}, {}, {}
    for name, build in setting.implementations().items():
        try:
            if name == "graph":
                validate_graph(setting)
            else:
                errors[name] = validate(setting, name)
            gc.collect()
            facts[name], runs[name] = prepared(device, build, counted=name != "graph")
        except torch.OutOfMemoryError:
            left_out[name] = "out of memory"
        except (NotCaptured, WrongError) as error:
            if name != "graph":
                raise
            failed[name] = str(error)
    if "graph" in runs:
        facts["graph"]["flops"], errors["graph"] = facts["engine"]["flops"], errors["engine"]
    rounds = interleaved(device, runs, budget)
    common = {
        "device": device.name, "models": setting.size.title, "method": case.method, "batch": case.batch,
        "length": case.length, "teachers": case.teachers, "precision": case.precision, "full": case.full,
    }  # fmt: skip
    info = {name: common | facts[name] | {"error": errors[name]} for name in runs}
    for name, seconds in rounds.items():
        info[name] |= rates(case, median(seconds), facts[name]["flops"], device.dense_rate(DTYPES[case.precision]))
    return Group(info, rounds, left_out, failed)


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
        "dense_rate": rate,
    }
