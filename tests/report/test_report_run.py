"""Runs and comparisons leave their page when they end."""

import subprocess
import sys
from pathlib import Path

import pytest
from run_helpers import succeed, summary
from test_report_page import Reader, table

from engine.compare import cells
from engine.compare.__main__ import main as compare
from engine.errors import UserError
from engine.report import pages


def test_a_run_leaves_its_page(finished, tmp_path):
    text = (finished / "report.html").read_text()
    file, problems = pages.write([finished], tmp_path / "again.html")
    assert file.read_text() == text and problems == []
    read = Reader(text)
    assert read.said("h1") == ["distilbert from bert and roberta by MetaDistil"]
    assert "This is the embedded demonstration" in text
    assert [row[0] for row in table(text, "phases")[1:]] == ["prepare bert", "prepare roberta", "metadistil"]


def test_the_commit_is_that_of_the_checkout(finished):
    root = Path(__file__).parents[2]
    known = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if known.returncode:
        pytest.skip("this is no checkout of git")
    assert summary(finished)["git_commit"].partition("+")[0] == known.stdout.strip()
    assert known.stdout[:12] in (finished / "report.html").read_text()


def test_a_page_that_cannot_be_written_leaves_the_run_finished(data, cache, tmp_path, monkeypatch, capsys):
    def write(given, output):
        raise UserError("there is no room.")

    monkeypatch.setattr(pages, "write", write)
    run = succeed(data, tmp_path / "run", method="finetune")
    assert (run / "summary.json").exists() and not (run / "report.html").exists()
    assert "warning: there is no room." in capsys.readouterr().out


def test_a_comparison_leaves_its_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cells, "COMMAND", [sys.executable, str(Path(__file__).parents[1] / "fake_train.py")])
    monkeypatch.setattr(cells, "POLL", 0.01)
    monkeypatch.chdir(tmp_path)
    assert compare(["--methods", "finetune,kd", "--seeds", "2", "--output", "out"]) == 0
    text = (tmp_path / "out" / "report.html").read_text()
    assert table(text, "figures")[2][0] == "finetune" and table(text, "differences")[1][3] == "-1.05 ± 0.64"
    assert "report.html" in capsys.readouterr().out.splitlines()[-1]
    cell = next(path for path in (tmp_path / "out" / "cells").iterdir() if path.is_dir())
    assert pages.write([cell], None)[0].exists()  # a summary that holds few keys
