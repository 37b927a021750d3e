"""What all pages are made of: numbers, means, charts, drawings."""

from pathlib import Path

import matplotlib
import pytest
from matplotlib.figure import Figure
from page_reader import Reader

from engine.report import units
from engine.report.charts import Line, chart, moving_mean
from engine.report.costs import costs
from engine.report.load import Run
from engine.report.style import series, settled
from engine.report.svg import inline

LINE = [Line("a", [1, 2], [1.0, 2.0])]


def test_quantities_and_durations():
    for value, kind, text in (
        (0.0000123, units.TIME, "12.3 µs"), (0.1234, units.TIME, "123 ms"), (61.25, units.TIME, "61.2 s"), (0.0, units.TIME, "0 µs"),
        (3.5 * 2**30, units.BYTES, "3.50 GiB"), (2**20, units.BYTES, "1.00 MiB"), (1234.0, units.ENERGY, "1.23 kJ"), (None, units.TIME, ""),
    ):  # fmt: skip
        assert units.quantity(value, kind) == text
    durations = {0.5: "500 ms", 59.4: "59.4 s", 59.7: "1 min", 61: "1 min 1 s", 3600: "1 h", 5000: "1 h 23 min", 90_000: "1 d 1 h",
                 None: "", float("nan"): ""}  # fmt: skip
    assert {seconds: units.duration(seconds) for seconds in durations} == durations


def test_a_column_has_one_unit_and_as_many_decimals_everywhere():
    assert units.column([0.1, 0.0123, None, 0.0, 0.00001], units.TIME) == ("ms", ["100", "12", "", "0", "< 1"])
    assert units.column([0.1, 0.0123], units.TIME, figures=4) == ("ms", ["100.0", "12.3"])
    assert units.column([-0.001, 4.0], units.PLAIN) == ("", ["> -0.01", "4.00"])


def test_text_without_what_a_page_cannot_hold():
    assert units.printable("a\x00\x1b\ud800\n\tb\x85") == "a\ufffd\ufffd?\n\tb\ufffd"


def test_moving_mean_is_centred_and_short_at_the_ends():
    assert moving_mean([3.0, 0.0, 6.0, 3.0, 0.0], 3) == [1.5, 3.0, 3.0, 3.0, 1.5]
    assert moving_mean([1.0, 2.0], 1) == [1.0, 2.0]


def test_means_over_steps_are_weighted_by_the_steps_of_each_record():
    records = [{"phase": "p", "step": 10, "lr": 1, "seconds/quiz": 1.0}, {"phase": "p", "step": 10, "validation/accuracy": 0.5},
               {"phase": "p", "step": 40, "lr": 1, "seconds/quiz": 2.0, "memory/quiz": 7}]  # fmt: skip
    (cost,) = costs(Run(Path("r"), {}, {}, records), "p")
    assert (cost.name, cost.share, cost.memory, cost.joules) == ("quiz", 1.0, 7, None)
    assert cost.seconds == pytest.approx((10 + 60) / 40)


def test_a_long_line_is_smoothed_thinned_and_says_so():
    steps = list(range(1, 4001))
    made = chart("c", "C", [Line("a", steps, [float(s % 2) for s in steps])], logged="a mean")
    said = "Dots are the logged values, each a mean (one of 10 is drawn); lines are moving means over 401 values."
    assert said in made.caption and "lowest 0 at step 2, highest 1 at step 1." in made.caption
    assert 400 <= len(Reader(made.svg).of("use")) <= 400 + 20  # dots, and the ticks
    short = chart("c", "C", LINE)
    assert "Dots" not in short.caption and short.keys == []
    assert chart("c", "C", [Line("a", [], [])]) is None


@pytest.mark.parametrize("values", [[0.0], [5.0, 5.0], [1e-100, 1e100], [-1e100, 1e100], [3e38, -3e38], [1e-9, 2e-9]])
def test_odd_values_can_be_drawn(values):
    assert chart("c", "C", [Line("a", range(len(values)), values)], from_zero=len(values) == 1).svg.startswith("<svg")


def test_lines_are_told_apart_and_a_color_that_is_not_of_the_palette_is_our_mistake():
    assert len({series(k) for k in range(32)}) == 32
    with settled():
        figure = Figure()
        figure.add_subplot().plot([1, 2], color="#123456")
    with pytest.raises(KeyError, match="#123456"):
        inline(figure, "x", "words")


def test_two_drawings_share_no_name_and_settings_of_the_reader_s_matplotlib_do_not_matter():
    one, two = (chart(name, "C", LINE).svg for name in ("one", "two"))
    assert Reader(one).ids and not set(Reader(one).ids) & set(Reader(two).ids)
    assert one.replace("one-", "two-") == two
    loud = {
        "axes.facecolor": "#ff0000",
        "font.size": 30,
        "svg.fonttype": "path",
        "lines.linewidth": 9,
        "axes.grid": True,
    }
    with matplotlib.rc_context(loud):
        assert chart("one", "C", LINE).svg == one
