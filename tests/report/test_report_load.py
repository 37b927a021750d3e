"""Directories of runs as they are found: whole, not finished, killed while writing, damaged, not there."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import UserError
from engine.report import pages
from engine.report.__main__ import main
from engine.report.load import read

ROOT = Path(__file__).parents[2]
GIVE = "give a directory that engine.train or engine.compare wrote"
pytestmark = pytest.mark.usefixtures("undrawn")


def refused(capsys, *words) -> str:
    assert main([str(word) for word in words]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1 and err.endswith(".\n"), err
    return err.removeprefix("error: ").rstrip("\n")


# What is no run


def test_what_is_not_there(run, tmp_path, capsys, monkeypatch):
    for words in ([], ["--verbose", "x"], ["x", "--output"]):
        assert refused(capsys, *words).endswith("; see python -m engine.report --help.")
    assert refused(capsys, tmp_path / "none") == f"{tmp_path / 'none'} does not exist; {GIVE}."
    said = f"{tmp_path} is no run, because it has neither summary.json nor config.yaml; {GIVE}."
    assert refused(capsys, tmp_path) == said
    file = run / "summary.json"
    assert refused(capsys, file) == f"{file} is a file; {GIVE}, such as {run}."

    def iterdir(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", iterdir)
    said = f"{run} cannot be read (Permission denied); make {run} readable, or give another directory."
    assert refused(capsys, run) == said


@pytest.mark.parametrize(("content", "says"), [
    (b'{"method": "kd",\n "seed": 0', "is damaged in line 2"), (b"", "is damaged in line 1"), (b"\xff\xfe{}", "is damaged"),
    (b"[1]", "holds no mapping"), (b"{}", "holds no mapping"), (b"[" * 100_000, "is damaged"),
    (b'{"teachers": 5}', "'teachers' is not what a run writes"), (b'{"teachers": ["bert"]}', "its teachers or phases"),
])  # fmt: skip
def test_a_damaged_summary(run, capsys, content, says):
    (run / "summary.json").write_bytes(content)
    said = refused(capsys, run)
    assert str(run / "summary.json") in said and says in said and "run it again" in said
    assert not (run / "report.html").exists()


def test_damaged_settings_of_a_run_that_is_not_finished(run, capsys):
    (run / "summary.json").unlink()
    for content in ("a: [", "- 1", "!!python/object:os.system {}", "\x00"):
        (run / "config.yaml").write_text(content)
        assert str(run / "config.yaml") in refused(capsys, run)


# metrics.jsonl


def test_what_a_killed_run_left_of_its_last_line_is_left_out_silently(run, capsys):
    file, whole = run / "metrics.jsonl", len(read(run).records)
    old = file.read_bytes()
    file.write_bytes(old + b'{"phase": "metadistil", "step": 61, "lo')
    assert main([str(run)]) == 0
    assert capsys.readouterr() == (f"Report: {run / 'report.html'}\n", "")
    assert len(read(run).records) == whole and read(run).problems == []
    file.write_bytes(old + b'{"phase": "metadistil", "step": 62}')  # whole, but for the end of the line
    assert read(run).records[-1]["step"] == 62 and read(run).problems == []


BROKEN = [b"garbage", b"\0\0\0", b"5", b'{"step": 1}', b'{"phase": 1, "step": 1}', b'{"phase": "a", "step": true}',
          b'{"phase": "a", "step": NaN}', b"\xff"]  # fmt: skip


def test_damage_in_the_middle_is_said_on_the_page_and_the_console(run, capsys):
    file = run / "metrics.jsonl"
    lines = file.read_bytes().splitlines()
    said = f"{file}, line 7: damaged, and left out of curves and sums."
    for line in BROKEN:
        file.write_bytes(b"\n".join([*lines[:6], line, *lines[6:]]) + b"\n")
        assert read(run).problems == [said] and len(read(run).records) == len(lines), line
    assert main([str(run)]) == 0
    assert capsys.readouterr().err == f"warning: {said}\n" and said in (run / "report.html").read_text()
    file.write_bytes(b"x\n" * 9)
    said = f"{file}, lines 1, 2, 3, 4, 5 and 4 more: damaged, and left out of curves and sums."
    assert read(run).problems == [said]


def test_values_that_are_no_finite_numbers_are_left_out_and_a_run_without_any_has_a_page(run, capsys):
    odd = ["NaN", "Infinity", '"text"', "null", "true", "[]", "1e999", "1" + "0" * 400, "0.5"]
    with open(run / "metrics.jsonl", "a") as f:
        f.writelines(f'{{"phase": "metadistil", "step": {n}, "odd": {value}}}\n' for n, value in enumerate(odd, 100))
    assert read(run).series("metadistil", "odd") == ([108], [0.5])
    assert pages.write([run], None)[1] == []
    (run / "metrics.jsonl").unlink()
    assert main([str(run)]) == 0
    assert "metrics.jsonl is missing, so there are no curves." in capsys.readouterr().err


# Nothing that a summary can hold ends in a traceback

WRONG = [None, 5, "<b>", [], {}, [5], {"a": 5}, -1e300]


def nodes(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, each in items:
        yield from nodes(each, (*path, key))


def changed(value, path, new):
    value = copy.deepcopy(value)
    *way, last = path
    at = value
    for key in way:
        at = at[key]
    if new is None and isinstance(at, dict):
        del at[last]
    else:
        at[last] = new
    return value


@pytest.mark.parametrize(("every", "most"), [(3, 25), pytest.param(1, 800, marks=pytest.mark.slow)])
def test_any_value_may_be_something_else(run, every, most):
    """Of every nth value, one of the wrong ones in turns; slowly all of them."""
    summary, made, refusals = json.loads((run / "summary.json").read_text()), 0, 0
    (run / "metrics.jsonl").write_text("".join((run / "metrics.jsonl").read_text().splitlines(keepends=True)[-3:]))
    for number, path in enumerate(p for p in nodes(summary) if p and p[0] != "settings"):
        for new in WRONG if every == 1 else [WRONG[number % 8]] * (number % every == 0):
            (run / "summary.json").write_text(json.dumps(changed(summary, path, new)))
            try:
                pages.write([run], None)
                made += 1
            except UserError as e:
                assert "summary.json is damaged" in str(e)
                refusals += 1
    assert made > most > refusals


# A process of its own


@pytest.mark.parametrize("words", ["--help", "RUN"])
def test_torch_is_not_imported_and_no_display_is_needed(run, words):
    script = """
import sys
from engine.report.__main__ import main
try:
    status = main(sys.argv[1:])
except SystemExit as end:
    status = end.code or 0
print(status, *sys.modules)
"""
    environment = {k: v for k, v in os.environ.items() if k != "DISPLAY"} | {"MPLBACKEND": "TkAgg"}
    command = [sys.executable, "-c", script, str(run) if words == "RUN" else words]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    status, *modules = done.stdout.splitlines()[-1].split()
    assert status == "0" and not {"torch", "transformers", "datasets", "tkinter", "matplotlib.pyplot"} & set(modules)
    assert ("matplotlib" in modules) == (words == "RUN")
