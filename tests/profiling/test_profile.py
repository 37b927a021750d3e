"""python -m engine.profiling: what steps take, measured on the miniatures."""

import gzip
import json

import pytest
import torch

from engine.profiling import measure as subject
from engine.profiling import tables
from engine.profiling.__main__ import main
from engine.profiling.ledger import CATEGORIES
from engine.profiling.plots import plot
from engine.sections import SECTIONS

FLAGS = [
    "--source",
    "embedded",
    "--teachers",
    "bert,bert2",
    "--student",
    "distilbert",
    "--batch-sizes",
    "4",
    "--steps",
    "3",
]
STRATEGIES = ["exact", "double_backward", "finite_difference", "first_order"]


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
    assert found["models"]["teachers"][1]["name"] == "bert2" and found["models"]["student"]["parameters"] > 1e5
    assert all(row["error"] is None and row["examples"] == 4 for row in found["rows"])


def test_sections_add_up_to_the_median_step(found):
    for row in found["rows"]:
        assert set(row["sections"]) <= set(SECTIONS) and {"pilot", "quiz", "teacher update", "real step"} <= set(
            row["sections"]
        )
        assert sum(row["sections"].values()) == pytest.approx(row["seconds"], rel=0.03)
        low, high = row["quartiles"]
        assert low <= row["seconds"] <= high


def test_the_ledger_sees_what_the_allocator_gives_out(found):
    for row in found["rows"]:
        assert row["seen"] == pytest.approx(row["peak"], rel=0.02)
        assert sum(row["holds"].values()) == row["seen"] == max(row["peaks"].values()) and set(row["holds"]) <= set(
            CATEGORIES
        )
        assert row["peaks"][row["peak_section"]] == row["seen"]
        assert max(point[1] for point in row["timeline"]) == row["seen"]


def test_figures_tell_the_strategies_apart(found):
    rows = {row["strategy"]: row for row in found["rows"] if row["length"] == 12}
    assert rows["first_order"]["flops"] < rows["exact"]["flops"] < rows["double_backward"]["flops"]
    assert "JVP" in rows["exact"]["sections"] and "JVP" not in rows["double_backward"]["sections"]
    assert rows["double_backward"]["holds"]["snapshots"] == 0 < rows["exact"]["holds"]["snapshots"]
    assert rows["double_backward"]["holds"]["second order"] > 0
    longer, shorter = ([row["peak"] for row in found["rows"] if row["length"] == n] for n in (12, 8))
    assert all(a > b for a, b in zip(longer, shorter, strict=True))


def test_a_trace_names_the_sections(profiled):
    with gzip.open(profiled / "traces" / "exact-fp32-4x12.json.gz") as f:
        names = {event.get("name") for event in json.load(f)["traceEvents"]}
    assert {"pilot", "quiz", "JVP", "teacher update", "real step", "aten::addmm"} <= names


def test_tables_and_plots_are_there(profiled, found):
    assert {p.name for p in profiled.iterdir()} == {
        "profile.json", "table.md", "traces", *(f"{n}.{end}" for n in ("time", "memory", "lengths") for end in ("svg", "png"))}  # fmt: skip
    text = (profiled / "table.md").read_text()
    assert text == tables.page(found) + "\n"
    for words in (
        "What a step takes",
        "Time by section of the step, ms, 4 x 8",
        "What holds the memory at its peak, MiB, 4 x 12",
    ):
        assert words in text
    assert str(profiled.parent) not in text + (profiled / "profile.json").read_text()


def test_the_same_results_make_the_same_plots(found, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        assert plot(found, tmp_path / name) == ["time", "memory", "lengths"]
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    assert plot({"rows": [row | {"error": "out of memory"} for row in found["rows"]]}, tmp_path) == []


@pytest.mark.parametrize("method", ["kd", "finetune", "reptile"])
def test_methods_without_strategies_have_one_row(method, tmp_path, capsys):
    teachers = [] if method != "reptile" else ["--student", "bert"]  # of its teachers' width
    assert (
        main(
            [
                *FLAGS,
                *teachers,
                "--method",
                method,
                "--strategies",
                "all",
                "--lengths",
                "8",
                "--output",
                str(tmp_path / "o"),
            ]
        )
        == 0
    )
    (row,) = json.loads((tmp_path / "o" / "profile.json").read_text())["rows"]
    assert row["strategy"] is None and row["method"] == method and "real step" in row["sections"]
    assert "of kd" not in capsys.readouterr().out


def test_checkpointing_micro_batches_and_precision_are_told_apart(tmp_path):
    flags = [
        "--checkpointing-choices",
        "none,both",
        "--micro-batch-sizes",
        "2",
        "--precision",
        "bf16",
        "--lengths",
        "8",
    ]
    assert main([*FLAGS, *flags, "--output", str(tmp_path / "o")]) == 0
    found = json.loads((tmp_path / "o" / "profile.json").read_text())
    assert [tables.label(row) for row in found["rows"]] == [
        "exact, micro-batch 2", "exact, checkpointing both, micro-batch 2"]  # fmt: skip
    assert len(list((tmp_path / "o" / "traces").iterdir())) == 2
    assert "bf16" in tables.caption(found)


def test_what_does_not_fit_is_a_row_of_its_own(tmp_path, monkeypatch, capsys):
    run = subject.Profiling.run

    def fail(self):
        if self.config.method.meta_grad == "double_backward":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(self)

    monkeypatch.setattr(subject.Profiling, "run", fail)
    flags = ["--strategies", "exact,double_backward", "--lengths", "8", "--output", str(tmp_path / "o")]
    assert main([*FLAGS, *flags]) == 0
    rows = json.loads((tmp_path / "o" / "profile.json").read_text())["rows"]
    assert [row["error"] for row in rows] == [None, "out of memory"]
    assert "double_backward, 4 x 8: out of memory" in capsys.readouterr().out


def test_nothing_fits(tmp_path, monkeypatch, capsys):
    def fail(self):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(subject.Profiling, "run", fail)
    assert main([*FLAGS, "--lengths", "8", "--output", str(tmp_path / "o")]) == 0
    assert "out of memory" in capsys.readouterr().out


def test_another_error_is_not_hidden(tmp_path, monkeypatch):
    monkeypatch.setattr(subject.Profiling, "run", lambda self: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        main([*FLAGS, "--lengths", "8", "--output", str(tmp_path / "o")])


def test_a_stop_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    from engine.profiling import profile

    measure, calls = profile.measure, []

    def stop(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(profile, "measure", stop)
    assert main([*FLAGS, "--strategies", "all", "--lengths", "8", "--output", str(tmp_path / "o")]) == 130
    assert len(json.loads((tmp_path / "o" / "profile.json").read_text())["rows"]) == 1
    assert "Stopped" in capsys.readouterr().out and not (tmp_path / "o" / ".lock").exists()


@pytest.mark.parametrize(("flags", "words"), [
    (["--strategies", "sloppy"], "--strategies has 'sloppy'"),
    (["--gpu-memory", "24GB"], "--estimate"),
    (["--steps", "0"], "--steps is 0"),
    (["--lengths", "8,x"], "--lengths"),
    (["--meta-grad", "sloppy"], "--meta-grad"),
    (["--sloppy", "1"], "--sloppy"),
])  # fmt: skip
def test_bad_input_is_one_sentence(flags, words, tmp_path, capsys):
    assert main([*FLAGS, *flags, "--output", str(tmp_path / "o")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and words in err and err.count("\n") == 1
    assert not (tmp_path / "o").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(tmp_path, capsys):
    assert main([*FLAGS, "--device", "cuda", "--output", str(tmp_path / "o")]) == 2
    assert "finds no CUDA device" in capsys.readouterr().err


def test_a_directory_in_use_is_left_alone(profiled, capsys):
    before = sorted(p.name for p in profiled.rglob("*"))
    assert main([*FLAGS, "--output", str(profiled)]) == 2
    assert "is in use" in capsys.readouterr().err
    assert sorted(p.name for p in profiled.rglob("*")) == before


def row(strategy, batch, length, **changes):
    found = {"method": "metadistil", "strategy": strategy, "checkpointing": "none", "precision": "fp32", "batch": batch,
             "length": length, "micro_batch": None, "examples": batch, "seconds": 0.5, "sections": {"pilot": 0.2, "other": 0.3},
             "flops": 2e9, "peak": 3 * 2**20, "seen": 3 * 2**20, "peak_section": "pilot", "holds": {"weights": 3 * 2**20},
             "peaks": {"pilot": 3 * 2**20}, "error": None}  # fmt: skip
    return found | changes


def test_shapes_stand_together_and_compare_with_their_first():
    rows = [row("exact", 8, 64), row("exact", 8, 16, seconds=0.1), row("first_order", 8, 64, seconds=0.25),
            row("first_order", 8, 16, seconds=0.2, peak=6 * 2**20)]  # fmt: skip
    steps = tables.tables({"rows": rows})[0]
    assert steps["columns"] == ["strategy", "shape", "time, ms", "of exact", "ex/s", "GFLOP", "peak, MiB", "of exact"]
    assert [line[:4] for line in steps["rows"]] == [
        ["exact", "8 x 16", "100", ""], ["first order", "8 x 16", "200", "2.00"],
        ["exact", "8 x 64", "500", ""], ["first order", "8 x 64", "250", "0.50"]]  # fmt: skip
    assert [line[-1] for line in steps["rows"]] == ["", "2.00", "", "1.00"]


def test_no_table_has_more_settings_than_fit_beside_each_other():
    rows = [row(s, 8, 16, checkpointing=c) for s in STRATEGIES for c in ("none", "both")]
    found = tables.tables({"rows": rows})
    assert all(len(t["columns"]) <= 1 + tables.ACROSS for t in found[1:]) and len(found) == 1 + 2 * 3
    assert tables.tables({"rows": rows}, across=None)[1]["columns"] == [
        "section",
        *(tables.label(r).replace("_", " ") for r in rows),
    ]


def test_cells_of_sections():
    sizes = {"peak": 30 * 2**20, "peaks": {"pilot": 30 * 2**20}, "holds": {"weights": 30 * 2**20}}
    times, memory, holders = tables.tables({"rows": [row("exact", 8, 16, **sizes)]})[1:]
    assert times["rows"] == [["pilot", "200 (40 %)"], ["other", "300 (60 %)"], ["whole step", "500"]]
    assert memory["rows"] == [["pilot", "30.0"], ["whole step", "30.0"]] and "MiB" in memory["title"]
    assert holders["rows"] == [["weights", "30.0"], ["all", "30.0"]]


def test_a_student_of_some_layers_is_built_again_and_again(tmp_path):
    """Keeping layers changes a model's configuration, which is that model's alone."""
    flags = ["--teachers", "bert", "--student", "bert", "--student-layers", "1", "--strategies", "exact,first_order"]
    assert main([*FLAGS, *flags, "--lengths", "8", "--output", str(tmp_path / "o")]) == 0
    found = json.loads((tmp_path / "o" / "profile.json").read_text())
    assert [row["error"] for row in found["rows"]] == [None, None]
    assert found["models"]["student"]["parameters"] < found["models"]["teachers"][0]["parameters"]
