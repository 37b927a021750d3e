"""Tables of the pages come from results: which rows stand where, what is computed of them, how runs come together."""

import json
from pathlib import Path

import pytest

from bench import table
from bench.layout import NOT_YET

ROOT = Path(__file__).parents[2]


def machine(device="cpu", name="a processor"):
    versions = {"torch": "2", "python": "3", "triton": "4", "liger-kernel": "5", "cuda": "13.0", "driver": "580"}
    return {"hardware": {"device": device, "name": name, "threads": 2}, "versions": versions}


def row(subject, group, implementation, milliseconds, device="cpu", **info):
    """As pytest-benchmark writes it."""
    seconds = milliseconds / 1e3
    name = f"test_it[{group}-{implementation}]"
    return {
        "group": f"{subject} {group}", "name": name, "fullname": f"bench/bench_{subject.replace('-', '_')}.py::{name}",
        "param": "", "params": {}, "extra_info": {"device": device, "row": implementation, **info},
        "stats": {"median": seconds, "q1": 0.9 * seconds, "q3": 1.1 * seconds, "min": seconds,
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


# What no page shows yet: rows of a GPU. Those of a CPU stand in the pages


def kernel(group, implementation, milliseconds, device="cuda", **info):
    return row("kernels", group, implementation, milliseconds, device, **{
        "backend": "triton", "pass": "backward", "classes": 1000, "rows": 4096, "hidden": 0, "dtype": "fp32", "teachers": 1,
        "bytes": 48_000_000, "copy_rate": 48e9, "error": 1e-7, "inputs": 32_000_000, "outputs": 16_000_000,
        "peak": 16_000_000} | info)  # fmt: skip


def test_kernels(kept):
    launch = {"pass": "forward", "bytes": 800, "classes": 2, "rows": 32, "left_out": {"torch.compile": "out of memory"}}
    fused = {"operations": 2e9, "product_rate": 1e12, "hidden": 64, "pass": "fused"}
    times = {"ours": 0.02, "eager": 0.2, "graph": 0.004, "liger": 0.1}
    file = kept(run(kernel("a", "ours", 2, "cpu"), kernel("a", "eager", 9, "cpu", peak=64_000_000)), run(
        *(kernel("b", name, time, **launch) for name, time in times.items()),
        kernel("c", "ours", 3, **fused), kernel("c", "eager", 6, **fused), name="a GPU",
    ))  # fmt: skip
    gpu, cpu = table.render(file).split("On a CPU")
    assert gpu.startswith("On a GPU, `triton` kernels:")
    assert "| forward | 32 x 2 | fp32 | 1 | 20 µs (4 µs as a CUDA graph) |  | 10 x |  | 5.0 x |  |  |" in gpu
    assert "| last layers and loss | 4,096 x 1,000, hidden 64 | fp32 | 1 | 3 ms | 67 % (products) | 2.0 x |" in gpu
    assert gpu.count("torch.compile is left out: out of memory.") == 1
    assert "a GPU, torch 2, triton 4, liger-kernel 5, CUDA 13.0, driver 580, Python 3." in gpu
    assert "| forward and backward | 4,096 x 1,000 | fp32 | 1 | 2 ms | 50 % | 4.5 x |  |  | 1.00 | 2.00 |" in cpu


def step(implementation, milliseconds, device="cuda", batch=32, **info):
    seconds = milliseconds / 1e3
    return row("steps", f"kd {batch}", implementation, milliseconds, device, **{
        "models": "models", "method": "kd", "batch": batch, "length": 64, "teachers": 1, "precision": "fp32",
        "full": False, "examples_per_second": batch / seconds, "mfu": 1e9 / seconds / 1e12, "peak": 2**30,
        "error": 1e-6} | info)  # fmt: skip


def test_steps(kept):
    waits = {"batch": 8, "left_out": {"graph": "the step waits."}}
    file = kept(run(
        step("plain", 40), step("plain, fused", 30, peak=2**31), step("engine", 20), step("graph", 5),
        step("plain", 10, **waits), step("engine", 20, **waits), name="a GPU",
    ))  # fmt: skip
    rendered = table.render(file)
    small = "| kd | 1 | 8 x 64 | fp32 | 10 ms | 20 ms | 0.50 x |  |  | 400 | 5 % | 1.00 GiB | 1.00 |"
    large = "| kd | 1 | 32 x 64 | fp32 | 30 ms | 20 ms | 1.50 x | 5 ms | 6.00 x | 6,400 | 20 % | 1.00 GiB | 0.50 |"
    assert f"{small}\n{large}" in rendered and NOT_YET not in rendered
    assert rendered.count("graph is left out: the step waits.") == 1
    assert "The engine is the slower one in 1 of 2 cases." in rendered
    short = table.render(file, short=True).splitlines()
    assert short[2] == "| kd | 1 | 32 x 64 | fp32 | 30 ms | 20 ms | 1.50 x | 0.50 |" and len(short) == 5
    many = [step(name, 40, batch=8 + n, full=n > 3) for n in range(40) for name in ("plain", "engine")]
    rendered = table.render(kept(run(*many)))
    assert rendered.count("| kd |") == 4
    assert "36 more cases stand in `bench/results/steps.json`." in rendered


def test_time_machine(kept):
    def copies(group, implementation, milliseconds, **info):
        weights = {"pass": group, "weights": 1_000_000, "copy_rate": 20e9, "bytes": 24_000_000}
        return row("time-machine", group, implementation, milliseconds, "cuda", **weights | info)

    whole = {"precision": "bf16", "models": "models", "batch": 32, "length": 128}
    times = {"device": 100, "pinned": 103, "device, graph": 50, "pinned, graph": 51}
    steps = (copies("meta-step", store, time, **whole) for store, time in times.items())
    rendered = table.render(kept(run(copies("pilot", "time machine, pinned", 2), *steps)))
    assert "| time machine, pinned host memory |  |  |  | 2 ms | 12 | 60 % |" in rendered
    assert (
        "Snapshots in pinned host memory add +3.0 % to an eager step of 100 ms and +2.0 % to a CUDA graph's of 50 ms "
        "(models, 32 x 128, bf16)."
    ) in rendered


# Whole runs


def test_what_is_kept_of_runs(tmp_path, capsys):
    """A run's summary has what a row has, under another name, and the machine's folders besides."""
    rows = json.loads((ROOT / "bench" / "results" / "sst2.json").read_text())["rows"][:2]
    for i, row in enumerate(rows):
        (tmp_path / str(i)).mkdir()
        settings = row["settings"] | dict.fromkeys(("teachers", "student", "data", "output", "cache_dir"), "/somewhere")
        student = row["student"] | {"source": "/somewhere"}
        teachers = [teacher | {"name": "t", "source": "/somewhere"} for teacher in row["teachers"]]
        summary = row | {"device": row["hardware"], "settings": settings, "student": student, "teachers": teachers}
        (tmp_path / str(i) / "summary.json").write_text(json.dumps(summary))
    table.main(["collect", *(str(tmp_path / str(i)) for i in range(2))])
    assert json.loads(capsys.readouterr().out) == {"kind": "runs", "rows": rows}
