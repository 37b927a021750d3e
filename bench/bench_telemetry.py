"""What telemetry costs: steps with it and without it, in turns in one run.

A turn is what the trainer does for half a second or more: 20 steps (--log-steps), each booked, and a record. Turns with and
without telemetry alternate, and their times are compared pair by pair. What telemetry does in a turn is also timed by
itself, since a shared machine's steps differ by more than it takes: the marks of a step, the record, and the sampler's
thread.

    pytest bench/bench_telemetry.py --full --benchmark-json telemetry.json
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from statistics import median, quantiles
from typing import NamedTuple

import torch

from bench.devices import Host
from bench.replay import Group
from bench.step_cases import SIZES, Case, Setting, engine_step
from engine.sections import listening, section
from engine.telemetry.meter import meter_of
from engine.telemetry.telemetry import Costs, Telemetry

STEPS = 20  # --log-steps
BUDGET = 0.5  # seconds of a turn, at least: ten samples
CASES = [
    (Case("metadistil", 8, 16, 2), "miniature", 40),  # the smallest steps there are
    (Case("finetune", 8, 16, 0), "miniature", 40),
    (Case("metadistil", 8, 32, 1, "bf16", full=True), "minilm", 10),
]
MOST = 0.01  # of a step's time


def turn(call: Callable[[], object], telemetry: Telemetry, case: Case, device, records: int) -> tuple[float, float]:
    """Seconds by the clock, and of the processor (all threads), that STEPS steps and a record take, `records` times over."""
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


def groups(small: bool, full: bool) -> dict[str, tuple[tuple[Case, str, int], list[str]]]:
    """Miniatures are among the usual ones, so --small only takes fewer turns."""
    return {
        f"{case.name}-{size}": ((case, size, 2 if small else pairs), ["without", "with"])
        for case, size, pairs in CASES if full or not case.full
    }  # fmt: skip


def test_telemetry(request, play, group, row):
    play()
    if "share" in group.info[row] and not request.config.getoption("--small"):
        assert group.info[row]["share"] < MOST


def measured(given: tuple[Case, str, int], device: Host, budget: float | None) -> Group:
    """A step's seconds without telemetry and with it, in turns, and what telemetry takes of them."""
    case, size, pairs = given
    where = torch.device(device.name)
    call = engine_step(Setting(case, SIZES[size], where))[1]
    for _ in range(3):
        call()
    counted = Counting()
    with listening(counted):
        call()
    assert counted.marks >= 4, "a step's sections are not marked"
    common = {"device": device.name, "size": size, "case": case.name, "pairs": pairs, "marks": counted.marks}
    if budget is None:
        return Group({"without": common, "with": common}, {})
    turns = math.ceil(budget / STEPS / timed(call)) or 1
    found = [in_turns(call, case, device, turns, first=bool(number % 2)) for number in range(pairs)]
    rounds = {
        name: [pair.seconds[on] / STEPS / turns for pair in found] for name, on in (("without", False), ("with", True))
    }
    ratios = {"clock": [pair.seconds[True] / pair.seconds[False] - 1 for pair in found],
              "cpu": [pair.used[True] / pair.used[False] - 1 for pair in found]}  # fmt: skip
    step, mark, record = median(rounds["without"]), mark_seconds(where), median(pair.record for pair in found)
    shares = {"marks_share": counted.marks * mark / step, "record_share": record / STEPS / step,
              "thread_share": median(pair.thread for pair in found)}  # fmt: skip
    quartiles = {name: quantiles(values, n=4) for name, values in ratios.items()}
    common |= {
        "turns": quartiles,
        "mark_seconds": mark,
        "record_seconds": record,
        **shares,
        "share": sum(shares.values()),
    }
    return Group({"without": common, "with": common}, rounds)


class Pair(NamedTuple):
    """A turn without telemetry (False) and one with it (True)."""

    seconds: dict[bool, float]  # by the clock
    used: dict[bool, float]  # of the processor, all threads
    record: float  # seconds of a record
    thread: float  # of the turn, what the sampler's thread took


def in_turns(call: Callable[[], object], case: Case, device: Host, turns: int, first: bool) -> Pair:
    """`first`: whether the turn with telemetry goes first."""
    seconds, used, record, thread = {}, {}, 0.0, 0.0
    for on in (first, not first):
        telemetry = Telemetry(torch.device(device.name), on, flops=False)
        try:
            if on:
                telemetry.sampler.start()  # once a run
                time.sleep(0.01)
            before = telemetry.sampler.cpu_seconds if on else 0.0
            started = time.perf_counter()
            seconds[on], used[on] = turn(call, telemetry, case, device, turns)
            if on:
                wall = time.perf_counter() - started
                record = timed(lambda t=telemetry: t.values(1.0))
                telemetry.close()
                thread = (telemetry.sampler.cpu_seconds - before) / wall
        finally:
            telemetry.close()
    return Pair(seconds, used, record, thread)


def _wait(device) -> None:
    if device.name == "cuda":
        torch.cuda.synchronize()


def timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
