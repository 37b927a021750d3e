"""Figures in the pages come from results, and results hold nothing that belongs to one machine."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import conftest, records, table
from bench.records import Recorder

ROOT = Path(__file__).parents[2]


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


def test_the_pages_tables_are_made_from_the_results():
    pages = {page.name: page.read_text() for page in table.PAGES}
    assert {name for name, text in pages.items() if "<!-- table: " in text} >= {"README.md", "performance.md"}
    for name, text in pages.items():
        assert table.update(text) == text, f"{name} is not what python -m bench.table writes"


def test_a_table_that_was_never_measured_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    text = "<!-- table: {} -->\n<!-- end -->"
    for subject in ("kernels", "steps", "time-machine"):
        assert "\nNot yet measured.\n" in table.update(text.format(subject))
    with pytest.raises(FileNotFoundError, match="sst2.json is missing"):
        table.update(text.format("sst2"))


# Results of another machine


def results(kind: str, name: str, **parts: int) -> dict:
    machine = {"hardware": {"device": "cuda", "name": name, "threads": 1}, "versions": {}}
    return {"kind": kind, "machines": [machine], "rows": [{"part": p, "n": n, "machine": 0} for p, n in parts.items()]}


def test_results_are_merged_by_part(monkeypatch, tmp_path, capsys):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    monkeypatch.setattr(table, "RESULTS", ours)
    for folder, found in ((ours, results("steps", "here", a=1, b=2)), (theirs, results("steps", "there", b=3, c=4)),
                          (theirs, results("kernels", "there", a=5))):  # fmt: skip
        folder.mkdir(exist_ok=True)
        (folder / f"{found['kind']}.json").write_text(json.dumps(found))
    (theirs / "summary.json").write_text("{}")
    assert table.merge(theirs) == ["kernels", "steps"]
    merged = records.read(ours / "steps.json")
    names = [m["hardware"]["name"] for m in merged["machines"]]
    assert [(r["part"], r["n"], names[r["machine"]]) for r in merged["rows"]] == [
        ("a", 1, "here"), ("b", 3, "there"), ("c", 4, "there"),
    ]  # fmt: skip
    assert merged["kind"] == "steps"
    assert records.read(ours / "kernels.json") == results("kernels", "there", a=5)
    assert {f.name for f in ours.iterdir()} == {"steps.json", "kernels.json"}
    assert table.merge(theirs) == ["kernels", "steps"] and records.read(ours / "steps.json") == merged  # once more
    with pytest.raises(FileNotFoundError, match="nothing holds no results; name the folder that make gpu-check wrote"):
        table.merge(tmp_path / "nothing")


def test_rows_are_written_one_by_one(monkeypatch, tmp_path):
    file = tmp_path / "new" / "steps.json"
    monkeypatch.setattr(records, "machine", lambda device: {"hardware": {"name": str(device)}, "versions": {}})
    record = Recorder("steps", file)
    record(part="a", n=1)
    assert [r["n"] for r in records.read(file)["rows"]] == [1]
    record(part="a", n=2)
    record(part="b", n=3, device="cuda")
    found = records.read(file)
    assert [(r["n"], found["machines"][r["machine"]]["hardware"]["name"]) for r in found["rows"]] == [
        (1, "cpu"), (2, "cpu"), (3, "cuda"),
    ]  # fmt: skip
    Recorder("steps", file)(part="a", n=4)  # of another run: the part is measured again
    assert [r["n"] for r in records.read(file)["rows"]] == [3, 4]
    kept = Recorder("steps", None)
    kept(part="a", n=5)
    assert kept.rows == [{"part": "a", "n": 5}] and [r["n"] for r in records.read(file)["rows"]] == [3, 4]


def test_miniatures_are_not_kept_among_the_results(tmp_path):
    def configure(**given):
        conftest.pytest_configure(SimpleNamespace(getoption=lambda name: given.get(name.strip("-"), False)))

    with pytest.raises(pytest.UsageError, match="--small measures nothing that is worth keeping"):
        configure(small=True, save=True, results=conftest.RESULTS)
    configure(small=True, save=True, results=tmp_path)
    configure(save=True, results=conftest.RESULTS)


# As shipped


def shipped(row: str, precision: str, speed: float, **more) -> dict:
    return {"part": "shipped", "row": row, "precision": precision, "examples_per_second": speed, "padding_waste": 0.2,
            "peak": 2**30, **more}  # fmt: skip


def test_claims_are_made_of_rows_of_one_run():
    rows = [shipped("published loop", "fp32", 5.5), shipped("finetune", "fp32", 100), shipped("finetune", "bf16", 200),
            shipped("kd, answers kept", "fp32", 95, answers_seconds=12.3), shipped("kd, answers kept", "bf16", 180, answers_seconds=6.1),
            shipped("metadistil", "fp32", 55), shipped("metadistil", "bf16", 121)]  # fmt: skip
    lines = table._shipped(rows).splitlines()
    assert lines[4] == "| published loop | fp32 | 5.5 | 20 % | 1.0 GiB |"
    assert lines[-1] == (
        "In this run kd, answers kept makes 0.95 (fp32) and 0.90 (bf16) times the examples/s of finetune; metadistil makes "
        "10.00 (fp32) and 22.00 (bf16) times the examples/s of published loop. The kept answers took 6 to 12 s, once."
    )
    assert "In this run" not in table._shipped([shipped("kd", "fp32", 100), shipped("metadistil", "fp32", 55)])
