"""What the benchmarks share: flags, hardware and versions with every result, and a file of results."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch

RESULTS = Path(__file__).parent / "results"


def pytest_addoption(parser):
    group = parser.getgroup("bench")
    group.addoption("--full", action="store_true", help="also the rows that take minutes")
    group.addoption("--save", action="store_true", help="write bench/results/<subject>.json")


@pytest.fixture(scope="module")
def record(request):
    """`record(part=..., **row)` keeps a row; with --save they go to results/<subject>.json (bench_<subject>.py).

    Parts are compared within themselves, so a run of some of them leaves the others in the file, with the machine that
    they were measured on. A row may name its `device`; otherwise it is the CPU.
    """
    rows: list[dict] = []
    yield lambda **row: rows.append(row)
    if rows and request.config.getoption("--save"):
        subject = request.module.__name__.split(".")[-1].removeprefix("bench_").replace("_", "-")
        file = RESULTS / f"{subject}.json"
        old = json.loads(file.read_text()) if file.exists() else {"rows": []}
        found = {name: machine(torch.device(name)) for name in {row.get("device", "cpu") for row in rows}}
        file.write_text(json.dumps({"kind": subject, **merged(old, rows, found)}, indent=1) + "\n")


def merged(old: dict[str, Any], rows: list[dict], found: dict[str, dict]) -> dict[str, Any]:
    """Rows of an old file, but for the parts that were measured again, and new ones; each with its `machine`'s place.

    `found` has the machine of each device. In files of one machine its facts stand beside the rows.
    """
    parts = {row["part"] for row in rows}
    known = old.get("machines") or [{k: old.get(k) for k in ("hardware", "versions")}]
    kept = [(row, known[row.get("machine", 0)]) for row in old["rows"] if row["part"] not in parts]
    kept += [(row, found[row.get("device", "cpu")]) for row in rows]
    machines: list[dict] = []
    for _, m in kept:
        if m not in machines:
            machines.append(m)
    return {"machines": machines, "rows": [{**row, "machine": machines.index(m)} for row, m in kept]}


def machine(device: torch.device) -> dict[str, dict]:
    """Hardware and versions."""
    try:
        from engine import report

        hardware, versions = report.hardware(device), report.versions()
    except ImportError:  # a lent GPU machine has no library of data sets
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
        hardware = {"device": str(device), "name": name, "threads": torch.get_num_threads()}
        versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "liger-kernel"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    if device.type == "cuda":
        versions |= {"cuda": torch.version.cuda, "driver": driver()}
    return {"hardware": hardware, "versions": versions}


def driver() -> str | None:
    """The version of NVIDIA's driver, from its library, else as torch finds it."""
    try:
        import pynvml
    except ImportError:
        from torch.utils import collect_env

        return collect_env.get_nvidia_driver_version(collect_env.run)
    pynvml.nvmlInit()
    try:
        found = pynvml.nvmlSystemGetDriverVersion()
        return found.decode() if isinstance(found, bytes) else found
    finally:
        pynvml.nvmlShutdown()
