"""Comparing from the command line: what is run, kept, gone on with, reported; what is refused."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from page_reader import table
from run_helpers import ROOT, SIZES, contents

from engine.compare import cells
from engine.compare.__main__ import main

FAKE = [sys.executable, str(Path(__file__).parents[1] / "fake_train.py")]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working directory, where cells are run by a stand-in."""
    monkeypatch.setattr(cells, "COMMAND", FAKE)
    monkeypatch.setattr(cells, "POLL", 0.01)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def compared(output: Path) -> dict:
    return json.loads((output / "comparison.json").read_text())


def starts(output: Path) -> dict[str, list[str]]:
    """How often each cell was started, by the beginning of its directory's name."""
    files = sorted((output / "cells").glob("*/starts"))
    return {file.parent.name.rsplit("-", 1)[0]: file.read_text().split() for file in files}


def grid(place: Path, *rows: str, seeds: int = 1) -> str:
    (place / "grid.yaml").write_text(f"title: t\nseeds: {seeds}\nrows: [{', '.join(f'{{{row}}}' for row in rows)}]\n")
    return "grid.yaml"


METHODS = ["--methods", "finetune,kd,metadistil", "--teachers", "bert,bert2", "--seeds", "2", "--output", "out"]


def test_methods_and_seeds_and_once_more(place, capsys):
    assert main(METHODS) == 0
    found, text = compared(place / "out"), (place / "out" / "table.md").read_text()
    assert [(row["name"], row["models"], len(row["cells"])) for row in found["rows"]] == [
        ("fine-tuned", "bert", 1), ("fine-tuned", "bert2", 1), ("finetune", "distilbert", 2),
        ("kd", "bert+bert2 -> distilbert", 2), ("metadistil", "bert+bert2 -> distilbert", 2),
    ]  # fmt: skip
    runs = starts(place / "out")
    assert len(runs) == 7 and all(times == ["started"] for times in runs.values())  # both teachers by one run
    for line in (
        "| method | teachers -> student | accuracy | parameters | smaller | time, s | examples/s | peak memory, GiB |",
        "| fine-tuned | bert2 | 91.00 | 300 |  | 7.00 |  |  |",
        "| finetune | distilbert | 80.05 ± 0.64 | 100 |  | 3.00 | 50.0 | 1.00 |",
        "| metadistil | bert+bert2 -> distilbert | 82.15 ± 1.91 | 100 | 3.00 x | 3.00 | 50.0 | 1.00 |",
        "| finetune | distilbert | kd, bert+bert2 -> distilbert | -1.10 ± 1.27 | 2 | no |",
        "| metadistil | bert+bert2 -> distilbert | kd, bert+bert2 -> distilbert | +1.00 ± 0.00 | 2 | yes |",
        "```bash\npython -m engine.compare " + " ".join(METHODS[:-2]) + "\n```\n",
    ):
        assert line in text
    out = " ".join(capsys.readouterr().out.split())
    assert "82.15 ± 1.91" in out and "rows were trained on 32 to 64 examples" in out
    assert (place / "out" / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "metadistil" in (place / "out" / "plot.svg").read_text()
    page = (place / "out" / "report.html").read_text()
    assert table(page, "figures")[3][0] == "finetune" and table(page, "differences")[1][3] == "-1.10 ± 1.27"
    before = contents(place / "out")
    assert main(METHODS) == 0
    assert contents(place / "out") == before
    assert capsys.readouterr().out.count(": finished before") == 8


def test_only_what_is_new_or_changed_runs(place, capsys):
    words, changed = ["--methods", "finetune", "--output", "out", "--seeds"], ["2", "--lr", "1e-4"]
    # the last one: where the cache is changes no result
    for more, runs in ((["1"], 1), (["2"], 2), (changed, 4), ([*changed, "--cache-dir", "c"], 4)):
        assert main([*words, *more]) == 0
        assert [file.read_text() for file in place.glob("out/cells/*/starts")] == ["started\n"] * runs
        assert [cell["seed"] for cell in compared(place / "out")["rows"][0]["cells"]] == list(range(int(more[0])))
        assert ("±" in (place / "out" / "table.md").read_text()) == (more[0] == "2")
    assert "trained on" not in capsys.readouterr().out


def test_cells_that_fail_are_reported_and_the_rest_is_kept(place, capsys):
    rows = (
        "name: good, method: kd",
        "name: refused, method: finetune, lr: 0.5",
        "name: killed, method: metadistil, lr: 0.25",
    )
    words = ["--config", grid(place, *rows, seeds=2), "--output", "out"]
    assert main(words) == 1
    found = compared(place / "out")
    assert [len(row["cells"]) for row in found["rows"]] == [2, 0, 0] and found["missing"] == 0
    errors = {entry["title"]: entry["error"] for entry in found["failed"]}
    assert errors["refused, distilbert, seed 1"] == "--lr is 0.5; it must be smaller."
    assert errors["killed, bert -> distilbert, seed 0"] == "killed by signal 9; it said nothing"
    out = " ".join(capsys.readouterr().out.split())
    assert "refused, distilbert, seed 0 failed: --lr is 0.5; it must be smaller." in out and "81.10" in out
    assert "- killed, bert -> distilbert, seed 1: killed by signal 9" in (place / "out" / "table.md").read_text()
    (damaged,) = (place / "out" / "cells").glob("good-*-seed-1-*/summary.json")
    damaged.write_text("{")
    assert main(words) == 1  # once more: what failed is tried again, what was killed goes on from where it was
    runs = starts(place / "out")
    assert runs["killed-bert-distilbert-seed-0"] == ["started", "resumed"]
    assert runs["good-bert-distilbert-seed-0"] == ["started"]
    errors = {entry["title"]: entry["error"] for entry in compared(place / "out")["failed"]}
    assert "is damaged; remove the directory" in errors["good, bert -> distilbert, seed 1"]
    assert "81.00 (n = 1)" in (place / "out" / "table.md").read_text()


def wait_until(there) -> None:
    deadline = time.monotonic() + 30
    while not there() and time.monotonic() < deadline:
        time.sleep(0.01)


def compare_and_send(words: list[str], place: Path, *signals: tuple[int, str]) -> int:
    """The status of a comparison that gets each signal when a cell has left the file of this name."""

    def send():
        for number, file in signals:
            wait_until(lambda file=file: list(place.glob(f"**/cells/*/{file}")))
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    status = main(words)
    thread.join()
    return status


WAITING = "name: good, method: kd", "name: waits, method: finetune, lr: 0.125", "name: later, method: metadistil"


def test_ctrl_c_hands_on_the_signal_keeps_what_is_there_and_says_how_to_go_on(place, capsys):
    words = ["--config", grid(place, *WAITING)]
    assert compare_and_send(words, place, (signal.SIGINT, "waiting")) == 128 + signal.SIGINT
    (folder,) = (place / "runs").iterdir()
    again = [*words, "--output", f"runs/{folder.name}"]  # its directory is named, which no flag had
    out = " ".join(capsys.readouterr().out.split())
    assert f"Continue with: python -m engine.compare {' '.join(again)}" in out and "81.00" in out
    found = compared(folder)
    assert [len(row["cells"]) for row in found["rows"]] == [1, 0, 0] and found["missing"] == 2 and not found["failed"]
    assert (folder / "plot.png").exists() and "2 runs have not been made yet" in (folder / "table.md").read_text()
    assert not (folder / ".lock").exists()
    assert main(again) == 0
    assert starts(folder) == {
        "good-bert-distilbert-seed-0": ["started"], "later-bert-distilbert-seed-0": ["started"],
        "waits-distilbert-seed-0": ["started", "resumed"],
    }  # fmt: skip


def test_a_second_signal_is_handed_on_as_well(place, capsys):
    words = ["--config", grid(place, WAITING[0], WAITING[1].replace("0.125", "0.0625")), "--output", "out"]
    status = compare_and_send(words, place, (signal.SIGINT, "waiting"), (signal.SIGTERM, "noted"))
    assert status == 128 + signal.SIGTERM
    assert "Continue with: python -m engine.compare --config grid.yaml --output out" in capsys.readouterr().out
    assert [len(row["cells"]) for row in compared(place / "out")["rows"]] == [1, 0]


# What is refused

REFUSED = [
    ("--methods foo", "--methods is 'foo'", "one of"),
    ("--methods ,", "--methods is empty", "finetune,kd"),
    ("--methods kd,kd", "two rows are 'kd, bert -> distilbert'", "another name"),
    ("--methods kd --teachers ,", "needs teachers"),
    ("--seeds 0", "--seeds is 0", "at least 1"),
    ("--seeds many", "--seeds is 'many'", "0,1,7"),
    ("--seeds 1,1", "seeds is [1, 1]", "once"),
    ("--seed 1", "--seed is not for a comparison", "--seeds"),
    ("--resume", "--resume is not for a comparison", "same command"),
    ("--scale tiny", "--scale", "tiny", "small"),
    ("--alpha 7", "--alpha is 7.0", "from 0.0 to 1.0"),
    ("--learning-rate 7", "--learning-rate is not a flag", "engine.compare --help"),
    ("stray", "'stray' belongs to no flag"),
    ("--against nothing", "against is 'nothing'", "no row is called"),
    ("--model bert", "--model is 'bert'", "NAME=PLACE"),
    ("--model brt=x", "--model brt is no model", "did you mean 'bert'"),
    ("--model bert=x --teachers roberta,bert2", "teacher 'bert2'", "name the others before it"),
    ("--rows mkd", "--rows is 'mkd'", "did you mean 'kd'"),
    ("--values x", "--values", "leave it out"),
    ("--config none.yaml", "--config none.yaml cannot be read", "existing YAML file"),
    ("--config grid.yaml --teachers x", "--teachers does not go with --config", "--model"),
    ("--config grid.yaml --against KD", "2 rows are called", "'KD, bert -> tinybert'"),
    ("--output grid.yaml", "--output grid.yaml is a file", "directory"),
    ("--output used", "--output used holds files that are not a comparison's", "another directory"),
]  # fmt: skip


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case[0])
def test_what_does_not_fit_is_refused_in_a_sentence(place, capsys, case):
    words, *parts = case
    grid(place, *(f"name: KD, method: kd, teachers: bert, student: {name}" for name in ("distilbert", "tinybert")))
    (place / "used").mkdir()
    (place / "used" / "thesis.txt").write_text("do not touch")
    before = contents(place)
    assert main(["--output", "out", *words.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and len(error) < 500, error
    for part in parts:
        assert part in error, f"{part!r} is not in: {error}"
    assert contents(place) == before


def test_a_missing_plotting_library_is_known_before_anything_runs(place, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(METHODS) == 2
    said = "error: the plot needs matplotlib, which is not installed; pip install matplotlib.\n"
    assert capsys.readouterr().err == said and not (place / "out").exists()


def test_help_needs_no_torch_and_names_the_flags():
    script = "import sys\nfrom engine.compare.__main__ import main\ntry: main(['--help'])\nexcept SystemExit: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True)
    assert "--methods" in done.stdout and "--scale" in done.stdout
    assert not {"torch", "transformers", "matplotlib", "numpy"} & set(done.stdout.splitlines()[-1].split())


# The whole thing


@pytest.mark.slow
def test_two_methods_two_seeds_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("METADISTIL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    given = SIZES | {"source": "embedded", "max-steps": 4, "methods": "kd,metadistil", "seeds": 2, "output": "out"}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    assert main(words) == 0, capsys.readouterr().out
    found = compared(tmp_path / "out")
    assert [len(row["cells"]) for row in found["rows"]] == [1, 2, 2] and found["sources"] == ["embedded"]
    logs = "".join(log.read_text() for log in (tmp_path / "out" / "cells").glob("*.log"))
    assert "prepare bert: step" in logs and logs.count("Teacher bert: reused") == 4  # prepared by the first run only
    assert str(tmp_path) not in json.dumps(found)
    assert "EMBEDDED DEMONSTRATION" in (tmp_path / "out" / "table.md").read_text()
    assert main(words) == 0
