"""Files of results: rows, the machines that they were measured on, and how two runs' rows come together."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "numpy", "triton", "liger-kernel")
Result = dict[str, Any]  # kind, machines, rows; a row's `machine` is the place of its machine in `machines`


def read(file: Path) -> Result:
    return json.loads(file.read_text()) if file.exists() else {"rows": []}


def write(file: Path, kind: str, rows: Result) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"kind": kind, **rows}, indent=1) + "\n")


def merged(old: Result, rows: list[dict], found: dict[str, dict]) -> Result:
    """Rows of an old file, but for the parts that were measured again, and new ones; each with its `machine`'s place.

    `found` has the machine of each device. A row without a `device` is the CPU's. In files of one machine its facts stand
    beside the rows.
    """
    return _together(old, [(row, found[row.get("device", "cpu")]) for row in rows])


def joined(old: Result, new: Result) -> Result:
    """Two files' rows, the new ones in place of old ones of the same part."""
    return _together(old, _placed(new))


def _together(old: Result, new: list[tuple[dict, dict]]) -> Result:
    parts = {row["part"] for row, _ in new}
    kept = [(row, m) for row, m in _placed(old) if row["part"] not in parts] + new
    machines: list[dict] = []
    for _, m in kept:
        if m not in machines:
            machines.append(m)
    return {"machines": machines, "rows": [{**row, "machine": machines.index(m)} for row, m in kept]}


def _placed(results: Result) -> list[tuple[dict, dict]]:
    """Each row with its machine."""
    known = results.get("machines") or [{k: results.get(k) for k in ("hardware", "versions")}]
    return [(row, known[row.get("machine", 0)]) for row in results["rows"]]


class Recorder:
    """Keeps rows of one subject and, given a file, writes them there one by one: a run that is stopped leaves what it had."""

    def __init__(self, subject: str, file: Path | None):
        self.subject, self.file, self.rows = subject, file, []
        self._old = {"rows": []} if file is None else read(file)
        self._machines: dict[str, dict] = {}

    def __call__(self, **row: Any) -> None:
        self.rows.append(row)
        if self.file is None:
            return
        name = row.get("device", "cpu")
        if name not in self._machines:
            self._machines[name] = machine(torch.device(name))
        write(self.file, self.subject, merged(self._old, self.rows, self._machines))


def machine(device: torch.device) -> dict[str, dict]:
    """Hardware and versions. Nothing of the engine is asked: a lent GPU machine has no library of data sets."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    if device.type == "cuda":
        versions |= {"cuda": torch.version.cuda, "driver": driver()}
    return {"hardware": {"device": str(device), "name": name, "threads": torch.get_num_threads()}, "versions": versions}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


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


def describe(hardware: dict[str, Any], versions: dict[str, str]) -> str:
    """A machine in one line of a caption."""
    shown = [hardware["name"], f"torch {versions['torch']}"]
    if hardware["device"].startswith("cuda"):
        names = {"triton": "triton", "liger-kernel": "liger-kernel", "cuda": "CUDA", "driver": "driver"}
        shown += [f"{title} {versions[name]}" for name, title in names.items() if versions.get(name)]
    else:
        threads = hardware["threads"]
        shown.insert(1, f"{threads} thread{'s' * (threads != 1)}")
    return ", ".join([*shown, f"Python {versions['python']}"]) + "."
