"""What stands beside the figures: exported models with their cards, and predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from torch import Tensor, nn

from engine.data.splits import Task
from engine.report.words import DEMONSTRATION


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
    facts = ModelCardData(library_name="transformers", pipeline_tag="text-classification",
                          tags=["knowledge-distillation", summary["method"]])  # fmt: skip
    return f"""---
{facts}
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
