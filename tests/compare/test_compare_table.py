"""Intervals, paired differences, and what tables, plot and the page of results make of them."""

import json
import math
from xml.etree import ElementTree

import pytest
from compare_helpers import grid

from engine.compare import stats
from engine.compare.result import collect
from engine.report import comparison_tables as table
from engine.report.comparison_plot import plot
from engine.screen.console import Console

# From printed tables of Student's distribution, two-sided 95 % and 99 %
QUANTILES = {1: (12.706, 63.657), 2: (4.303, 9.925), 3: (3.182, 5.841), 4: (2.776, 4.604), 5: (2.571, 4.032), 9: (2.262, 3.250),
             10: (2.228, 3.169), 29: (2.045, 2.756), 30: (2.042, 2.750), 120: (1.980, 2.617)}  # fmt: skip


def test_quantiles_of_t():
    for df, printed in QUANTILES.items():  # half a unit of the tables' last digit
        assert (stats.t_quantile(df), stats.t_quantile(df, 0.99)) == pytest.approx(printed, abs=5e-4)
    assert stats.t_quantile(1) == pytest.approx(math.tan(0.95 * math.pi / 2), rel=1e-12)
    assert stats.t_quantile(2) == pytest.approx(0.95 * math.sqrt(2 / (1 - 0.95**2)), rel=1e-12)


def test_mean_and_interval():
    found = stats.estimate([1.0, 2.0, 6.0])
    assert found.mean == 3.0 and found.n == 3
    assert found.interval == pytest.approx(4.302653 * math.sqrt(7.0) / math.sqrt(3), rel=1e-6)
    assert stats.estimate([5.0]) == (5.0, None, 1)
    assert stats.estimate([]) is None


def test_paired_differences_are_of_the_same_seed():
    found = stats.paired({0: 0.9, 1: 0.8, 2: 0.5}, {1: 0.7, 0: 0.8, 3: 0.1})
    assert found.mean == pytest.approx(0.1) and found.interval == pytest.approx(0.0, abs=1e-9) and found.n == 2
    assert stats.paired({0: 1.0}, {1: 1.0}) is None


# A grid with values, whose runs are made up


def run(figure: float, **changes) -> dict:
    metrics = {"validation": {"f1": figure - 0.1}, "test": {"f1": figure}}
    teacher = {"name": "bert", "parameters": 300, "metrics": {"validation": {"f1": 0.7}, "test": {"f1": 0.95}},
               "prepared": {"seconds": 0.0}}  # fmt: skip
    return {
        "metric": "f1", "source": "hub", "teachers": [teacher], "times_smaller": 3.0, "examples_per_second": 40.0,
        "student": {"parameters": 100, "metrics": metrics}, "phases": {"kd": {"seconds": 5.0}, "answers of bert": {"seconds": 9.0}},
        "peak_memory": {"host": 2**30, "device": 2**31 if figure > 0.82 else 2**30}, "sizes": {"train": 64}, "git_commit": "0123456789+changes",
        "device": {"device": "cuda:0", "name": "a GPU", "threads": 1},
        "versions": {"torch": "1", "transformers": "2", "python": "3"},
    } | changes  # fmt: skip


EACH = {"target_domain": ["a", "b"]}
VALUED = {
    "seeds": 2, "note": "A note.", "models": {"bert": {"place": "/m/enc"}}, "rows": [
        {"name": "T", "show": "bert", "each": EACH, "published": 95.5},
        {"name": "KD", "method": "kd", "each": EACH, "published": {"a": 80, "b": 91}},
        {"name": "MD", "method": "metadistil", "each": EACH},
    ],
}  # fmt: skip
FIGURES = {("KD", "a", 0): 0.80, ("KD", "a", 1): 0.82, ("KD", "b", 0): 0.90, ("KD", "b", 1): 0.92,
           ("MD", "a", 0): 0.84, ("MD", "b", 0): 0.90, ("MD", "a", 1): 0.83}  # fmt: skip


def valued(**changes) -> dict:
    made = grid(**VALUED | changes)
    done, failed = [], []
    for cell in made.cells():
        figure = FIGURES.get((made.rows[cell.row].name, cell.value, cell.seed), 0.5 if cell.row == 0 else None)
        if figure is None:
            failed.append((cell, "it | broke"))
        else:
            done.append((cell, run(figure)))
    return json.loads(json.dumps(collect(made, done, failed, "python -m engine.compare")))


def test_a_row_with_values_has_columns_and_their_average_over_whole_seeds():
    found = valued()
    kd, md = found["rows"][1:]
    assert {k: v["mean"] for k, v in kd["columns"].items()} == pytest.approx({"a": 0.81, "b": 0.91})
    assert kd["all"]["mean"] == pytest.approx(0.86) and kd["all"]["n"] == 2
    assert md["all"] == {"mean": pytest.approx(0.87), "interval": None, "n": 1}  # seed 1 lacks b
    assert md["difference"] == {"mean": pytest.approx(0.02), "interval": None, "n": 1}
    assert md["against"] == "KD, bert -> distilbert"
    assert [row["all"]["n"] for row in found["rows"]] == [1, 2, 1]
    assert found["failed"] == [{"title": "MD, bert -> distilbert, b, seed 1", "error": "it | broke"}]


def test_table_with_values():
    text = table.markdown(valued())
    for part in (
        "| method | teachers -> student | a | b | average | published | parameters | smaller | time, s | examples/s | peak memory, GiB |\n| --- |",
        "| T | bert | 95.00 | 95.00 | 95.00 | 95.5 | 300 |  |  |  |  |",
        "| KD | bert -> distilbert | 81.00 ± 12.71 (80) | 91.00 ± 12.71 (91) | 86.00 ± 12.71 | 85.5 | 100 | 3.00 x | 5.00 | 40.0 | 2.00 |",
        "| MD | bert -> distilbert | 83.50 ± 6.35 | 90.00 | 87.00 (n = 1) |  | 100 | 3.00 x | 5.00 | 40.0 | 2.00 |",
        "F1 in % on test; seeds 0, 1.", "t s / sqrt(n)", "A note.", "bert is enc.", "a GPU, torch 1", "Commit 0123456+changes.",
        "prepared once (seed 0)", "| MD | bert -> distilbert | KD, bert -> distilbert | +2.00 | 1 | one seed |",
        "- MD, bert -> distilbert, b, seed 1: it | broke", "```bash\npython -m engine.compare\n```",
    ):  # fmt: skip
        assert part in text, part
    assert "/m/" not in text


def test_the_validation_set_can_be_what_is_shown():
    found = valued(split="validation")
    assert [row["all"]["mean"] for row in found["rows"][:2]] == pytest.approx([0.7, 0.76])
    assert "F1 in % on validation" in table.markdown(found)


def test_console_tables_fit_eighty_columns():
    console = Console(width=80)
    with console.rich.capture() as captured:
        for one in table.console_tables(valued()):
            console.table(**one)
    lines = captured.get().splitlines()
    assert max(map(len, lines)) <= 80
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    assert ["KD", "bert ->", "81.00 (80)", "91.00 (91)", "86.00 ± 12.71", "85.5"] in rows
    assert any("2.00" in row for row in rows)


def test_a_mean_squared_error_is_no_percentage():
    found = {"metrics": ["mse"], "split": "test"}
    assert table.number(found, {"mean": 0.5, "interval": 0.25, "n": 2}) == "0.50 ± 0.25"
    assert table.measured(found) == "mse on test" and table.measured(found | {"metrics": ["f1"]}) == "f1 in % on test"


# The plot


def test_plot_has_a_point_a_seed_and_is_the_same_each_time(tmp_path):
    found = valued()
    plot(found, tmp_path)
    first = {name: (tmp_path / name).read_bytes() for name in ("plot.svg", "plot.png")}
    marks = [e.get("style", "") for e in ElementTree.parse(tmp_path / "plot.svg").iter() if e.tag.endswith("}use")]
    assert sum("fill: #7fa8d1" in mark for mark in marks) == 1 + 2 + 1 + 1  # seeds of T, KD and MD, and the legend's
    for part in ("#c0504d", "published", "mean and 95 % interval", "f1 in % on test"):
        assert part in first["plot.svg"].decode(), part
    plot(found, tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in first} == first
    plot(collect(grid(), [], [], "c"), tmp_path)  # of nothing
