"""What telemetry costs: steps with it and without it, in turns in one run.

A turn is what the trainer does for half a second or more: 20 steps (--log-steps), each booked, and a record. Turns with and without
telemetry alternate, and their times are compared pair by pair. What telemetry does in a turn is also timed by itself,
since a shared machine's steps differ by more than it takes: the marks of a step, the record, and the sampler's thread.

    pytest bench/bench_telemetry.py --full --save
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from statistics import median, quantiles

import pytest
import torch

from bench.step_cases import SIZES, Case, Setting, engine_step
from engine.sections import listening, section
from engine.telemetry.meter import meter_of
from engine.telemetry.telemetry import Costs, Telemetry

STEPS = 20  # --log-steps
TURN = 0.5  # seconds, at least: ten samples
CASES = [
    (Case("metadistil", 8, 16, 2), "miniature", 40),  # the smallest steps there are
    (Case("finetune", 8, 16, 0), "miniature", 40),
    (Case("metadistil", 8, 32, 1, "bf16", full=True), "minilm", 10),
]
MOST = 0.01  # of a step's time


def turn(call: Callable[[], object], telemetry: Telemetry, case: Case, device, records: int) -> tuple[float, float]:
    """Seconds of so many times STEPS steps and a record, by the clock and of the processor (all threads)."""
    shapes = [(case.batch, case.length)]
    with telemetry.phase(Costs()):
        _wait(device)
        started, used = time.perf_counter(), time.process_time()
        for _ in range(records):
            for _ in range(STEPS):
                with section("data wait"):
                    pass
                call()
                telemetry.round(shapes, shapes)
            _wait(device)
            with section("logging"):
                telemetry.values(time.perf_counter() - started)
        return time.perf_counter() - started, time.process_time() - used


class Counting:
    """How many marks a step makes."""

    marks = 0

    def enter(self, name):
        self.marks += 1

    leave = lambda self: self.enter("")  # noqa: E731
    captured = lambda self: lambda: None  # noqa: E731


def mark_seconds(device: torch.device, repeats: int = 2000) -> float:
    """Of the host, for one mark while a meter listens."""
    meter = meter_of(device)
    with listening(meter):
        started = time.perf_counter()
        for _ in range(repeats):
            with section("pilot"):
                pass
        return (time.perf_counter() - started) / (2 * repeats)


@pytest.mark.parametrize(("case", "size", "pairs"), CASES, ids=lambda each: getattr(each, "name", None))
def test_cost(device, record, request, case, size, pairs):
    if case.full and not request.config.getoption("--full"):
        pytest.skip("--full runs it")
    if request.config.getoption("--small"):
        pairs = 2
    where = torch.device(device.name)
    call = engine_step(Setting(case, SIZES[size], where))[1]
    for _ in range(3):
        call()
    turns = 1 if request.config.getoption("--small") else math.ceil(TURN / STEPS / timed(call))
    counted = Counting()
    with listening(counted):
        call()
    ratios, ratios_cpu, plain, records, busy = [], [], [], [], []
    for number in range(pairs):
        seconds = {}
        for on in (True, False) if number % 2 else (False, True):
            telemetry = Telemetry(where, on, flops=False)
            try:
                if on:
                    telemetry.sampler.start()  # once a run
                    time.sleep(0.01)
                before = telemetry.sampler.cpu_seconds if on else 0.0
                started = time.perf_counter()
                seconds[on] = turn(call, telemetry, case, device, turns)
                if on:
                    wall = time.perf_counter() - started
                    records.append(timed(lambda t=telemetry: t.values(1.0)))
                    telemetry.close()
                    busy.append((telemetry.sampler.cpu_seconds - before) / wall)
            finally:
                telemetry.close()
        for found, each in zip(
            (ratios, ratios_cpu), zip(*(seconds[on] for on in (True, False)), strict=True), strict=True
        ):
            found.append(each[0] / each[1] - 1)
        plain.append(seconds[False][0] / STEPS / turns)
    step, mark = median(plain), mark_seconds(where)
    marks, logging, thread = counted.marks * mark / step, median(records) / STEPS / step, median(busy)
    quartiles = {name: quantiles(found, n=4) for name, found in {"clock": ratios, "cpu": ratios_cpu}.items()}
    record(part=size, row=case.name, device=device.name, step=step, pairs=pairs, turns=quartiles,
           marks=counted.marks, mark_seconds=mark, marks_share=marks, record_seconds=median(records), record_share=logging,
           thread_share=thread, share=marks + logging + thread)  # fmt: skip
    assert counted.marks >= 4
    if not request.config.getoption("--small"):
        assert marks + logging + thread < MOST


def _wait(device) -> None:
    if device.name == "cuda":
        torch.cuda.synchronize()


def timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
