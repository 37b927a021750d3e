"""Tables of the pages come from results: which rows stand where, what is computed of them, how runs come together."""

import json
from pathlib import Path

import pytest

from bench import layout, table
from bench.bench_time_machine import PASSES
from bench.layout import NOT_YET
from bench.meta_step_table import render_meta_step

ROOT = Path(__file__).parents[2]


def machine(device="cpu", name="a processor"):
    versions = {"torch": "2", "python": "3", "triton": "4", "liger-kernel": "5", "cuda": "13.0", "driver": "580"}
    return {"hardware": {"device": device, "name": name, "threads": 2}, "versions": versions}


def row(subject, group, implementation, milliseconds, device="cpu", apart=0.1, **info):
    """As pytest-benchmark writes it; quartiles lie `apart` of the median below and above it."""
    seconds = milliseconds / 1e3
    name = f"test_it[{group}-{implementation}]"
    return {
        "group": f"{subject} {group}", "name": name, "fullname": f"bench/bench_{subject.replace('-', '_')}.py::{name}",
        "param": "", "params": {}, "extra_info": {"device": device, "row": implementation, **info},
        "stats": {"median": seconds, "q1": (1 - apart) * seconds, "q3": (1 + apart) * seconds, "min": seconds,
                  "max": 2 * seconds, "data": [seconds]},
    }  # fmt: skip


def run(*rows, name="a processor", **more):
    device = rows[0]["extra_info"]["device"]
    return {"machine_info": machine(device, name), "benchmarks": list(rows), "datetime": "now", **more}


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """`kept(run, ...)` merges runs, one after the other, into a folder of results; returns that of the last one's subject."""
    monkeypatch.setattr(table, "RESULTS", tmp_path / "results")

    def keep(*runs):
        for results in runs:
            (tmp_path / "run.json").write_text(json.dumps(results))
            (*_, subject) = table.merge([tmp_path / "run.json"])
        return tmp_path / "results" / f"{subject}.json"

    return keep


# Runs come together


def test_groups_that_are_measured_again_replace_those_of_their_device(kept, tmp_path):
    first = run(*(row("steps", group, "engine", n) for n, group in enumerate("ab", 1)), row("kernels", "a", "ours", 7))
    again = run(*(row("steps", group, "engine", n) for n, group in ((3, "b"), (4, "c"))), name="another")
    gpu = run(row("steps", "b", "engine", 5, "cuda"), name="a GPU")
    file = kept(first, again, gpu)
    found = table.records.rows(table.records.read(file))
    assert [(r["group"], r["seconds"], r["machine"]["hardware"]["name"]) for r in found] == [
        ("steps a", 1e-3, "a processor"), ("steps b", 3e-3, "another"), ("steps c", 4e-3, "another"),
        ("steps b", 5e-3, "a GPU"),
    ]  # fmt: skip
    assert "data" not in table.records.read(file)["benchmarks"][0]["stats"]
    assert {f.name for f in file.parent.iterdir()} == {"steps.json", "kernels.json"}
    before = file.read_text()
    assert table.merge([tmp_path]) == ["steps"] and file.read_text() == before  # a folder, once more


def test_what_cannot_be_kept(kept, tmp_path):
    with pytest.raises(ValueError, match="was measured with --small"):
        kept(run(row("steps", "a", "engine", 1), small=True))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no results; name the folder that make gpu-check wrote"):
        table.merge([tmp_path / "empty"])


def test_pages_are_made_from_the_results(monkeypatch, tmp_path):
    pages = {page.name: page.read_text() for page in table.PAGES}
    assert {name for name, text in pages.items() if "<!-- table: " in text} >= {"README.md", "performance.md"}
    for name, text in pages.items():
        assert table.update(text) == text, f"{name} is not what python -m bench.table writes"
    assert not {
        folder for folder in ("/tmp", "/home", "/root") for f in table.RESULTS.iterdir() if folder in f.read_text()
    }
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    text = "<!-- table: {} -->\n<!-- end -->"
    for subject in table.BENCHMARKS:
        assert "\nNot yet measured.\n" in table.update(text.format(subject))
    with pytest.raises(FileNotFoundError, match="sst2.json is missing"):
        table.update(text.format("sst2"))


# Kernels


def kernel(group, implementation, milliseconds, device="cpu", **info):
    return row("kernels", group, implementation, milliseconds, device, **{
        "backend": "cpp", "pass": "backward", "classes": 1000, "rows": 4096, "hidden": 0, "dtype": "fp32", "teachers": 1,
        "bytes": 48_000_000, "copy_rate": 48e9, "error": 1e-7, "inputs": 32_000_000, "outputs": 16_000_000,
        "peak": 16_000_000} | info)  # fmt: skip


CPU_KERNELS = run(
    kernel("a", "ours", 2, left_out={"liger": "its kernels need CUDA"}), kernel("a", "eager", 9, peak=64_000_000),
    kernel("a", "torch.compile", 40),
)  # fmt: skip


def test_kernels(kept):
    rendered = table.render(kept(CPU_KERNELS))
    lines = rendered.splitlines()
    assert lines[0] == NOT_YET
    assert lines[2] == "On a CPU, `cpp` kernels:"
    expected = "| forward and backward | 4,096 x 1,000 | fp32 | 1 | 2 ms | 50 % | 4.5 x | 20 x |  | 1.00 | 2.00 |"
    assert lines[6] == expected
    assert "Liger is left out: its kernels need CUDA." in rendered
    assert "quartiles lie 20 % of the median apart (20 % at most)" in rendered
    assert rendered.endswith("a processor, 2 threads, torch 2, Python 3.")
    launch = {"pass": "forward", "bytes": 800, "backend": "triton", "classes": 2, "rows": 32}
    fused = {"operations": 2e9, "product_rate": 1e12, "hidden": 64, "pass": "fused"}
    times = {"ours": 0.02, "eager": 0.2, "graph": 0.004, "liger": 0.1}
    gpu = run(
        *(kernel("b", name, time, "cuda", **launch) for name, time in times.items()),
        kernel("c", "ours", 3, "cuda", **fused), kernel("c", "eager", 6, "cuda", **fused), name="a GPU",
    )  # fmt: skip
    rendered = table.render(kept(gpu))
    assert NOT_YET not in rendered and expected in rendered
    assert "| forward | 32 x 2 | fp32 | 1 | 20 µs (4 µs as a CUDA graph) |  | 10 x |  | 5.0 x |  |  |" in rendered
    assert "| last layers and loss | 4,096 x 1,000, hidden 64 | fp32 | 1 | 3 ms | 67 % (products) | 2.0 x |" in rendered
    assert "a GPU, torch 2, triton 4, liger-kernel 5, CUDA 13.0, driver 580, Python 3." in rendered
    assert rendered.index("On a GPU") < rendered.index("On a CPU")


def test_durations():
    assert [layout.duration(s) for s in (1.234, 0.01234, 12.34e-6)] == ["1.23 s", "12.3 ms", "12.3 µs"]


# Whole steps


def step(implementation, milliseconds, device="cpu", batch=32, precision="fp32", **info):
    seconds = milliseconds / 1e3
    return row("steps", f"kd {batch} {precision}", implementation, milliseconds, device, **{
        "models": "models", "method": "kd", "batch": batch, "length": 64, "teachers": 1, "precision": precision,
        "full": False, "examples_per_second": batch / seconds, "mfu": 1e9 / seconds / 1e12, "peak": 2**30,
        "error": 1e-6} | info)  # fmt: skip


def test_steps_are_held_against_the_faster_plain_one(kept):
    file = kept(run(
        step("plain", 40), step("plain, fused", 30, peak=2**31), step("engine", 20),
        step("plain", 10, precision="bf16"), step("engine", 20, precision="bf16", error=2e-2),
    ))  # fmt: skip
    rendered = table.render(file)
    lines = rendered.splitlines()
    assert [lines[0], lines[2]] == [NOT_YET, "On a CPU, models:"]
    assert lines[6] == "| kd | 1 | 32 x 64 | fp32 | 30 ms | 20 ms | 1.50 x | 1,600 | 5 % | 1.00 GiB | 0.50 |"
    assert lines[7] == "| kd | 1 | 32 x 64 | bf16 | 10 ms | 20 ms | 0.50 x | 1,600 | 5 % | 1.00 GiB | 1.00 |"
    assert "The engine is the slower one in 1 of 2 cases." in rendered
    assert "within 1e-06 (fp32) and 2e-02 (bf16) of plain PyTorch in float32." in rendered
    short = table.render(file, short=True).splitlines()
    assert short[2] == "| kd | 1 | 32 x 64 | fp32 | 30 ms | 20 ms | 1.50 x | 0.50 |" and len(short) == 6
    assert short[-1].endswith("in one run. a processor, 2 threads, torch 2, Python 3.")


def test_steps_on_a_gpu(kept):
    waits = {"left_out": {"graph": "the step waits."}}
    rendered = table.render(kept(run(
        step("plain", 40, "cuda"), step("engine", 20, "cuda"), step("graph", 5, "cuda"),
        *(step(name, time, "cuda", batch=8, **waits) for name, time in (("plain", 40), ("engine", 20))), name="a GPU",
    )))  # fmt: skip
    small = "| kd | 1 | 8 x 64 | fp32 | 40 ms | 20 ms | 2.00 x |  |  | 400 | 5 % | 1.00 GiB | 1.00 |"
    large = "| kd | 1 | 32 x 64 | fp32 | 40 ms | 20 ms | 2.00 x | 5 ms | 8.00 x | 6,400 | 20 % | 1.00 GiB | 1.00 |"
    assert f"{small}\n{large}" in rendered and NOT_YET not in rendered
    assert rendered.count("graph is left out: the step waits.") == 1


def test_a_long_table_shows_the_usual_rows(kept):
    rows = [step(name, 40, batch=8 + n, full=n > 3) for n in range(40) for name in ("plain", "engine")]
    rendered = table.render(kept(run(*rows)))
    assert rendered.count("| kd |") == 4
    assert "36 more cases stand in `bench/results/steps.json`." in rendered


# The time machine, telemetry


def copies(group, implementation, milliseconds, device="cpu", **info):
    return row("time-machine", group, implementation, milliseconds, device, apart=0.05, **{
        "pass": group, "weights": 1_000_000, "copy_rate": 20e9, "bytes": 4_000_000 * PASSES.get(group, 0)} | info)  # fmt: skip


def test_time_machine(kept):
    lines = table.render(kept(run(
        copies("snapshot", "time machine", 2), copies("snapshot", "deepcopy", 8), copies("pilot", "time machine", 2),
        copies("pilot", "time machine, rows", 1, bytes=12_000_000),
    ))).splitlines()  # fmt: skip
    assert [lines[0], lines[2]] == [NOT_YET, "On a CPU, 1,000,000 weights:"]
    assert lines[6] == "| time machine | 2 ms | 8 | 40 % | 2 ms | 12 | 60 % |"
    assert lines[7] == "| time machine, embeddings by rows |  |  |  | 1 ms | 12 | 60 % |"
    assert lines[8] == "| `deepcopy(state_dict())`, `load_state_dict` | 8 ms | 2 | 10 % |  |  |  |"
    whole = {"precision": "bf16", "models": "models", "batch": 32, "length": 128}
    times = {"device": 100, "pinned": 103, "device, graph": 50, "pinned, graph": 51}
    both = table.render(kept(run(
        copies("pilot", "time machine, pinned", 2, "cuda"),
        *(copies("meta-step", store, time, "cuda", **whole) for store, time in times.items()),
    )))  # fmt: skip
    assert NOT_YET not in both and both.index("On a GPU") < both.index("On a CPU")
    assert (
        "Snapshots in pinned host memory add +3.0 % to an eager step of 100 ms and +2.0 % to a CUDA graph's of 50 ms "
        "(models, 32 x 128, bf16)."
    ) in both


def test_telemetry(kept):
    info = {"size": "miniature", "case": "kd", "marks": 26, "mark_seconds": 2e-7, "record_seconds": 2e-5, "share": 0.003,
            "marks_share": 0.0005, "record_share": 0.0001, "thread_share": 0.0024,
            "turns": {"cpu": [-0.01, 0.02, 0.03], "clock": [-0.02, 0.01, 0.04]}}  # fmt: skip
    rendered = table.render(kept(run(*(row("telemetry", "a", name, 5, **info) for name in ("without", "with")))))
    assert rendered.splitlines()[2:4] == [
        "| kd, miniature | cpu | 5 ms | 0.05 % | 0.01 % | 0.24 % | 0.30 % | +2.00 % (-1.00 % to +3.00 %) | "
        "+1.00 % (-2.00 % to +4.00 %) |",
        "",
    ]
    assert "up to 26 marks of 0.20 µs; a record takes 20 µs" in rendered


# The meta-step, whole runs


def shipped(implementation, precision, speed, **more):
    return {"part": "shipped", "row": implementation, "precision": precision, "examples_per_second": speed,
            "padding_waste": 0.2, "peak": 2**30, "machine": machine(), **more}  # fmt: skip


def test_meta_step():
    timed = {"fastest": 1.9, "slowest": 2.1, "growth": 2**20, "machine": machine()}
    rows = [
        {"part": "equal", "row": "kd", "seconds": 2.0, "flops": 1e9, **timed},
        {"part": "equal", "row": "exact", "seconds": 5.0, "flops": 3e9, **timed},
        {"part": "lengths", "row": "exact", "checkpointing": "both", "length": 64, "batch": 32, "seconds": 2.0, **timed},
        {"part": "pilots", "row": "exact", "pilots": 2, "seconds": 3.0, **timed},
        shipped("published loop", "fp32", 5.5), shipped("finetune", "fp32", 100), shipped("finetune", "bf16", 200),
        shipped("kd, answers kept", "fp32", 95, answers_seconds=12.3),
        shipped("kd, answers kept", "bf16", 180, answers_seconds=6.1),
        shipped("metadistil", "fp32", 55), shipped("metadistil", "bf16", 121),
    ]  # fmt: skip
    rendered = render_meta_step(rows)
    assert "| exact | 5.00 s | 2.50 | 1 MiB | 1.00 | 3 |" in rendered
    assert "`exact` takes 2.50 times the time of the engine's own KD step, and 3.00 times its FLOPs." in rendered
    assert "| strategy | checkpointing | 32 x 64 |\n|---|---|---|\n| exact | both | 2.00 s, 1 MiB |" in rendered
    assert "| M 2 |\n|---|\n| 3.00 s, 1 MiB |" in rendered
    assert "| published loop | fp32 | 5.5 | 20 % | 1.0 GiB |" in rendered
    assert (
        "In this run kd, answers kept makes 0.95 (fp32) and 0.90 (bf16) times the examples/s of finetune; metadistil makes "
        "10.00 (fp32) and 22.00 (bf16) times the examples/s of published loop. The kept answers took 6 to 12 s, once."
    ) in rendered
    assert rendered.endswith("before it. a processor, 2 threads, torch 2, Python 3.")
    assert "In this run" not in render_meta_step([*rows[:4], shipped("metadistil", "fp32", 55)])


def summary(method, seed, accuracy, teachers):
    metrics = {split: {"accuracy": accuracy} for split in ("validation", "test")}
    teacher = {"name": "t", "source": "/somewhere", "sample": 0, "origin": "fine-tuned", "parameters": 30,
               "metrics": metrics, "prepared": {"validation": {"accuracy": 0.9}, "seconds": 7.0}}  # fmt: skip
    return {
        "method": method, "seed": seed, "teachers": [teacher] * teachers, "times_smaller": 3.0 if teachers else None,
        "student": {"name": "s", "source": "/somewhere", "parameters": 10, "metrics": metrics, "best_step": 1},
        "phases": {method: {"seconds": 10.0, "steps": 1, "examples_per_second": 5.0}}, "seconds": 20.0,
        "sizes": {"train": 1000, "quiz": 100, "validation": 872, "test": 2000}, "padding_waste": 0.1,
        "peak_memory": {"host": 2**30}, "device": machine()["hardware"], "git_commit": "abcdef0123",
        "versions": {"torch": "1", "transformers": "2", "python": "3"},
        "settings": {"teachers": "/somewhere", "student": "/s", "data": "/d", "output": "/o", "cache_dir": None, "lr": 1.0},
    }  # fmt: skip


def test_runs(tmp_path, capsys):
    for i, found in enumerate([summary("kd", 0, 0.80, 1), summary("kd", 1, 0.82, 1), summary("finetune", 0, 0.7, 0)]):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "summary.json").write_text(json.dumps(found))
    table.main(["collect", *(str(tmp_path / str(i)) for i in range(3))])
    collected = capsys.readouterr().out
    assert "/" not in collected
    (tmp_path / "runs.json").write_text(collected)
    lines = table.render(tmp_path / "runs.json").splitlines()
    assert lines[2] == "| kd | 1 | 81.00 | 81.00 ± 1.41 | 81.00 ± 1.41 | 10 | 3.00 | 5 (5-5) | 10 (10-10) s | 1.0 GiB |"
    assert lines[3] == "| finetune | 0 |  | 70.00 | 70.00 | 10 |  | 5 | 10 s | 1.0 GiB |"
    assert lines[-1].endswith("Commit abcdef0. a processor, 2 threads, torch 1, transformers 2, Python 3.")
