"""python -m engine.profiling: what steps take, measured on the miniatures."""

import gzip
import json

import pytest
import torch
from run_helpers import contents

from engine.config import Config
from engine.profiling import plots, tables
from engine.profiling.__main__ import main
from engine.profiling.estimate import settings
from engine.profiling.ledger import CATEGORIES
from engine.profiling.measure import Profiling
from engine.profiling.profile import varied
from engine.sections import SECTIONS

FLAGS = ["--source", "embedded", "--teachers", "tinybert", "--student", "tinybert", "--batch-sizes", "4", "--steps", "3"]  # fmt: skip
STRATEGIES = ["exact", "double_backward", "finite_difference", "first_order"]
MIB = 2**20


@pytest.fixture
def undrawn(monkeypatch):
    """Plots take their time, and have their own test."""
    monkeypatch.setattr(plots, "plot", lambda found, folder: [])


def rows_of(folder) -> list[dict]:
    return json.loads((folder / "profile.json").read_text())["rows"]


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """One of its settings is traced: a trace takes as long as all the rest of a setting."""
    folder, trace = tmp_path_factory.mktemp("profile") / "out", Profiling._trace

    def traced(self, step):
        return trace(self, step) if self.measured.name == "exact-fp32-4x12" else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Profiling, "_trace", traced)
        assert (
            main([*FLAGS, "--strategies", "exact,double_backward", "--lengths", "12,8", "--output", str(folder)]) == 0
        )
    return folder


@pytest.fixture(scope="module")
def found(profiled):
    return json.loads((profiled / "profile.json").read_text())


def test_a_row_for_every_strategy_at_every_length_adds_up(found):
    """Sections to the median step, what the ledger sees to what the allocator gives out; the strategies are told apart."""
    asked = [(strategy, length) for strategy in STRATEGIES[:2] for length in (12, 8)]
    assert [(row["strategy"], row["length"]) for row in found["rows"]] == asked
    for row in found["rows"]:
        assert row["error"] is None and row["examples"] == 4
        assert {"pilot", "quiz", "teacher update", "real step"} <= set(row["sections"]) <= set(SECTIONS)
        assert sum(row["sections"].values()) == pytest.approx(row["seconds"], rel=0.03)
        low, high = row["quartiles"]
        assert low <= row["seconds"] <= high
        assert row["seen"] == pytest.approx(row["peak"], rel=0.02)
        assert set(row["holds"]) <= set(CATEGORIES) and sum(row["holds"].values()) == row["seen"]
        assert row["peaks"][row["peak_section"]] == row["seen"] == max(row["peaks"].values())
        assert row["seen"] == max(point[1] for point in row["timeline"])
    exact, short, double, _ = found["rows"]
    assert exact["flops"] < double["flops"]
    assert "JVP" in exact["sections"] and "JVP" not in double["sections"]
    assert double["holds"]["snapshots"] == 0 < exact["holds"]["snapshots"] and double["holds"]["second order"] > 0
    assert exact["peak"] > short["peak"]


def test_tables_plots_and_a_trace_that_names_the_sections(profiled, found, tmp_path):
    files = {f"{name}.{end}" for name in ("time", "memory", "lengths") for end in ("svg", "png")}
    assert {p.name for p in profiled.iterdir()} == {"profile.json", "table.md", "traces", *files}
    text = (profiled / "table.md").read_text()
    assert text == tables.page(found) + "\n"
    assert "What a step takes" in text and "What holds the memory at its peak, KiB, 4 x 12" in text
    assert str(profiled.parent) not in text + (profiled / "profile.json").read_text()
    with gzip.open(profiled / "traces" / "exact-fp32-4x12.json.gz") as f:
        names = {event.get("name") for event in json.load(f)["traceEvents"]}
    assert {"pilot", "quiz", "JVP", "teacher update", "real step", "aten::addmm"} <= names
    assert plots.plot(found, tmp_path) == ["time", "memory", "lengths"]  # the same results make the same plots
    assert all((tmp_path / name).read_bytes() == (profiled / name).read_bytes() for name in files)
    assert plots.plot({"rows": [row | {"error": "out of memory"} for row in found["rows"]]}, tmp_path) == []


def test_a_directory_in_use_is_left_alone(profiled, capsys):
    before = contents(profiled)
    assert main([*FLAGS, "--output", str(profiled)]) == 2
    assert "holds files already" in capsys.readouterr().err and contents(profiled) == before


@pytest.mark.slow
def test_checkpointing_micro_batches_and_precision_are_told_apart(undrawn, tmp_path):
    """And a student of some layers is built again and again: keeping layers changes that model's configuration alone."""
    flags = ["--checkpointing-choices", "both", "--micro-batch-sizes", "2", "--precision", "bf16", "--lengths", "8"]
    flags += ["--teachers", "tinybert,tinybert2", "--student-layers", "1", "--output", str(tmp_path / "o")]
    assert main([*FLAGS, *flags]) == 0
    found = json.loads((tmp_path / "o" / "profile.json").read_text())
    (measured,) = found["rows"]
    assert (tables.label(measured), measured["error"]) == ("exact, checkpointing both, micro-batch 2", None)
    assert tables.label(row("exact", 4, 8, micro_batch=2)) == "exact, micro-batch 2"
    assert len(list((tmp_path / "o" / "traces").iterdir())) == 1 and "bf16" in tables.caption(found)
    teachers, student = found["models"]["teachers"], found["models"]["student"]
    assert [each["name"] for each in teachers] == ["tinybert", "tinybert2"]
    assert 1e4 < student["parameters"] < teachers[0]["parameters"]


# Runs whose figures are made up

FIGURES = {"seconds": 0.5, "sections": {"pilot": 0.2, "real step": 0.3}, "flops": 2 * 10**9, "peak": 3 * MIB, "seen": 3 * MIB,
           "peak_section": "pilot", "holds": {"weights": 3 * MIB}, "peaks": {"pilot": 3 * MIB}, "examples": 8,
           "timeline": [(0, 1, "pilot"), (1, 3 * MIB, "real step")]}  # fmt: skip


@pytest.fixture
def profile(undrawn, monkeypatch, tmp_path):
    """Profile the strategies; each ends as `ends` says, with made-up figures where it says nothing."""

    def profile(ends: dict[str, BaseException], *flags: str) -> int:
        def run(self):
            if error := ends.get(self.config.method.meta_grad):
                raise error
            for name, value in FIGURES.items():
                setattr(self.measured, name, value)

        monkeypatch.setattr(Profiling, "run", run)
        given = ["--strategies", ",".join(STRATEGIES[:2]), "--lengths", "8", "--output", str(tmp_path / "o")]
        return main([*FLAGS, *given, *flags])

    return profile


FULL = torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(("ends", "errors"), [
    ({"double_backward": FULL}, [None, "out of memory"]),
    ({"exact": RuntimeError("DefaultCPUAllocator: can't allocate memory"), "double_backward": FULL}, ["out of memory"] * 2),
])  # fmt: skip
def test_what_does_not_fit_is_a_row_of_its_own(profile, ends, errors, tmp_path, capsys):
    assert profile(ends) == 0
    assert [row["error"] for row in rows_of(tmp_path / "o")] == errors
    out = capsys.readouterr().out
    assert all(f"{strategy}, 4 x 8: out of memory" in out for strategy in ends)


def test_a_stop_keeps_what_was_measured_and_another_error_is_not_hidden(profile, tmp_path, capsys):
    assert profile({"double_backward": KeyboardInterrupt()}) == 130
    assert len(rows_of(tmp_path / "o")) == 1
    assert "Stopped" in capsys.readouterr().out and not (tmp_path / "o" / ".lock").exists()
    with pytest.raises(RuntimeError, match="a bug"):
        profile({"exact": RuntimeError("a bug")}, "--output", str(tmp_path / "p"))
    assert profile({}, "--method", "kd", "--output", str(tmp_path / "q")) == 0
    assert [row["strategy"] for row in rows_of(tmp_path / "q")] == [None]  # a method without strategies has one row


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
