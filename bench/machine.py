"""The machine that something is measured on: its hardware, the versions of what runs there."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.utils import collect_env

PACKAGES = ("torch", "transformers", "numpy", "triton", "liger-kernel")


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
        driver = collect_env.get_nvidia_driver_version(collect_env.run)
        versions |= {"cuda": torch.version.cuda, "driver": driver}
    return {"hardware": {"device": str(device), "name": name, "threads": torch.get_num_threads()}, "versions": versions}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def describe(hardware: dict[str, Any], versions: dict[str, str]) -> str:
    """A machine in one line of a caption."""
    threads, on_gpu = hardware["threads"], hardware["device"].startswith("cuda")
    named = {"torch": "torch", "transformers": "transformers"}
    if on_gpu:
        named |= {"triton": "triton", "liger-kernel": "liger-kernel", "cuda": "CUDA", "driver": "driver"}
    named["python"] = "Python"
    shown = [f"{title} {versions[name]}" for name, title in named.items() if versions.get(name)]
    return ", ".join([hardware["name"], *([] if on_gpu else [f"{threads} thread{'s' * (threads != 1)}"]), *shown]) + "."
