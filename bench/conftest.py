"""What the benchmarks share: flags, the device, groups that are timed in turns, and the facts of the machine.

The flags are defined here, so a benchmark is named on the command line: `pytest bench/bench_steps.py --full`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from bench.devices import Cuda, Host
from bench.machine import machine
from bench.records import subject_of
from bench.replay import Group, replay, rows_of


def pytest_addoption(parser):
    group = parser.getgroup("bench")
    group.addoption("--full", action="store_true", help="also the rows that take minutes")
    group.addoption(
        "--small", action="store_true", help="miniatures and few rows, to see that everything works; times say nothing"
    )
    group.addoption("--seconds", type=float, help="measure nothing more after so many seconds")


def pytest_configure(config):
    config.bench_started = time.monotonic()


def pytest_benchmark_generate_machine_info(config):
    """In place of pytest-benchmark's, which names the host and lists what its processor can do."""
    return machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def pytest_benchmark_update_json(config, output_json):
    if config.getoption("--small"):
        output_json["small"] = True  # `bench.table merge` then refuses it


def pytest_generate_tests(metafunc):
    """A test of what `group` measures becomes one of each row of the groups that its module has."""
    if "group" in metafunc.fixturenames:
        rows = rows_of(subject_of(metafunc.module.__name__), groups(metafunc.module, metafunc.config))
        metafunc.parametrize(("group", "row"), rows, indirect=["group"])


def groups(module: ModuleType, config: pytest.Config) -> dict[str, tuple[Any, list[str]]]:
    """Of a benchmark's module, by name: what its `measured` takes, and the rows that come of it."""
    return module.groups(small=config.getoption("--small"), full=config.getoption("--full"))


@pytest.fixture(scope="session")
def device() -> Host:
    """What is measured on: the GPU where there is one."""
    return Cuda() if torch.cuda.is_available() else Host()


@pytest.fixture(scope="session")
def timed(request) -> bool:
    """Whether pytest-benchmark times anything, or rows are only checked (--benchmark-disable)."""
    option = request.config.getoption
    return option("--benchmark-enable") or not option("--benchmark-disable")


@pytest.fixture
def in_time(request) -> None:
    """Asked for by whoever is about to measure something."""
    most = request.config.getoption("--seconds")
    if most is not None and time.monotonic() - request.config.bench_started > most:
        pytest.skip("no time is left (--seconds)")


@pytest.fixture(scope="module")
def found() -> dict[str, Group | str]:
    """The module's groups by name, each from when one of its rows was first asked for; of one that is wrong, what is."""
    return {}


@pytest.fixture
def group(request, found, device, timed) -> Group:
    """A row's group, checked and then timed in turns by the module's `measured`, once for all of its rows."""
    name = request.param
    if name not in found:
        request.getfixturevalue("in_time")
        given, _ = groups(request.module, request.config)[name]
        budget = 0.0 if request.config.getoption("--small") else request.module.BUDGET
        try:
            found[name] = request.module.measured(given, device, budget if timed else None)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
            raise
    if isinstance(found[name], str):
        pytest.fail(found[name], pytrace=False)
    return found[name]


@pytest.fixture
def play(request, group, row, benchmark) -> Callable[[], None]:
    """Replays a row's recorded rounds as a benchmark."""
    clock = request.node.get_closest_marker("benchmark").kwargs["timer"]
    return lambda: replay(benchmark, clock, group, row)
