"""The whole job from a hub: one on this machine that answers as the real one does; then again from its cache alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_hub import FakeHub

from engine.embedded import build, generate

ROOT = Path(__file__).parents[2]
CARD = """---
configs:
- config_name: sst2
  data_files:
  - {split: train, path: sst2/train-*}
  - {split: validation, path: sst2/validation-*}
  - {split: test, path: sst2/test-*}
dataset_info:
- config_name: sst2
  features:
  - {name: sentence, dtype: string}
  - name: label
    dtype: {class_label: {names: {'0': negative, '1': positive}}}
---
"""


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    root, rows = tmp_path_factory.mktemp("hub"), generate(400, 0)
    found = {"datasets/nyu-mll/glue": root / "glue"}
    for alias, repo in {
        "bert": "google-bert/bert-base-uncased",
        "distilbert": "distilbert/distilbert-base-uncased",
    }.items():
        module, tokenizer = build(alias, [text for text, _ in rows], 2, 0)
        found[f"models/{repo}"] = root / alias
        module.base_model.save_pretrained(root / alias)  # no head, like the published encoders
        tokenizer.save_pretrained(root / alias)
    (root / "glue" / "sst2").mkdir(parents=True)
    (root / "glue" / "README.md").write_text(CARD)
    parts = {"train": rows[:300], "validation": rows[300:350], "test": [(text, -1) for text, _ in rows[350:]]}
    for part, part_rows in parts.items():
        table = pa.table({"sentence": [text for text, _ in part_rows], "label": [label for _, label in part_rows]})
        pq.write_table(table, root / "glue" / "sst2" / f"{part}-00000-of-00001.parquet")
    return found


@pytest.mark.slow
def test_models_and_data_from_the_hub_then_from_its_cache(repositories, tmp_path):
    environment = os.environ | {
        "HF_HOME": str(tmp_path / "home"), "METADISTIL_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1",
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip

    def run(output: str, **more: str) -> dict:
        command = [sys.executable, "-m", "engine.train", "--source", "hub", "--teachers", "bert,bert2", "--student",
                   "distilbert", "--epochs", "1", "--prepare-epochs", "1", "--output", str(tmp_path / output)]  # fmt: skip
        done = subprocess.run(
            command, cwd=ROOT, env=environment | more, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads((tmp_path / output / "summary.json").read_text())

    with FakeHub(repositories) as hub:
        first = run("first", HF_ENDPOINT=hub.endpoint)
        assert not hub.unknown
        assert hub.calls.count("HEAD /") == 1  # the hub is asked once
        assert not any(".bin" in call or "glue.py" in call for call in hub.calls if call.startswith("GET"))
    assert first["source"] == "hub" and first["task"]["labels"] == ["negative", "positive"]
    assert any("has no labels" in note for note in first["notes"])
    assert [teacher["source"] for teacher in first["teachers"]] == ["google-bert/bert-base-uncased"] * 2
    second = run("second", HF_HUB_OFFLINE="1")
    assert second["metrics"] == first["metrics"] and second["source"] == "hub"
    assert [teacher["origin"] for teacher in second["teachers"]] == ["reused"] * 2
