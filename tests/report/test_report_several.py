"""Pages of several runs and of comparisons, and what all pages are made of: numbers, means, charts, drawings."""

import json
import os
import shutil
from pathlib import Path

import matplotlib
import pytest
from compare_helpers import grid
from matplotlib.figure import Figure
from report_helpers import make_run
from run_helpers import summary as summary_of
from test_report_page import EVIL, Reader, table

from engine.compare.result import collect
from engine.report import pages, units
from engine.report.__main__ import main
from engine.report.charts import Line, chart, moving_mean
from engine.report.costs import costs
from engine.report.load import Run
from engine.report.style import series, settled
from engine.report.svg import inline

ROWS = [{"name": "KD", "method": "kd", "teachers": "bert,roberta", "student": "distilbert"},
        {"name": "MD", "method": "metadistil", "teachers": "bert,roberta", "student": "distilbert", "published": 93.5}]  # fmt: skip


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """Two rows of two seeds, as engine.compare leaves them; one cell failed."""
    folder = tmp_path_factory.mktemp("comparisons") / "compared"
    made = grid(title="A title", note="A note.", seeds=2, rows=ROWS)
    done, failed = [], []
    for number, cell in enumerate(made.cells()):
        if number == 3:
            failed.append((cell, "it broke"))
            continue
        run = make_run(folder / "cells" / cell.name, steps=60, seed=cell.seed, config={"temperature": 4.0 + number})
        (run.parent / f"{cell.name}.log").write_text("")
        found = summary_of(run)
        found["student"]["metrics"]["test"]["accuracy"] = 0.9 + 0.01 * number
        (run / "summary.json").write_text(json.dumps(found))
        done.append((cell, found))
    (folder / "comparison.json").write_text(
        json.dumps(collect(made, done, failed, "python -m engine.compare --config g.yaml"))
    )
    return folder


@pytest.fixture
def copied(comparison, tmp_path):
    return Path(shutil.copytree(comparison, tmp_path / "compared"))


@pytest.fixture(scope="module")
def page(comparison):
    return pages.write([comparison], None)[0].read_text()


def test_the_page_of_a_comparison(page, comparison):
    read = Reader(page)
    assert read.said("h1") == ["A title"] and "A note." in " ".join(read.said("p"))
    assert table(page, "figures") == [
        ["method", "teachers → student", "accuracy", "published"], ["KD", "bert+roberta → distilbert", "91.00 ± 12.71", ""],
        ["MD", "bert+roberta → distilbert", "91.00 (n = 1)", "93.5"],
    ]  # fmt: skip
    assert table(page, "differences")[1] == [
        "MD",
        "bert+roberta → distilbert",
        "KD, bert+roberta → distilbert",
        "+1.00",
        "1",
        "one seed",
    ]
    assert table(page, "cost-table")[1][:2] == ["KD, bert+roberta → distilbert", "66,955,010"]
    (plot,) = (a["aria-label"] for a in read.of("svg") if "accuracy in % on test. KD" in a.get("aria-label", ""))
    assert (
        "KD, bert+roberta -> distilbert: 91.00 ± 12.71; MD, bert+roberta -> distilbert: 91.00, published 93.5." in plot
    )
    assert "seed 1 failed: it broke" in page
    assert [t for t in read.said("h3") if "seed" in t] == sorted(
        run.name for run in (comparison / "cells").iterdir() if run.is_dir()
    )
    assert "python -m engine.compare --config g.yaml" in read.words()
    ids = [a["id"] for _, a, _ in read.elements if "id" in a]
    assert len(ids) == len(set(ids))


def test_time_by_section_is_the_mean_over_seeds(page):
    head, *rows, total = table(page, "section-times")
    assert head == ["section", "kd-bert-roberta-distilbert", "md-bert-roberta-distilbert"]
    assert (
        total == ["a step in all", "195.2", "195.2"]
        and "ms a step, by section, in the last phase, mean over seeds" in page
    )


def test_seeds_of_a_row_look_the_same(page):
    keys = page[page.index('<ul class="keys">') : page.index("</ul>", page.index('<ul class="keys">'))]
    assert keys.count("<li>") == 2 and "kd-bert-roberta-distilbert<" in keys


def test_a_run_that_only_shows_its_teacher_has_no_curve(copied):
    cell = next(path for path in (copied / "cells").glob("md-*") if path.is_dir())
    found = summary_of(cell)
    found["settings"]["max_steps"] = 1  # as engine.compare runs the rows that show a teacher
    (cell / "summary.json").write_text(json.dumps(found))
    text = pages.write([copied], None)[0].read_text()
    assert table(text, "section-times")[0] == ["section", "kd-bert-roberta-distilbert"]
    assert f'">{cell.name}</h3>' in text


def test_a_comparison_links_to_the_pages_of_its_runs_where_they_are(copied):
    cell = min(path for path in (copied / "cells").iterdir() if path.is_dir())
    pages.write([cell], None)
    links = [a["href"] for a in Reader(pages.write([copied], None)[0].read_text()).of("a")]
    assert [link for link in links if link.endswith("report.html")] == [f"cells/{cell.name}/report.html"]


def test_a_link_is_no_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [make_run(Path(name), steps=60) for name in ("javascript:alert(1)", "b#?")]
    for run in runs:
        pages.write([run], None)
    text = pages.write(runs, None)[0].read_text()
    links = [a["href"] for a in Reader(text).of("a") if not a["href"].startswith("#")]
    assert links == ["javascript%3Aalert%281%29/report.html", "b%23%3F/report.html"]


@pytest.mark.parametrize(("content", "says"), [
    ("{", "is damaged in line 1"), ('{"rows": []}', "is damaged: it has no rows"),
    ('{"rows": [5], "title": "", "seeds": [], "metrics": [], "split": "", "command": ""}', "is damaged (TypeError"),
])  # fmt: skip
def test_a_damaged_comparison(copied, capsys, content, says):
    (copied / "comparison.json").write_text(content)
    assert main([str(copied)]) == 2
    err = capsys.readouterr().err
    assert says in err and "run the comparison's command again" in err and err.count("\n") == 1


def test_a_damaged_run_of_a_comparison_is_left_out_and_named(copied, capsys):
    cell = min(path for path in (copied / "cells").iterdir() if path.is_dir())
    (cell / "summary.json").write_text("{")
    assert main([str(copied)]) == 0
    assert f"warning: {cell / 'summary.json'} is damaged" in capsys.readouterr().err
    text = (copied / "report.html").read_text()
    assert "summary.json is damaged" in text and f'">{cell.name}</h3>' not in text


def test_names_of_a_comparison_do_not_become_markup(copied):
    found = json.loads((copied / "comparison.json").read_text())
    for row in found["rows"]:
        row["name"] = row["models"] = row["against"] = EVIL
    found |= {"title": EVIL, "note": EVIL, "command": EVIL, "failed": [{"title": EVIL, "error": EVIL}]}
    (copied / "comparison.json").write_text(json.dumps(found))
    read = Reader(pages.write([copied], None)[0].read_text())
    assert "script" not in {tag for tag, _, _ in read.elements}
    assert any("<script>alert(1)" in text for tag, text in read.texts if tag == "text")  # in the plot, as text


# Side by side


def test_runs_and_comparisons_side_by_side(comparison, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    one = make_run(tmp_path / "one", steps=60, config={"teacher_lr": 3e-5})
    part = make_run(tmp_path / "part", finished=False, steps=60, lines=30)
    cell = min(path for path in (comparison / "cells").iterdir() if path.is_dir())
    assert main([str(path) for path in (one, part, comparison, one, cell)]) == 0  # two of them twice
    assert capsys.readouterr().out == "Report: report.html\n"
    text = (tmp_path / "report.html").read_text()
    names = ["one", "part", *sorted(run.name for run in (comparison / "cells").iterdir() if run.is_dir())]
    head, *rows = table(text, "side-by-side")
    assert [row[0] for row in rows] == names
    assert rows[0][1:5] == ["MetaDistil: bert + roberta → distilbert", "91.50", "90.95", "66,955,010"]
    assert "not finished" in rows[1] and head[2] == "validation accuracy, %"
    differing = {row[0]: row[1:] for row in table(text, "differing")[1:]}
    assert differing["teacher_lr"] == ["3e-05", "1e-05", "1e-05", "1e-05", "1e-05"] and "batch_size" not in differing
    assert table(text, "section-times")[0] == ["section", *names]
    assert table(text, "section-times")[7][1] == "64.3"
    read = Reader(text)
    ids = [a["id"] for _, a, _ in read.elements if "id" in a]
    assert len(ids) == len(set(ids))
    labels = [a["aria-label"] for a in read.of("svg") if "aria-label" in a]
    assert [label.split(".")[0] for label in labels] == [
        "Validation accuracy",
        "Loss",
        "Quiz loss",
        "Examples a second",
    ]
    for name in names:
        assert f"{name}: " in labels[1], name


def test_runs_of_one_name_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [make_run(tmp_path / name / "run", finished=False, lines=0) for name in ("a", "b")]
    assert [row[0] for row in table(pages.write(runs, None)[0].read_text(), "side-by-side")[1:]] == ["a/run", "b/run"]


def test_comparisons_without_runs(copied, tmp_path, capsys):
    shutil.rmtree(copied / "cells")
    assert main([str(copied), "--output", str(tmp_path / "x.html")]) == 0  # its own page has its table
    other = Path(shutil.copytree(copied, tmp_path / "other"))
    capsys.readouterr()
    assert main([str(copied), str(other), "--output", str(tmp_path / "y.html")]) == 2
    assert "hold no runs yet" in capsys.readouterr().err


# Numbers


@pytest.mark.parametrize(("value", "kind", "text"), [
    (0.0000123, units.TIME, "12.3 µs"), (0.1234, units.TIME, "123 ms"), (61.25, units.TIME, "61.2 s"), (0.0, units.TIME, "0 µs"),
    (3.5 * 2**30, units.BYTES, "3.50 GiB"), (2**20, units.BYTES, "1.00 MiB"), (1234.0, units.ENERGY, "1.23 kJ"), (None, units.TIME, ""),
])  # fmt: skip
def test_quantities(value, kind, text):
    assert units.quantity(value, kind) == text


def test_a_column_has_one_unit_and_as_many_decimals_everywhere():
    assert units.column([0.1, 0.0123, None, 0.0, 0.00001], units.TIME) == ("ms", ["100", "12", "", "0", "< 1"])
    assert units.column([0.1, 0.0123], units.TIME, figures=4) == ("ms", ["100.0", "12.3"])
    assert units.column([-0.001, 4.0], units.PLAIN) == ("", ["> -0.01", "4.00"])


@pytest.mark.parametrize(("seconds", "text"), [
    (0.5, "500 ms"), (59.4, "59.4 s"), (59.7, "1 min"), (61, "1 min 1 s"), (3600, "1 h"), (5000, "1 h 23 min"), (90_000, "1 d 1 h"),
    (None, ""), (float("nan"), ""),
])  # fmt: skip
def test_durations(seconds, text):
    assert units.duration(seconds) == text


def test_moving_mean_is_centred_and_short_at_the_ends():
    assert moving_mean([3.0, 0.0, 6.0, 3.0, 0.0], 3) == [1.5, 3.0, 3.0, 3.0, 1.5]
    assert moving_mean([1.0, 2.0], 1) == [1.0, 2.0]


def test_means_over_steps_are_weighted_by_the_steps_of_each_record():
    records = [{"phase": "p", "step": 10, "lr": 1, "seconds/quiz": 1.0}, {"phase": "p", "step": 10, "validation/accuracy": 0.5},
               {"phase": "p", "step": 40, "lr": 1, "seconds/quiz": 2.0, "memory/quiz": 7}]  # fmt: skip
    (cost,) = costs(Run(Path("r"), {}, {}, records), "p")
    assert (cost.name, cost.seconds, cost.share, cost.memory, cost.joules) == (
        "quiz",
        pytest.approx((10 + 60) / 40),
        1.0,
        7,
        None,
    )


# Charts and drawings


def drawn(made) -> tuple[int, list[str]]:
    """How many dots a chart has, and its text."""
    read = Reader(made.svg)
    return len(read.of("use")), read.said("text")


def test_a_long_line_is_smoothed_thinned_and_says_so():
    steps = list(range(1, 4001))
    made = chart("c", "C", [Line("a", steps, [float(s % 2) for s in steps])], logged="a mean")
    assert "Dots: as logged, each a mean (one of 10 is drawn); lines: moving means over 401 values." in made.caption
    assert 400 <= drawn(made)[0] <= 400 + 20  # and the ticks
    assert "lowest 0 at step 2, highest 1 at step 1." in made.caption
    short = chart("c", "C", [Line("a", [1, 2], [1.0, 2.0])])
    assert "Dots" not in short.caption and short.keys == []


def test_nothing_logged_is_no_chart():
    assert chart("c", "C", [Line("a", [], [])]) is None


@pytest.mark.parametrize("values", [[0.0], [5.0, 5.0], [1e-100, 1e100], [-1e100, 1e100], [3e38, -3e38], [1e-9, 2e-9]])
def test_odd_values_can_be_drawn(values):
    assert chart("c", "C", [Line("a", range(len(values)), values)], from_zero=len(values) == 1).svg.startswith("<svg")


def test_two_drawings_share_no_name():
    made = [chart(name, "C", [Line("a", [1, 2], [1.0, 2.0])]) for name in ("one", "two")]
    ids = [{a["id"] for _, a, _ in Reader(one.svg).elements if "id" in a} for one in made]
    assert ids[0] and not ids[0] & ids[1]
    assert made[0].svg.replace("one-", "two-") == made[1].svg


def test_a_color_that_is_not_of_the_palette_is_our_mistake():
    with settled():
        figure = Figure()
        figure.add_subplot().plot([1, 2], color="#123456")
    with pytest.raises(KeyError, match="#123456"):
        inline(figure, "x", "words")


def test_settings_of_the_reader_s_matplotlib_do_not_matter(monkeypatch):
    line = [Line("a", [1, 2], [1.0, 2.0])]
    plain = chart("c", "C", line).svg
    with matplotlib.rc_context(
        {"axes.facecolor": "#ff0000", "font.size": 30, "svg.fonttype": "path", "lines.linewidth": 9, "axes.grid": True}
    ):
        assert chart("c", "C", line).svg == plain


def test_lines_are_told_apart_by_colour_or_dashes():
    assert len({series(k) for k in range(32)}) == 32


def test_text_without_what_a_page_cannot_hold():
    assert units.printable("a\x00\x1b\ud800\n\tb\x85") == "a\ufffd\ufffd?\n\tb\ufffd"


def test_nothing_is_left_beside_the_page(comparison):
    assert not [name for _, _, files in os.walk(comparison) for name in files if name.endswith(".partial")]
