"""Runs leave their page when they end; that comparisons do, tests/compare/test_compare.py looks at."""

import subprocess

import pytest
from page_reader import Reader, table
from run_helpers import ROOT, succeed, summary

from engine.errors import UserError
from engine.report import pages


def test_a_run_leaves_its_page(finished, tmp_path):
    text = (finished / "report.html").read_text()
    file, problems = pages.write([finished], tmp_path / "again.html")
    assert file.read_text() == text and problems == []
    assert Reader(text).said("h1") == ["distilbert from bert and roberta by MetaDistil"]
    assert "This is the embedded demonstration" in text
    assert [row[0] for row in table(text, "phases")[1:]] == ["prepare bert", "prepare roberta", "metadistil"]
    card = (finished / "student" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "\n- metadistil\n" in card.split("---")[1]


def test_the_commit_is_that_of_the_checkout(finished):
    known = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if known.returncode:
        pytest.skip("this is no checkout of git")
    assert summary(finished)["git_commit"].partition("+")[0] == known.stdout.strip()
    assert known.stdout[:12] in (finished / "report.html").read_text()


def test_a_page_that_cannot_be_written_leaves_the_run_finished(data, cache, tmp_path, monkeypatch, capsys):
    def write(given, output):
        raise UserError("there is no room.")

    monkeypatch.setattr(pages, "write", write)
    run = succeed(data, tmp_path / "run", method="finetune", page=True)
    assert (run / "summary.json").exists() and not (run / "report.html").exists()
    assert "warning: there is no room." in capsys.readouterr().out
