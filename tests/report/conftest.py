"""What tests of pages share: a whole run, its page, and a comparison."""

import json
import shutil
from pathlib import Path

import pytest
from compare_helpers import grid
from report_helpers import make_run, page_of
from run_helpers import summary as summary_of

from engine.compare.result import collect
from engine.report import curves

ROWS = [{"name": "KD", "method": "kd", "teachers": "bert,roberta", "student": "distilbert"},
        {"name": "MD", "method": "metadistil", "teachers": "bert,roberta", "student": "distilbert", "published": 93.5}]  # fmt: skip


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A finished run on a GPU, with all that telemetry records."""
    return make_run(tmp_path_factory.mktemp("runs") / "gpu", steps=300)


@pytest.fixture(scope="session")
def page(folder):
    return page_of(folder)


@pytest.fixture(scope="session")
def short(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("short") / "run", steps=60)


@pytest.fixture
def run(short, tmp_path):
    """A run that a test may damage."""
    return Path(shutil.copytree(short, tmp_path / "run"))


@pytest.fixture(scope="session")
def comparison(tmp_path_factory):
    """Two rows of two seeds, as engine.compare leaves them; one cell failed."""
    folder = tmp_path_factory.mktemp("comparisons") / "compared"
    made = grid(title="A title", note="A note.", seeds=2, rows=ROWS)
    *cells, broken = made.cells()
    done = []
    for number, cell in enumerate(cells):
        run = make_run(folder / "cells" / cell.name, steps=60, seed=cell.seed, config={"temperature": 4.0 + number})
        found = summary_of(run)
        found["student"]["metrics"]["test"]["accuracy"] = 0.9 + 0.01 * number
        (run / "summary.json").write_text(json.dumps(found))
        done.append((cell, found))
    content = collect(made, done, [(broken, "it broke")], "python -m engine.compare --config g.yaml")
    (folder / "comparison.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def compared(comparison, tmp_path):
    """A comparison that a test may damage."""
    return Path(shutil.copytree(comparison, tmp_path / "compared", ignore=shutil.ignore_patterns("report.html")))


@pytest.fixture
def undrawn(monkeypatch):
    """Drawing has its own tests, and takes its time."""
    monkeypatch.setattr(curves, "chart", lambda *_, **__: None)
