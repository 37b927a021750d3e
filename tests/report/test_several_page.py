"""Pages of several runs, and of comparisons."""

import json
import os
import shutil
from pathlib import Path

import pytest
from page_reader import EVIL, Reader, table
from report_helpers import make_run, page_of
from run_helpers import summary as summary_of

from engine.report.__main__ import main


def cells(comparison: Path) -> list[Path]:
    """The directories of its runs."""
    return sorted(path for path in (comparison / "cells").iterdir() if path.is_dir())


@pytest.fixture(scope="module")
def page(comparison):
    return page_of(comparison)


def test_the_page_of_a_comparison(page, comparison):
    read = Reader(page)
    assert read.said("h1") == ["A title"] and "A note." in " ".join(read.said("p"))
    assert table(page, "figures") == [
        ["method", "teachers → student", "accuracy", "published"], ["KD", "bert+roberta → distilbert", "91.00 ± 12.71", ""],
        ["MD", "bert+roberta → distilbert", "91.00 (n = 1)", "93.5"],
    ]  # fmt: skip
    compared = "KD, bert+roberta → distilbert"
    assert table(page, "differences")[1] == ["MD", "bert+roberta → distilbert", compared, "+1.00", "1", "one seed"]
    assert table(page, "cost-table")[1][:2] == [compared, "66,955,010"]
    said = f"{compared}: 91.00 ± 12.71; MD, bert+roberta → distilbert: 91.00, published 93.5."
    assert [said in label for label in read.labels() if "accuracy in % on test. KD" in label] == [True]
    assert "seed 1 failed: it broke" in page
    assert [t for t in read.said("h3") if "seed" in t] == [run.name for run in cells(comparison)]
    assert "python -m engine.compare --config g.yaml" in read.words()


def test_seeds_of_a_row_are_one_column_and_look_the_same(page):
    names = ["kd-bert-roberta-distilbert", "md-bert-roberta-distilbert"]
    head, *_, total = table(page, "section-times")
    assert head == ["section", *names] and total == ["whole step", "195.2", "195.2"]
    assert "ms per step, by section, in the last phase, mean over seeds" in page
    keys = page[page.index('<ul class="keys">') : page.index("</ul>", page.index('<ul class="keys">'))]
    assert keys.count("<li>") == 2 and f"{names[0]}<" in keys


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_only_shows_its_teacher_has_no_curve_and_no_figures(compared):
    cell = cells(compared)[-1]
    found = summary_of(cell)
    found["settings"]["max_steps"] = 1  # as engine.compare runs the rows that show a teacher
    (cell / "summary.json").write_text(json.dumps(found))
    text = page_of(compared)
    assert table(text, "section-times")[0] == ["section", "kd-bert-roberta-distilbert"]
    shown = text[text.index(f'">{cell.name}</h3>') :]
    assert "Prepares and measures bert and roberta; the student takes a single step." in shown
    assert "accuracy" not in shown


@pytest.mark.usefixtures("undrawn")
def test_links_go_to_the_pages_of_runs_where_they_are_and_are_no_addresses(compared, tmp_path, monkeypatch):
    cell = cells(compared)[0]
    page_of(cell)
    links = [a["href"] for a in Reader(page_of(compared)).of("a")]
    assert [link for link in links if link.endswith("report.html")] == [f"cells/{cell.name}/report.html"]
    monkeypatch.chdir(tmp_path)
    runs = [make_run(Path(name), finished=False, lines=0) for name in ("javascript:alert(1)", "b#?")]
    for run in runs:
        page_of(run)
    links = [a["href"] for a in Reader(page_of(*runs)).of("a") if not a["href"].startswith("#")]
    assert links == ["javascript%3Aalert%281%29/report.html", "b%23%3F/report.html"]
    runs = [make_run(tmp_path / name / "run", finished=False, lines=0) for name in ("a", "b")]  # of one name
    assert [row[0] for row in table(page_of(*runs), "side-by-side")[1:]] == ["a/run", "b/run"]


@pytest.mark.parametrize(("content", "says"), [
    ("{", "is damaged in line 1"), ('{"rows": []}', "is damaged: it has no rows"),
    ('{"rows": [5], "title": "", "seeds": [], "metrics": [], "split": "", "command": ""}', "is damaged (TypeError"),
])  # fmt: skip
def test_a_damaged_comparison(compared, capsys, content, says):
    (compared / "comparison.json").write_text(content)
    assert main([str(compared)]) == 2
    err = capsys.readouterr().err
    assert says in err and "run the comparison's command again" in err and err.count("\n") == 1
    assert not [name for _, _, files in os.walk(compared) for name in files if name.endswith(".partial")]


@pytest.mark.usefixtures("undrawn")
def test_a_damaged_run_of_a_comparison_is_left_out_and_named(compared, capsys):
    cell = cells(compared)[0]
    (cell / "summary.json").write_text("{")
    assert main([str(compared)]) == 0
    assert f"warning: {cell / 'summary.json'} is damaged" in capsys.readouterr().err
    text = (compared / "report.html").read_text()
    assert "summary.json is damaged" in text and f'">{cell.name}</h3>' not in text


@pytest.mark.usefixtures("undrawn")
def test_names_of_a_comparison_do_not_become_markup(compared):
    found = json.loads((compared / "comparison.json").read_text())
    for row in found["rows"]:
        row["name"] = row["models"] = row["against"] = EVIL
    found |= {"title": EVIL, "note": EVIL, "command": EVIL, "failed": [{"title": EVIL, "error": EVIL}]}
    (compared / "comparison.json").write_text(json.dumps(found))
    read = Reader(page_of(compared))
    assert "script" not in read.tags()
    assert any("<script>alert(1)" in text for text in read.said("text"))  # in the plot, as text


# Side by side


def test_runs_and_comparisons_side_by_side(comparison, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    one = make_run(tmp_path / "one", steps=60, config={"teacher_lr": 3e-5})
    part = make_run(tmp_path / "part", finished=False, steps=60, lines=30)
    given = (one, part, comparison, one, cells(comparison)[0])  # two of them twice
    assert main([str(path) for path in given]) == 0
    assert capsys.readouterr().out == "Report: report.html\n"
    text = (tmp_path / "report.html").read_text()
    names = ["one", "part", *(run.name for run in cells(comparison))]
    head, *rows = table(text, "side-by-side")
    assert [row[0] for row in rows] == names
    assert rows[0][1:5] == ["MetaDistil: bert + roberta → distilbert", "91.50", "90.95", "66,955,010"]
    assert "not finished" in rows[1] and head[2] == "validation accuracy, %"
    differing = {row[0]: row[1:] for row in table(text, "differing")[1:]}
    assert differing["teacher_lr"] == ["3e-05", "1e-05", "1e-05", "1e-05", "1e-05"] and "batch_size" not in differing
    assert table(text, "section-times")[0] == ["section", *names]
    assert table(text, "section-times")[7][1] == "64.3"
    labels = Reader(text).labels()
    drawn = ["Validation accuracy", "Loss", "Quiz loss", "Examples per second"]
    assert [label.split(".")[0] for label in labels] == drawn
    assert all(f"{name}: " in labels[1] for name in names)


def test_comparisons_without_runs(compared, tmp_path, capsys):
    shutil.rmtree(compared / "cells")
    assert main([str(compared)]) == 0  # its own page has its table
    other = Path(shutil.copytree(compared, tmp_path / "other"))
    capsys.readouterr()
    assert main([str(compared), str(other), "--output", str(tmp_path / "y.html")]) == 2
    assert "hold no runs yet" in capsys.readouterr().err
