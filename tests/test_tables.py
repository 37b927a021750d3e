"""Figures in the README come from results, and results hold nothing that belongs to one machine."""

import json
from pathlib import Path

from bench import table

ROOT = Path(__file__).parents[1]


def run(method: str, seed: int, accuracy: float, teachers: int) -> dict:
    metrics = {split: {"accuracy": accuracy} for split in ("validation", "test")}
    teacher = {"name": "t", "source": "/somewhere", "sample": 0, "origin": "fine-tuned", "parameters": 30,
               "metrics": metrics, "prepared": {"validation": {"accuracy": 0.9}, "seconds": 7.0}}  # fmt: skip
    return {
        "method": method, "seed": seed, "teachers": [teacher] * teachers, "times_smaller": 3.0 if teachers else None,
        "student": {"name": "s", "source": "/somewhere", "parameters": 10, "metrics": metrics, "best_step": 1},
        "phases": {method: {"seconds": 10.0, "steps": 1, "examples_per_second": 5.0}}, "seconds": 20.0,
        "sizes": {"train": 1000, "quiz": 100, "validation": 872, "test": 2000}, "padding_waste": 0.1,
        "peak_memory": {"host": 2**30}, "device": {"device": "cpu", "name": "a processor", "threads": 1},
        "git_commit": "abcdef0123", "versions": {"torch": "1", "transformers": "2", "python": "3"},
        "settings": {"teachers": "/somewhere", "student": "/s", "data": "/d", "output": "/o", "cache_dir": None, "lr": 1.0},
    }  # fmt: skip


def test_collect_and_render(tmp_path):
    for i, summary in enumerate([run("kd", 0, 0.80, 1), run("kd", 1, 0.82, 1), run("finetune", 0, 0.7, 0)]):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "summary.json").write_text(json.dumps(summary))
    results = table.collect([str(tmp_path / str(i)) for i in range(3)])
    assert "/" not in json.dumps(results)
    lines = table.render(results).splitlines()
    assert lines[2] == "| kd | 1 | 81.00 | 81.00 ± 1.41 | 81.00 ± 1.41 | 10 | 3.00 | 5 (5-5) | 10 (10-10) s | 1.0 GiB |"
    assert lines[3] == "| finetune | 0 |  | 70.00 | 70.00 | 10 |  | 5 | 10 s | 1.0 GiB |"


def test_the_readmes_tables_are_made_from_the_results():
    text = (ROOT / "README.md").read_text()
    assert "<!-- table: " in text and table.update(text) == text
