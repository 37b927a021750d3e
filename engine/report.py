"""What a run leaves for people: summary.json, model cards, predictions and the closing table."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine import __version__
from engine.config import Config
from engine.data.splits import Task

PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "torchmetrics", "safetensors", "numpy")
PREPARED = {"finetune": "fine-tuned", "multitask": "multi-task", "meta": "meta-teacher"}
DEMONSTRATION = (
    "This is the embedded demonstration: miniature, randomly initialised models and a generated corpus stand in for what "
    "could not be had from the hub. Its figures say nothing about the real models."
)


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
        "method": config.method.method,
        "source": overall,
        "sources": sources,
        "teachers": teachers,
        "student": student,
        "times_smaller": times_smaller(teachers, student),
        "metric": metric,
        "metrics": student["metrics"],
        "task": {"kind": task.kind, "labels": list(task.label_names), "pair": task.pair},
        "examples_per_second": phases[config.method.method]["examples_per_second"],
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
    root = Path(__file__).resolve().parents[1]
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


def export(module: nn.Module, tokenizer: Any, folder: Path, card: str) -> None:
    """A Hugging Face directory: safetensors weights, configuration, tokenizer and model card."""
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card)


def model_card(summary: dict[str, Any], entry: dict[str, Any], role: str, data: str) -> str:
    """A model card with method, data, settings and figures of one model of the run."""
    percent = summary["task"]["kind"] == "classification"
    rows = [
        f"| {split} | {name} | {value * 100:.2f} % |" if percent and name == "accuracy" else f"| {split} | {name} | {value:.4f} |"
        for split, metrics in entry["metrics"].items() for name, value in metrics.items()
    ]  # fmt: skip
    teachers = ", ".join(f"{t['name']} ({t['parameters']:,} parameters)" for t in summary["teachers"]) or "none"
    settings = "\n".join(
        f"- {k}: {v}" for k, v in summary["settings"].items() if v is not None and k not in ("output", "cache_dir")
    )
    demonstration = f"\n> {DEMONSTRATION}\n" if summary["source"] == "embedded" else ""
    return f"""---
library_name: transformers
pipeline_tag: text-classification
tags:
- knowledge-distillation
- {summary["method"]}
---
# {entry["name"]}: {role}
{demonstration}
Trained by metadistil-engine {summary["versions"]["metadistil-engine"]} with the method `{summary["method"]}`.

- parameters: {entry["parameters"]:,}
- started from: {entry["source"]}
- teachers: {teachers}
- data: {data}
- labels: {", ".join(summary["task"]["labels"]) or "one number"}

| split | metric | value |
|---|---|---|
{chr(10).join(rows)}

## Settings
{settings}
"""


def closing_table(summary: dict[str, Any]) -> dict[str, Any]:
    """Title, columns and rows in the shape of Table 1 of "Improving MetaDistil Framework": teachers, then student."""
    metric, student = summary["metric"], summary["student"]

    def row(method: str, models: str, entry: dict[str, Any], smaller: float | None) -> list[str]:
        shown = [_shown(entry["metrics"][split][metric], metric) for split in ("validation", "test")]
        return [method, models, *shown, f"{entry['parameters']:,}", f"{smaller:.2f} x" if smaller else ""]

    prepared = PREPARED[summary["settings"]["prepare_method"]]
    rows = [row("as given" if t["origin"] == "as given" else prepared, t["name"], t, None) for t in summary["teachers"]]
    names = "+".join(t["name"] for t in summary["teachers"])
    arrow = f"{names} -> {student['name']}" if names else student["name"]
    rows.append(row(summary["method"], arrow, student, summary["times_smaller"]))
    columns = ["method", "teachers -> student", "validation", "test", "parameters", "smaller"]
    return {"title": _title(summary), "columns": columns, "rows": rows}


def domain_table(summary: dict[str, Any]) -> dict[str, Any] | None:
    """The same models' figures on the test set of each domain, and their mean; None with fewer than two domains."""
    metric, entries = summary["metric"], [*summary["teachers"], summary["student"]]
    names = list(summary["student"].get("by_domain", {}).get("test", {}))
    if len(names) < 2:
        return None
    rows = []
    for entry in entries:
        values = [entry["by_domain"]["test"][name][metric] for name in names]
        rows.append([entry["name"], "", *(_shown(v, metric) for v in [*values, sum(values) / len(values)])])
    rows[-1][1] = "student"
    title = f"{_title(summary)}, test set by domain"
    return {"title": title, "columns": ["model", "", *names, "mean"], "rows": rows}


def _title(summary: dict[str, Any]) -> str:
    metric = summary["metric"]
    return f"{metric}{' in %' if metric == 'accuracy' else ''}, {summary['settings']['data']}"


def _shown(value: float, metric: str) -> str:
    return f"{100 * value:.2f}" if metric == "accuracy" else f"{value:.4f}"


def write_predictions(file: Path, split: Any, logits: Tensor, task: Task) -> None:
    """One JSON object a row: the text, its label, the name of its domain and the student's logits, so that every figure can
    be checked."""
    file.parent.mkdir(exist_ok=True)
    with open(file, "w", encoding="utf-8") as f:
        for row, values in zip(split, logits.tolist(), strict=True):
            guess = values[0] if task.kind == "regression" else max(range(len(values)), key=values.__getitem__)
            if task.domains:
                row["domain"] = task.domains[row["domain"]]
            f.write(json.dumps(row | {"prediction": guess, "logits": values}, ensure_ascii=False) + "\n")


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
