"""What the benchmarks share: flags, the device, and a file of results with hardware and versions.

The flags are defined here, so a benchmark is named on the command line: `pytest bench/bench_steps.py --full --save`.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from bench.devices import Cuda, Host
from bench.records import Recorder

RESULTS = Path(__file__).parent / "results"
NO_TIME = "no time is left (--seconds)"


def pytest_addoption(parser):
    group = parser.getgroup("bench")
    group.addoption("--full", action="store_true", help="also the rows that take minutes")
    group.addoption(
        "--small", action="store_true", help="miniatures and few rows, to see that everything works; times say nothing"
    )
    group.addoption("--save", action="store_true", help="write <subject>.json into --results")
    group.addoption("--results", type=Path, default=RESULTS, help="folder of the results (default: bench/results)")
    group.addoption("--seconds", type=float, help="start no more rows after so many seconds")


def pytest_configure(config):
    config.bench_started = time.monotonic()
    if config.getoption("--small") and config.getoption("--save") and config.getoption("--results") == RESULTS:
        raise pytest.UsageError("--small measures nothing that is worth keeping; name another folder with --results.")


def pytest_runtest_setup(item):
    most = item.config.getoption("--seconds")
    if most is not None and time.monotonic() - item.config.bench_started > most:
        pytest.skip(NO_TIME)


@pytest.fixture(scope="session")
def device() -> Host:
    """What is measured on: the GPU where there is one."""
    return Cuda() if torch.cuda.is_available() else Host()


@pytest.fixture(scope="module")
def record(request) -> Recorder:
    """`record(part=..., **row)` keeps a row; with --save they go to <subject>.json (bench_<subject>.py).

    Parts are compared within themselves, so a run of some of them leaves the others in the file, with the machine that
    they were measured on. A row may name its `device`; otherwise it is the CPU.
    """
    subject = request.module.__name__.split(".")[-1].removeprefix("bench_").replace("_", "-")
    save, folder = request.config.getoption("--save"), request.config.getoption("--results")
    return Recorder(subject, folder / f"{subject}.json" if save else None)
