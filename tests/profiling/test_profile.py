"""python -m engine.profiling: what steps take, measured on the miniatures."""

import gzip
import json

import pytest
import torch

from engine.config import Config
from engine.profiling import tables
from engine.profiling.__main__ import main
from engine.profiling.estimate import settings
from engine.profiling.ledger import CATEGORIES
from engine.profiling.measure import Profiling
from engine.profiling.plots import plot
from engine.profiling.profile import varied
from engine.sections import SECTIONS

FLAGS = [
    "--source",
    "embedded",
    "--teachers",
    "tinybert",
    "--student",
    "tinybert",
    "--batch-sizes",
    "4",
    "--steps",
    "3",
]
STRATEGIES = ["exact", "double_backward", "finite_difference", "first_order"]
MIB = 2**20


def rows_of(folder) -> list[dict]:
    return json.loads((folder / "profile.json").read_text())["rows"]


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile") / "out"
    assert main([*FLAGS, "--strategies", "all", "--lengths", "12,8", "--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def found(profiled):
    return json.loads((profiled / "profile.json").read_text())


def test_every_strategy_at_every_length(found):
    assert [(row["strategy"], row["length"]) for row in found["rows"]] == [(s, n) for s in STRATEGIES for n in (12, 8)]
    assert all(row["error"] is None and row["examples"] == 4 for row in found["rows"])


def test_sections_add_up_to_the_median_step(found):
    for row in found["rows"]:
        assert {"pilot", "quiz", "teacher update", "real step"} <= set(row["sections"]) <= set(SECTIONS)
        assert sum(row["sections"].values()) == pytest.approx(row["seconds"], rel=0.03)
        low, high = row["quartiles"]
        assert low <= row["seconds"] <= high


def test_the_ledger_sees_what_the_allocator_gives_out(found):
    for row in found["rows"]:
        assert row["seen"] == pytest.approx(row["peak"], rel=0.02)
        assert sum(row["holds"].values()) == row["seen"] == max(row["peaks"].values())
        assert set(row["holds"]) <= set(CATEGORIES)
        assert row["peaks"][row["peak_section"]] == row["seen"] == max(point[1] for point in row["timeline"])


def test_figures_tell_the_strategies_apart(found):
    rows = {row["strategy"]: row for row in found["rows"] if row["length"] == 12}
    assert rows["first_order"]["flops"] < rows["exact"]["flops"] < rows["double_backward"]["flops"]
    assert "JVP" in rows["exact"]["sections"] and "JVP" not in rows["double_backward"]["sections"]
    assert rows["double_backward"]["holds"]["snapshots"] == 0 < rows["exact"]["holds"]["snapshots"]
    assert rows["double_backward"]["holds"]["second order"] > 0
    longer, shorter = ([row["peak"] for row in found["rows"] if row["length"] == n] for n in (12, 8))
    assert all(a > b for a, b in zip(longer, shorter, strict=True))


def test_tables_plots_and_a_trace_that_names_the_sections(profiled, found, tmp_path):
    plots = {f"{name}.{end}" for name in ("time", "memory", "lengths") for end in ("svg", "png")}
    assert {p.name for p in profiled.iterdir()} == {"profile.json", "table.md", "traces", *plots}
    text = (profiled / "table.md").read_text()
    assert text == tables.page(found) + "\n"
    for words in (
        "What a step takes",
        "Time by section of the step, ms, 4 x 8",
        "What holds the memory at its peak, KiB, 4 x 12",
    ):
        assert words in text
    assert str(profiled.parent) not in text + (profiled / "profile.json").read_text()
    with gzip.open(profiled / "traces" / "exact-fp32-4x12.json.gz") as f:
        names = {event.get("name") for event in json.load(f)["traceEvents"]}
    assert {"pilot", "quiz", "JVP", "teacher update", "real step", "aten::addmm"} <= names
    assert plot(found, tmp_path) == ["time", "memory", "lengths"]  # the same results make the same plots
    assert all((tmp_path / name).read_bytes() == (profiled / name).read_bytes() for name in plots)
    assert plot({"rows": [row | {"error": "out of memory"} for row in found["rows"]]}, tmp_path) == []


def test_a_directory_in_use_is_left_alone(profiled, capsys):
    before = sorted(p.name for p in profiled.rglob("*"))
    assert main([*FLAGS, "--output", str(profiled)]) == 2
    assert "holds files already" in capsys.readouterr().err
    assert sorted(p.name for p in profiled.rglob("*")) == before


def test_checkpointing_micro_batches_and_precision_are_told_apart(tmp_path):
    """And a student of some layers is built again and again: keeping layers changes that model's configuration alone."""
    flags = ["--checkpointing-choices", "none,both", "--micro-batch-sizes", "2", "--precision", "bf16"]
    flags += ["--teachers", "tinybert,tinybert2", "--student-layers", "1"]
    assert main([*FLAGS, *flags, "--lengths", "8", "--output", str(tmp_path / "o")]) == 0
    found = json.loads((tmp_path / "o" / "profile.json").read_text())
    assert [tables.label(row) for row in found["rows"]] == [
        "exact, micro-batch 2",
        "exact, checkpointing both, micro-batch 2",
    ]
    assert [row["error"] for row in found["rows"]] == [None, None]
    assert len(list((tmp_path / "o" / "traces").iterdir())) == 2 and "bf16" in tables.caption(found)
    teachers, student = found["models"]["teachers"], found["models"]["student"]
    assert [each["name"] for each in teachers] == ["tinybert", "tinybert2"]
    assert 1e4 < student["parameters"] < teachers[0]["parameters"]


# Runs whose figures are made up

FIGURES = {"seconds": 0.5, "sections": {"pilot": 0.2, "real step": 0.3}, "flops": 2 * 10**9, "peak": 3 * MIB, "seen": 3 * MIB,
           "peak_section": "pilot", "holds": {"weights": 3 * MIB}, "peaks": {"pilot": 3 * MIB}, "examples": 8,
           "timeline": [(0, 1, "pilot"), (1, 3 * MIB, "real step")]}  # fmt: skip


@pytest.fixture
def profile(monkeypatch, tmp_path):
    """Profile the strategies; each ends as `ends` says, with made-up figures where it says nothing."""

    def profile(ends: dict[str, BaseException], *flags: str) -> int:
        def run(self):
            if error := ends.get(self.config.method.meta_grad):
                raise error
            for name, value in FIGURES.items():
                setattr(self.measured, name, value)

        monkeypatch.setattr(Profiling, "run", run)
        return main(
            [
                *FLAGS,
                "--strategies",
                ",".join(STRATEGIES[:2]),
                "--lengths",
                "8",
                *flags,
                "--output",
                str(tmp_path / "o"),
            ]
        )

    return profile


FULL = torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(("ends", "errors"), [
    ({"double_backward": FULL}, [None, "out of memory"]),
    ({"exact": RuntimeError("DefaultCPUAllocator: can't allocate memory")}, ["out of memory", None]),
    ({"exact": FULL, "double_backward": FULL}, ["out of memory"] * 2),
])  # fmt: skip
def test_what_does_not_fit_is_a_row_of_its_own(profile, ends, errors, tmp_path, capsys):
    assert profile(ends) == 0
    assert [row["error"] for row in rows_of(tmp_path / "o")] == errors
    out = capsys.readouterr().out
    assert all(f"{strategy}, 4 x 8: out of memory" in out for strategy in ends)


def test_another_error_is_not_hidden(profile):
    with pytest.raises(RuntimeError, match="a bug"):
        profile({"exact": RuntimeError("a bug")})


def test_a_stop_keeps_what_was_measured(profile, tmp_path, capsys):
    assert profile({"double_backward": KeyboardInterrupt()}) == 130
    assert len(rows_of(tmp_path / "o")) == 1
    assert "Stopped" in capsys.readouterr().out and not (tmp_path / "o" / ".lock").exists()


def test_a_method_without_strategies_has_one_row(profile, tmp_path, capsys):
    assert profile({}, "--method", "kd") == 0
    (row,) = rows_of(tmp_path / "o")
    assert (row["strategy"], row["method"]) == (None, "kd") and "of kd" not in capsys.readouterr().out


@pytest.mark.parametrize(("method", "rows"), [("metadistil", 4), ("reptile", 2), ("kd", 1), ("finetune", 1)])
def test_settings_that_a_method_does_not_have_are_not_varied(method, rows):
    config = Config.from_flat(Config().to_flat() | {"method": method})
    asked = settings(config, meta_grad=["exact", "first_order"], checkpointing=["none", "both"])
    assert len(varied(config, asked)) == rows


# Tables


def row(strategy, batch, length, **changes):
    found = {"method": "metadistil", "strategy": strategy, "checkpointing": "none", "precision": "fp32", "batch": batch,
             "length": length, "micro_batch": None, "error": None}  # fmt: skip
    return found | FIGURES | {"examples": batch} | changes


def test_shapes_stand_together_and_compare_with_their_first():
    rows = [row("exact", 8, 64), row("exact", 8, 16, seconds=0.1), row("first_order", 8, 64, seconds=0.25),
            row("first_order", 8, 16, seconds=0.2, peak=6 * MIB)]  # fmt: skip
    steps = tables.tables({"rows": rows})[0]
    assert steps["columns"] == ["strategy", "shape", "time, ms", "of exact", "ex/s", "GFLOP", "peak, MiB", "of exact"]
    assert [[*line[:4], line[-1]] for line in steps["rows"]] == [
        ["exact", "8 x 16", "100", "", ""], ["first order", "8 x 16", "200", "2.00", "2.00"],
        ["exact", "8 x 64", "500", "", ""], ["first order", "8 x 64", "250", "0.50", "1.00"]]  # fmt: skip


def test_no_table_has_more_settings_than_fit_beside_each_other():
    rows = [row(s, 8, 16, checkpointing=c) for s in STRATEGIES for c in ("none", "both")]
    found = tables.tables({"rows": rows})
    assert all(len(t["columns"]) <= 1 + tables.ACROSS for t in found[1:]) and len(found) == 1 + 2 * 3
    names = [tables.label(r).replace("_", " ") for r in rows]
    assert tables.tables({"rows": rows}, across=None)[1]["columns"] == ["section", *names]


def test_cells_of_sections():
    sizes = {"peak": 30 * MIB, "peaks": {"pilot": 30 * MIB}, "holds": {"weights": 30 * MIB}}
    times, memory, holders = tables.tables({"rows": [row("exact", 8, 16, **sizes)]})[1:]
    assert times["rows"] == [["pilot", "200 (40 %)"], ["real step", "300 (60 %)"], ["whole step", "500"]]
    assert memory["rows"] == [["pilot", "30.0"], ["whole step", "30.0"]] and "MiB" in memory["title"]
    assert holders["rows"] == [["weights", "30.0"], ["all", "30.0"]]
