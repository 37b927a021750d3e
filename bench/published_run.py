"""The published loop over a data set, as it comes: float32, every batch padded to 128 tokens. Prints one line of JSON.

python -m bench.published_run --student DIR --teacher DIR --data DIR [--steps 8]
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from bench.baselines.published_loop import Batch, PublishedLoop

LENGTH, BATCH = 128, 32
FIRST = 2  # steps that are not timed: memory is allocated, optimizer state made


def batches(folder: Path, tokenizer: Any, count: int) -> tuple[list[Batch], list[Batch], float]:
    """Training and quiz batches in the file's order, and the part of the training tokens that is padding."""
    train, quiz = (
        [_batch(rows, tokenizer) for rows in _rows(folder / f"{name}.tsv", count)] for name in ("train", "quiz")
    )
    real = sum(each["attention_mask"].sum().item() for each in train)
    return train, quiz, 1 - real / (len(train) * BATCH * LENGTH)


def _rows(file: Path, count: int) -> list[list[list[str]]]:
    lines = [line.split("\t") for line in file.read_text().splitlines()[1:]]
    found = [lines[i : i + BATCH] for i in range(0, len(lines) - BATCH + 1, BATCH)]
    return found[:count]


def _batch(rows: list[list[str]], tokenizer: Any) -> Batch:
    given = tokenizer(
        [text for text, _ in rows], padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
    )
    return {**given, "labels": torch.tensor([int(label) for _, label in rows])}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m bench.published_run")
    for name in ("student", "teacher", "data"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=8)
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    student, teacher = (
        AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
        for folder in (given.student, given.teacher)
    )
    train, quiz, padding = batches(given.data, AutoTokenizer.from_pretrained(given.student), given.steps + FIRST)
    loop = PublishedLoop(
        student, [teacher], lr=6e-5, teacher_lr=1e-5, pilot_lr=6e-5, temperature=5.0, alpha=0.5, length=LENGTH
    )
    for number, batch in enumerate(train):
        if number == FIRST:
            started = time.perf_counter()
        loop.step(batch, quiz[number % len(quiz)])
    seconds, steps = time.perf_counter() - started, len(train) - FIRST
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "examples_per_second": BATCH * steps / seconds, "seconds": seconds, "steps": steps, "padding_waste": padding,
        "peak": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(main()))
