"""Directories of runs as they are found: whole, not finished, killed while writing, damaged, not there."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from report_helpers import make_run

from engine.errors import UserError
from engine.report import curves, pages
from engine.report.__main__ import main
from engine.report.load import read

ROOT = Path(__file__).parents[2]
GIVE = "give a directory that engine.train or engine.compare wrote"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("made") / "run", steps=60)


@pytest.fixture
def run(made, tmp_path):
    """A copy that a test may damage."""
    folder = tmp_path / "run"
    folder.mkdir()
    for file in made.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def undrawn(monkeypatch):
    """Drawing has its own tests, and takes its time."""
    monkeypatch.setattr(curves, "chart", lambda *_, **__: None)


def refused(capsys, *words) -> str:
    assert main([str(word) for word in words]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("error: ") and err.count("\n") == 1 and err.rstrip().endswith("."), err
    return err.removeprefix("error: ").rstrip("\n")


# What is no run


def test_what_is_not_there(tmp_path, capsys):
    assert refused(capsys, tmp_path / "none") == f"{tmp_path / 'none'} does not exist; {GIVE}."
    assert refused(capsys, tmp_path) == f"{tmp_path} is no run: it has neither summary.json nor config.yaml; {GIVE}."


def test_a_file_instead_of_its_directory(run, capsys):
    file = run / "summary.json"
    assert refused(capsys, file) == f"{file} is a file; {GIVE}, such as {run}."


@pytest.mark.parametrize("words", [[], ["--verbose", "x"], ["x", "--output"]])
def test_a_wrong_command_line(words, capsys):
    assert refused(capsys, *words).endswith("; see python -m engine.report --help.")


def test_a_directory_that_may_not_be_read(run, capsys, monkeypatch):
    def iterdir(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert (
        refused(capsys, run)
        == f"{run} cannot be read (Permission denied); make {run} readable, or give another directory."
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(run, capsys):
    (run / "metrics.jsonl").chmod(0)
    assert "metrics.jsonl cannot be read (Permission denied)" in refused(capsys, run)


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


@pytest.mark.parametrize("content", ["a: [", "- 1", "!!python/object:os.system {}", "\x00"])
def test_damaged_settings_of_a_run_that_is_not_finished(run, capsys, content):
    (run / "summary.json").unlink()
    (run / "config.yaml").write_text(content)
    assert str(run / "config.yaml") in refused(capsys, run)


# metrics.jsonl


def test_a_truncated_last_line_is_left_out_silently(run, capsys):
    file = run / "metrics.jsonl"
    whole = len(read(run).records)
    with open(file, "ab") as f:
        f.write(b'{"phase": "metadistil", "step": 61, "lo')
    assert main([str(run)]) == 0
    out, err = capsys.readouterr()
    assert err == "" and out == f"Report: {run / 'report.html'}\n"
    found = read(run)
    assert len(found.records) == whole and found.problems == []


def test_a_whole_last_line_without_its_end_is_kept(run):
    file = run / "metrics.jsonl"
    file.write_bytes(file.read_bytes() + b'{"phase": "metadistil", "step": 62}')
    assert read(run).records[-1]["step"] == 62 and read(run).problems == []


@pytest.mark.parametrize("line", [b"garbage", b"\0\0\0", b"5", b'{"step": 1}', b'{"phase": 1, "step": 1}', b'{"phase": "a", "step": true}',
                                  b'{"phase": "a", "step": NaN}', b"\xff"])  # fmt: skip
@pytest.mark.usefixtures("undrawn")
def test_damage_in_the_middle_is_said_on_the_page_and_the_console(run, capsys, line):
    lines = (run / "metrics.jsonl").read_bytes().splitlines()
    (run / "metrics.jsonl").write_bytes(b"\n".join([*lines[:6], line, *lines[6:]]) + b"\n")
    assert main([str(run)]) == 0
    out, err = capsys.readouterr()
    assert err == f"warning: {run / 'metrics.jsonl'}, line 7: damaged, and left out of curves and sums.\n"
    assert f"{run / 'metrics.jsonl'}, line 7: damaged" in (run / "report.html").read_text()
    assert len(read(run).records) == len(lines)


def test_many_damaged_lines_are_one_remark(run):
    (run / "metrics.jsonl").write_text("x\n" * 9)
    assert read(run).problems == [
        f"{run / 'metrics.jsonl'}, lines 1, 2, 3, 4, 5 and 4 more: damaged, and left out of curves and sums."
    ]


def test_a_run_without_metrics_has_a_page_that_says_so(run, capsys):
    (run / "metrics.jsonl").unlink()
    assert main([str(run)]) == 0
    assert "metrics.jsonl is missing: there are no curves." in capsys.readouterr().err
    assert "<figure" not in (run / "report.html").read_text()


def test_values_that_are_no_finite_numbers_are_left_out(run):
    with open(run / "metrics.jsonl", "a") as f:
        for step, value in enumerate(
            ["NaN", "Infinity", '"text"', "null", "true", "[]", "1e999", "1" + "0" * 400, "0.5"], 100
        ):
            f.write(f'{{"phase": "metadistil", "step": {step}, "odd": {value}}}\n')
    assert read(run).series("metadistil", "odd") == ([108], [0.5])
    assert pages.write([run], None)[1] == []


# Nothing that a summary or a record can hold ends in a traceback


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


WRONG = [None, 5, "<b>", [], {}, [5], {"a": 5}, -1e300]


def damaged_summaries(run, values) -> tuple[int, int]:
    """How many changed summaries had a page, and how many were refused; `values(n)` are what the nth node is changed to."""
    summary = json.loads((run / "summary.json").read_text())
    (run / "metrics.jsonl").write_text("".join((run / "metrics.jsonl").read_text().splitlines(keepends=True)[-3:]))
    counted = [0, 0]
    for number, path in enumerate(p for p in nodes(summary) if p and p[0] != "settings"):
        for new in values(number):
            (run / "summary.json").write_text(json.dumps(changed(summary, path, new)))
            try:
                pages.write([run], None)
                counted[0] += 1
            except UserError as e:
                assert "summary.json is damaged" in str(e)
                counted[1] += 1
    return tuple(counted)


@pytest.mark.usefixtures("undrawn")
def test_any_value_may_be_something_else(run):
    made, refusals = damaged_summaries(run, lambda number: [WRONG[number % 8]] if number % 3 == 0 else [])
    assert made > 25 > refusals


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_any_value_may_be_anything_else(run):
    made, refusals = damaged_summaries(run, lambda number: WRONG)
    assert made > 800 > refusals


# A process of its own


@pytest.mark.parametrize(("words", "status"), [(["--help"], 0), (["none"], 2), (["RUN"], 0)])
def test_torch_is_not_imported_and_no_display_is_needed(run, words, status):
    script = """
import sys
from engine.report.__main__ import main
try:
    status = main(sys.argv[1:])
except SystemExit as end:
    status = end.code or 0
print(status, *sys.modules)
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "MPLBACKEND")} | {"MPLBACKEND": "TkAgg"}
    command = [sys.executable, "-c", script, *(str(run) if word == "RUN" else word for word in words)]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    answered, *modules = done.stdout.splitlines()[-1].split()
    assert int(answered) == status
    assert not {"torch", "transformers", "datasets", "tkinter", "matplotlib.pyplot"} & set(modules)
    assert ("matplotlib" in modules) == (words == ["RUN"]) or words == ["none"]
