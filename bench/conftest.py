"""What the benchmarks share: flags, hardware and versions with every result, and a file of results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from engine import report

RESULTS = Path(__file__).parent / "results"


def pytest_addoption(parser):
    group = parser.getgroup("bench")
    group.addoption("--full", action="store_true", help="also the rows that take minutes")
    group.addoption("--save", action="store_true", help="write bench/results/<subject>.json")


@pytest.fixture(scope="module")
def record(request):
    """`record(part=..., **row)` keeps a row; with --save they go to results/<subject>.json (bench_<subject>.py).

    Parts are compared within themselves, so a run of some of them leaves the others in the file.
    """
    rows: list[dict] = []
    yield lambda **row: rows.append(row)
    if rows and request.config.getoption("--save"):
        subject = request.module.__name__.split(".")[-1].removeprefix("bench_").replace("_", "-")
        facts = {"hardware": report.hardware(torch.device("cpu")), "versions": report.versions()}
        file, parts = RESULTS / f"{subject}.json", {row["part"] for row in rows}
        kept = json.loads(file.read_text())["rows"] if file.exists() else []
        rows = [*(row for row in kept if row["part"] not in parts), *rows]
        file.write_text(json.dumps({"kind": subject, **facts, "rows": rows}, indent=1) + "\n")
