"""The content of summary.json, and the facts about code and machine in it."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from engine import __version__
from engine.config import Config
from engine.data.splits import Task

PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "torchmetrics", "safetensors", "numpy")


def summarise(
    config: Config, task: Task, metric: str, sources: dict[str, Any], teachers: list[dict[str, Any]],
    student: dict[str, Any], phases: dict[str, dict[str, Any]], **facts: Any,
) -> dict[str, Any]:  # fmt: skip
    """The content of summary.json. `teachers` and `student` hold name, source, parameters and metrics by split."""
    kinds = [sources["data"], sources["student"], *sources["teachers"]]
    overall = next(kind for kind in ("embedded", "hub", "local") if kind in kinds)
    for entry in [*teachers, student]:
        entry[metric] = entry["metrics"]["test"][metric]
    return {
        "method": config.method.name,
        "source": overall,
        "sources": sources,
        "teachers": teachers,
        "student": student,
        "times_smaller": times_smaller(teachers, student),
        "metric": metric,
        "metrics": student["metrics"],
        "task": {"kind": task.kind, "labels": list(task.label_names), "pair": task.pair},
        "examples_per_second": phases[config.method.name]["examples_per_second"],
        "phases": phases,
        **facts,
        "seed": config.run.seed,
        "versions": versions(),
        "git_commit": git_commit(),
        "settings": config.to_flat(),
    }


def times_smaller(teachers: list[dict[str, Any]], student: dict[str, Any]) -> float | None:
    """Mean of the teachers' parameters over the student's; None without teachers."""
    if not teachers:
        return None
    return round(sum(t["parameters"] for t in teachers) / len(teachers) / student["parameters"], 4)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "metadistil-engine": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def git_commit() -> str | None:
    """The commit of the checkout that this engine runs from, with "+changes" behind it where files differ from it."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, timeout=20).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return commit + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "") or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def peak_memory(device: torch.device) -> dict[str, int]:
    """Bytes: peak resident memory of the process, and peak allocated on the CUDA device."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated(device)
    return peak


def hardware(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {"device": str(device), "name": name, "threads": torch.get_num_threads()}


def _processor() -> str:
    """Its name, as people know it; psutil and platform have none on Linux."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
