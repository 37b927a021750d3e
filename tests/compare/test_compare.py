"""Comparing from the command line: what is run, kept, gone on with, reported; what is refused."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
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


def grid(place: Path, text: str) -> str:
    (place / "grid.yaml").write_text(text)
    return "grid.yaml"


METHODS = ["--methods", "finetune,kd,metadistil", "--teachers", "bert,bert2", "--seeds", "3", "--output", "out"]


def test_methods_and_seeds(place, capsys):
    assert main(METHODS) == 0
    found = compared(place / "out")
    assert [(row["name"], row["models"], len(row["cells"])) for row in found["rows"]] == [
        ("fine-tuned", "bert", 1), ("fine-tuned", "bert2", 1), ("finetune", "distilbert", 3),
        ("kd", "bert+bert2 -> distilbert", 3), ("metadistil", "bert+bert2 -> distilbert", 3),
    ]  # fmt: skip
    runs = starts(place / "out")
    assert len(runs) == 10 and all(times == ["started"] for times in runs.values())  # both teachers by one run
    lines = (place / "out" / "table.md").read_text().splitlines()
    assert (
        lines[2]
        == "| method | teachers -> student | accuracy | parameters | smaller | time | examples/s | peak memory |"
    )
    assert lines[4:9] == [
        "| fine-tuned | bert | 90.00 | 300 |  | 7 s |  |  |",
        "| fine-tuned | bert2 | 91.00 | 300 |  | 7 s |  |  |",
        "| finetune | distilbert | 80.10 ± 0.25 | 100 |  | 3 s | 50 | 1.0 GiB |",
        "| kd | bert+bert2 -> distilbert | 81.30 ± 0.75 | 100 | 3.00 x | 3 s | 50 | 1.0 GiB |",
        "| metadistil | bert+bert2 -> distilbert | 82.30 ± 0.75 | 100 | 3.00 x | 3 s | 50 | 1.0 GiB |",
    ]
    assert lines[-3:] == ["```bash", "python -m engine.compare " + " ".join(METHODS[:-2]), "```"]
    assert lines[-6:-4] == [
        "| finetune | distilbert | kd, bert+bert2 -> distilbert | -1.20 ± 0.50 | 3 | yes |",
        "| metadistil | bert+bert2 -> distilbert | kd, bert+bert2 -> distilbert | +1.00 ± 0.00 | 3 | yes |",
    ]
    out = capsys.readouterr().out
    assert "81.30 ± 0.75" in out and "Teachers are prepared once" in out and "compared with" in out
    assert all((place / "out" / name).stat().st_size > 1000 for name in ("plot.svg", "plot.png"))
    assert (place / "out" / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "metadistil" in (place / "out" / "plot.svg").read_text()


def test_one_seed_has_no_interval(place):
    assert main(["--methods", "finetune,kd", "--output", "out"]) == 0
    found = compared(place / "out")
    assert [row["all"]["interval"] for row in found["rows"]] == [None] * 3
    text = (place / "out" / "table.md").read_text()
    assert "±" not in text and "-1.00 | 1 | one seed |" in text


def test_a_second_time_nothing_runs_and_the_results_are_the_same(place, capsys):
    assert main(METHODS) == 0
    before = contents(place / "out")
    assert main(METHODS) == 0
    assert contents(place / "out") == before
    assert capsys.readouterr().out.count(": finished before") >= 10


def test_more_seeds_run_only_what_is_new_and_a_changed_setting_runs_anew(place):
    assert main(["--methods", "finetune", "--seeds", "2", "--output", "out"]) == 0
    assert main(["--methods", "finetune", "--seeds", "3", "--output", "out"]) == 0
    assert list(starts(place / "out").values()) == [["started"]] * 3
    assert main(["--methods", "finetune", "--seeds", "3", "--output", "out", "--lr", "1e-4"]) == 0
    assert len(list((place / "out" / "cells").glob("*/starts"))) == 6
    assert [c["seed"] for c in compared(place / "out")["rows"][0]["cells"]] == [0, 1, 2]
    assert main(["--methods", "finetune", "--seeds", "3", "--output", "out", "--lr", "1e-4", "--cache-dir", "c"]) == 0
    assert len(list((place / "out" / "cells").glob("*/starts"))) == 6  # where the cache is changes no result


FAILING = """
title: some fail
seeds: 2
rows:
  - {name: good, method: kd}
  - {name: refused, method: finetune, lr: 0.5}
  - {name: killed, method: metadistil, lr: 0.25}
"""


def test_cells_that_fail_are_reported_and_the_rest_is_kept(place, capsys):
    words = ["--config", grid(place, FAILING), "--output", "out"]
    assert main(words) == 1
    found = compared(place / "out")
    assert [len(row["cells"]) for row in found["rows"]] == [2, 0, 0] and found["missing"] == 0
    errors = {entry["title"]: entry["error"] for entry in found["failed"]}
    assert errors["refused, distilbert, seed 1"] == "--lr is 0.5; it must be smaller."
    assert errors["killed, bert -> distilbert, seed 0"] == "killed by signal 9; it said nothing"
    out = " ".join(capsys.readouterr().out.split())
    assert "refused, distilbert, seed 0 failed: --lr is 0.5; it must be smaller." in out and "81.10" in out
    assert "- killed, bert -> distilbert, seed 1: killed by signal 9" in (place / "out" / "table.md").read_text()
    assert main(words) == 1  # once more: what failed is tried again, what was killed goes on from where it was
    runs = starts(place / "out")
    assert runs["killed-bert-distilbert-seed-0"] == ["started", "resumed"]
    assert runs["good-bert-distilbert-seed-0"] == ["started"]


def test_a_row_that_lacks_a_seed_says_so(place):
    text = "title: t\nseeds: 2\nrows:\n  - {name: a, method: kd}\n"
    assert main(["--config", grid(place, text), "--output", "out"]) == 0
    (run,) = (place / "out" / "cells").glob("a-*-seed-1-*/summary.json")
    run.write_text("{")
    assert main(["--config", "grid.yaml", "--output", "out"]) == 1
    found = compared(place / "out")
    assert "is damaged; remove the directory" in found["failed"][0]["error"]
    assert "81.00 (n = 1)" in (place / "out" / "table.md").read_text()


def test_rows_of_unequal_training_sets_are_pointed_out(place, capsys):
    assert main(["--methods", "kd", "--output", "out"]) == 0
    assert "trained on" not in capsys.readouterr().out
    assert main(["--methods", "finetune,kd", "--output", "out", "--teachers", "bert,bert2"]) == 0
    assert "rows were trained on 32 to 64 examples" in " ".join(capsys.readouterr().out.split())


WAITING = """
title: t
rows:
  - {name: good, method: kd}
  - {name: waits, method: finetune, lr: 0.125}
  - {name: later, method: metadistil}
"""


def wait_until(there) -> None:
    deadline = time.monotonic() + 30
    while not there() and time.monotonic() < deadline:
        time.sleep(0.01)


def interrupt_when_it_waits(folder: Path, *numbers: int) -> threading.Thread:
    def send():
        wait_until(lambda: list(folder.glob("cells/*/waiting")))
        for number in numbers:
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def test_ctrl_c_hands_on_the_signal_keeps_what_is_there_and_says_how_to_go_on(place, capsys):
    words = ["--config", grid(place, WAITING), "--output", "out"]
    thread = interrupt_when_it_waits(place / "out", signal.SIGINT)
    assert main(words) == 128 + signal.SIGINT
    thread.join()
    out = " ".join(capsys.readouterr().out.split())
    assert "Continue with: python -m engine.compare --config grid.yaml --output out" in out
    assert "81.00" in out
    found = compared(place / "out")
    assert [len(row["cells"]) for row in found["rows"]] == [1, 0, 0] and found["missing"] == 2 and not found["failed"]
    assert (place / "out" / "plot.png").exists() and "2 runs have not been made yet" in (
        place / "out" / "table.md"
    ).read_text()
    assert not (place / "out" / ".lock").exists()
    assert main(words) == 0
    assert starts(place / "out") == {
        "good-bert-distilbert-seed-0": ["started"], "later-bert-distilbert-seed-0": ["started"],
        "waits-distilbert-seed-0": ["started", "resumed"],
    }  # fmt: skip


def test_a_second_signal_is_handed_on_as_well(place, capsys):
    words = ["--config", grid(place, WAITING.replace("0.125", "0.0625")), "--output", "out"]

    def send():
        interrupt_when_it_waits(place / "out", signal.SIGINT).join()
        wait_until(lambda: list(place.glob("out/cells/*/noted")))
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=send)
    thread.start()
    assert main(words) == 128 + signal.SIGTERM
    thread.join()
    assert "Continue with: " in capsys.readouterr().out
    assert [len(row["cells"]) for row in compared(place / "out")["rows"]] == [1, 0, 0]


def test_a_comparison_without_output_names_its_directory_when_it_is_stopped(place, capsys):
    words = ["--config", grid(place, WAITING)]
    thread = threading.Thread(target=lambda: interrupt_when_it_waits(next_run(place), signal.SIGINT).join())
    thread.start()
    assert main(words) == 130
    thread.join()
    (run,) = (place / "runs").iterdir()
    assert (
        f"Continue with: python -m engine.compare --config grid.yaml --output runs/{run.name}"
        in capsys.readouterr().out
    )


def next_run(place: Path) -> Path:
    wait_until(lambda: list(place.glob("runs/*")))
    return next(place.glob("runs/*"))


# What is refused

GRID = """
title: t
settings: {source: embedded}
rows:
  - {name: KD, method: kd, teachers: bert, student: distilbert}
  - {name: KD, method: kd, teachers: bert, student: tinybert}
"""
REFUSED = [
    (["--methods", "foo"], "--method is 'foo'", "one of"),
    (["--methods", ","], "--methods is empty", "finetune,kd"),
    (["--methods", "kd,kd"], "two rows are 'kd, bert -> distilbert'", "another name"),
    (["--methods", "kd", "--teachers", ","], "needs teachers"),
    (["--seeds", "0"], "--seeds is 0", "at least 1"),
    (["--seeds=-2"], "--seeds is -2", "at least 1"),
    (["--seeds", "many"], "--seeds is 'many'", "0,1,7"),
    (["--seeds", "1,1"], "seeds is [1, 1]", "once"),
    (["--seed", "1"], "--seed is not for a comparison", "--seeds"),
    (["--method", "kd"], "--method is not for a comparison", "--methods"),
    (["--resume"], "--resume is not for a comparison", "same command"),
    (["--scale", "tiny"], "--scale", "tiny", "small"),
    (["--alpha", "7"], "--alpha is 7.0", "from 0.0 to 1.0"),
    (["--learning-rate", "7"], "--learning-rate is not a flag"),
    (["stray"], "'stray' belongs to no flag"),
    (["--against", "nothing"], "against is 'nothing'", "no row is called"),
    (["--model", "bert"], "--model is 'bert'", "NAME=PLACE"),
    (["--model", "brt=x"], "--model brt is no model", "did you mean 'bert'"),
    (["--model", "bert=x", "--teachers", "roberta,bert2"], "teacher 'bert2'", "name the others before it"),
    (["--data", "foo=x"], "--data foo=x names no data set", "sst2"),
    (["--rows", "mkd"], "--rows is 'mkd'", "did you mean 'kd'"),
    (["--values", "x"], "--values", "leave it out"),
    (["--config", "none.yaml"], "--config none.yaml cannot be read", "existing YAML file"),
    (["--config", "grid.yaml", "--teachers", "x"], "--teachers does not go with --config", "--model"),
    (["--config", "grid.yaml", "--methods", "x"], "--methods does not go with --config", "--rows"),
    (["--config", "grid.yaml", "--against", "KD"], "2 rows are called", "'KD, bert -> tinybert'"),
    (["--output", "grid.yaml"], "--output grid.yaml is a file", "directory"),
    (["--output", "used"], "--output used is in use by something else", "another directory"),
]  # fmt: skip


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: " ".join(case[0]))
def test_what_does_not_fit_is_refused_in_a_sentence(place, capsys, case):
    words, *parts = case
    grid(place, GRID)
    (place / "used").mkdir()
    (place / "used" / "thesis.txt").write_text("do not touch")
    before = contents(place)
    assert main(["--output", "out", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "Traceback" not in error and len(error) < 500, (
        error
    )
    for part in parts:
        assert part in error, f"{part!r} is not in: {error}"
    assert contents(place) == before


def test_a_missing_plotting_library_is_known_before_anything_runs(place, capsys, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(METHODS) == 2
    assert (
        capsys.readouterr().err == "error: the plot needs matplotlib, which is not installed; pip install matplotlib.\n"
    )
    assert not (place / "out").exists()


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
    sizes = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]
    words = [
        "--methods",
        "kd,metadistil",
        "--seeds",
        "2",
        "--source",
        "embedded",
        "--max-steps",
        "4",
        *sizes,
        "--output",
        "out",
    ]
    assert main(words) == 0, capsys.readouterr().out
    found = compared(tmp_path / "out")
    assert [len(row["cells"]) for row in found["rows"]] == [1, 2, 2] and found["sources"] == ["embedded"]
    logs = "".join(log.read_text() for log in (tmp_path / "out" / "cells").glob("*.log"))
    assert (
        logs.count("prepare bert: step") > 0 and logs.count("Teacher bert: reused") == 4
    )  # prepared by the first run only
    assert str(tmp_path) not in json.dumps(found)
    assert "EMBEDDED DEMONSTRATION" in (tmp_path / "out" / "table.md").read_text()
    assert main(words) == 0
