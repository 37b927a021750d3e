"""Rows that are timed in turns, each a benchmark of pytest-benchmark by its own name.

Whoever is held against a baseline is timed with it, round by round (`interleaved`), so a group of rows is measured at once.
Each row's test then replays the rounds that were recorded for it: its timer, an option of pytest-benchmark's marker, reads
0 when a round starts and the recorded seconds when it ends. Medians and quartiles are pytest-benchmark's, of those rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest

from bench.devices import Host

LEAST, MOST = 5, 50  # rounds; three, where one takes seconds
SAMPLE = 2e-3  # seconds: shorter calls are repeated in a round until it takes so long


class Run(NamedTuple):
    """A call to be timed, and what has to be done before each, untimed."""

    call: Callable[[], Any]
    before: Callable[[], Any] = lambda: None


@dataclass
class Group:
    """What was found of rows that are compared with each other."""

    info: dict[str, dict[str, Any]]  # of each row: what belongs beside its time
    rounds: dict[str, list[float]]  # of each row: seconds of a call, a number a round; empty where nothing was timed
    left_out: dict[str, str] = field(default_factory=dict)  # rows that this machine cannot have, and why
    failed: dict[str, str] = field(default_factory=dict)  # rows that it should have had, and why it has not


class Clock:
    """A timer for pytest-benchmark that reads what was recorded."""

    __name__ = "recorded"  # in the results' options

    def __init__(self):
        self._readings = iter(())

    def rewind(self, rounds: Iterable[float]) -> None:
        self._readings = iter([reading for seconds in rounds for reading in (0.0, seconds)])

    def __call__(self) -> float:
        return next(self._readings)


def rows_of(subject: str, groups: dict[str, tuple[Any, list[str]]]) -> list:
    """Parameters (group, row) of a test a row, by the rows of every group; all rows of a group are each other's peers."""
    return [
        pytest.param(
            name, row, id=f"{name}-{row.replace(', ', '-').replace(' ', '-')}",
            marks=pytest.mark.benchmark(group=f"{subject} {name}", timer=Clock()),
        )
        for name, (_, rows) in groups.items() for row in rows
    ]  # fmt: skip


def replay(benchmark: Any, clock: Clock, group: Group, row: str) -> None:
    """Give pytest-benchmark a row's rounds, or say why there are none."""
    if row in group.failed:
        pytest.fail(group.failed[row], pytrace=False)
    if row in group.left_out:
        pytest.skip(group.left_out[row])
    benchmark.extra_info.update(group.info[row], row=row)
    if missing := group.left_out | group.failed:
        benchmark.extra_info["left_out"] = missing
    rounds = group.rounds.get(row, [])
    clock.rewind(rounds)
    benchmark.pedantic(lambda: None, rounds=max(1, len(rounds)))


def interleaved(
    device: Host, runs: dict[str, Run], budget: float | None, small: bool = False
) -> dict[str, list[float]]:
    """Rounds of several runs, one of each in a round, so that whatever else the machine does meets all of them alike.

    Together they take `budget` seconds where few rounds take no longer; None times nothing. Caches are flushed before each
    run, unless it is `small`: launching is then what costs, and calls are repeated. Whoever is first in a round is last in
    the next. Each has run before, so that nothing is compiled here.
    """
    if budget is None:
        return {}
    expected = {}
    for name, (call, before) in runs.items():
        before()
        expected[name] = device.seconds(call)
    repeat = {name: max(1, min(1000, int(SAMPLE / s))) if small else 1 for name, s in expected.items()}
    total = sum(expected[name] * repeat[name] for name in runs)
    rounds = max(LEAST if total < 2 else 3, min(MOST, int(budget / total)))
    found: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for i in range(rounds):
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            runs[name].before()
            if not small:
                device.flush()
            found[name].append(device.seconds(runs[name].call, repeat[name]))
    return found
