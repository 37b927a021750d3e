"""The check for a machine with a GPU: it needs few packages, goes on after a failure, keeps its time, and leaves what it found."""

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from bench import gpu_check
from bench.gpu_check import Part, check, main, parts
from bench.gpu_tests import MARK, gpu_tests, missing

ROOT = Path(__file__).parents[2]
LEAN = {"tests/models/test_cuda_graph_gpu.py", "tests/params/test_flat_gpu.py", "tests/kernels/test_kernels_gpu.py"}
LEAN |= {"tests/params/test_native.py", "tests/meta/test_time_machine.py"}
# What a lent machine need not have.
ABSENT = {
    "datasets", "dill", "multiprocess", "jsonargparse", "torchdata", "torchmetrics", "liger_kernel", "tensorboard", "rich",
    "peft", "hypothesis", "pyarrow", "pandas", "sklearn", "scipy",
}  # fmt: skip
SITE = f"""
import sys
from importlib.machinery import PathFinder

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {ABSENT} else super().find_spec(name, path, target)

sys.meta_path[:] = [Bare if finder is PathFinder else finder for finder in sys.meta_path]
"""


@pytest.fixture
def bare(tmp_path):
    """An environment whose Pythons, and theirs, find none of the absent packages; other plugins of pytest need them."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE)
    return {
        **os.environ,
        "PYTHONPATH": str(tmp_path / "site"),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTEST_PLUGINS": "pytest_benchmark.plugin",
        "CUDA_VISIBLE_DEVICES": "",
    }


def python(environment, *arguments):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


# Few packages


COLLECT = """
import sys, pytest
from importlib.util import find_spec
from bench import gpu_check
from bench.gpu_tests import gpu_tests
assert find_spec("datasets") is None and find_spec("hypothesis") is None
files, lacking = gpu_tests()
print(*(f"lacking {file}" for file in lacking), sep="\\n")
bench = [word for part in gpu_check.parts("cuda", gpu_check.OUT) for word in part.command if word.startswith("bench/bench_")]
assert len(bench) == 4
sys.exit(pytest.main(["--collect-only", "-q", *files, *bench]))
"""


def test_gpu_tests_and_benchmarks_can_be_imported_where_little_is_installed(bare):
    """A file that a GPU check is to run imports nothing else; move the test to a file of its own where one does."""
    done = python(bare, "-c", COLLECT)
    assert done.returncode == 0, done.stdout + done.stderr
    collected = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert LEAN | {f"bench/bench_{name}.py" for name in ("kernels", "steps", "telemetry", "time_machine")} <= collected
    lacking = [line.removeprefix("lacking ") for line in done.stdout.splitlines() if line.startswith("lacking ")]
    assert not [file for file in lacking if file in LEAN or file.endswith("_gpu.py")]


def test_all_marked_files_are_run_where_everything_is_installed():
    files, lacking = gpu_tests()
    marked = {
        f.relative_to(ROOT).as_posix()
        for f in (ROOT / "tests").rglob("test_*.py")
        if f"@{MARK}" in f.read_text() or f"[{MARK}" in f.read_text()
    }
    assert marked <= set(files) and not lacking


def test_missing_follows_imports(tmp_path):
    file = tmp_path / "test_it.py"
    file.write_text(
        "import os, absent_1\nfrom absent_2.part import x\n"
        "def f():\n    import absent_3\n"
        "try:\n    import absent_4\nexcept ImportError:\n    pass\n"
        "import typing\nif typing.TYPE_CHECKING:\n    import absent_5\n"
        "class A:\n    import absent_6\n"
    )
    assert missing(file) == {"absent_1", "absent_2", "absent_6"}
    found = gpu_check.ROOT / "tests" / "data" / "test_data_read.py"
    from bench import gpu_tests

    gpu_tests._installed.cache_clear()
    with pytest.MonkeyPatch.context() as patch:  # over the engine, and through a helper
        patch.setattr(gpu_tests, "find_spec", lambda name: None if name in ("datasets", "hypothesis") else name)
        assert "datasets" in missing(found)
        assert missing(ROOT / "tests" / "meta" / "test_time_machine_sequences.py") == {"hypothesis"}
        assert not missing(ROOT / "tests" / "meta" / "test_time_machine.py")
    gpu_tests._installed.cache_clear()


# What becomes of the parts


def test_a_gpu_is_asked_for(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_check, "check", lambda *given: pytest.fail("it ran"))
    assert main(["--out", str(tmp_path)]) == 2
    assert "no CUDA device is here" in capsys.readouterr().err
    assert main(["--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert (
        all(f"{part.name}: " in printed for part in parts("cuda", tmp_path))
        and "tests/kernels/test_kernels_gpu.py" in printed
    )


def test_pytest_benchmark_is_asked_for(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: None)
    monkeypatch.setattr(gpu_check, "check", lambda *given: 0)
    assert main(["--device", "cpu", "--out", str(tmp_path)]) == 2
    assert "kernels, time-machine, telemetry, steps need pytest-benchmark; install it" in capsys.readouterr().err
    assert main(["--device", "cpu", "--out", str(tmp_path), "--parts", "compile", "tests", "graphs"]) == 0


def test_parts(tmp_path):
    on_gpu, on_cpu = parts("cuda", tmp_path), parts("cpu", tmp_path)
    assert sum(part.share for part in on_gpu) == pytest.approx(1)
    graphs = next(part for part in on_gpu if part.name == "graphs")
    assert graphs.command[-1] == gpu_check.GRAPHS and (ROOT / gpu_check.GRAPHS).exists()
    assert gpu_check.GRAPHS not in next(part for part in on_gpu if part.name == "tests").command
    for one, other in zip(on_gpu, on_cpu, strict=True):
        assert (
            ("--small" in other.command) == ("--benchmark-only" in other.command) == ("--benchmark-only" in one.command)
        )
        assert "--small" not in one.command
    assert len(gpu_check.WRITTEN) <= 8  # what comes back from a lent machine
    assert set(gpu_check.WRITTEN) >= {f"{part.name}.json" for part in on_gpu if "--benchmark-only" in part.command}


def script(code):
    return [sys.executable, "-c", code]


WRITE = """
import sys
xml = sys.argv[-1].partition("=")[2]
open(xml, "w").write('<testsuites><testsuite name="pytest"><testcase name="a"/><testcase name="b">{inner}</testcase></testsuite></testsuites>')
"""
STUBBORN = """
import signal, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
time.sleep(60)
"""
POLITE = """
import sys, time
print("began", flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    open(sys.argv[-1].partition("=")[2], "w").write("<testsuites><testsuite><testcase/></testsuite></testsuites>")
    raise
"""


def test_every_part_runs_and_the_folder_holds_what_was_found(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_check, "STOP", 1.0)
    (tmp_path / "steps.json").write_text("{}")  # of an earlier run
    results = {"benchmarks": []}
    skipped = WRITE.format(inner='<skipped message="no time"/>')
    made = [
        Part("fails", "", 0.4, script("print('what went wrong'); raise SystemExit(3)"), tests=False),
        Part("passes", "", 0.1, script(WRITE.format(inner="")), some=True),
        Part("skips", "", 0.1, script(skipped), some=True),
        Part("all skipped", "", 0.1, script(skipped.replace('<testcase name="a"/>', "")), some=True),
        Part("writes", "", 0.1, script(f"import pathlib; pathlib.Path({str(tmp_path / 'kernels.json')!r}).write_text({json.dumps(json.dumps(results))})"), tests=False),
        Part("polite", "", 0.1, script(POLITE)),
        Part("stubborn", "", 0.1, script(STUBBORN), tests=False),
        Part("not chosen", "", 0.1, script("raise SystemExit(1)")),
    ]  # fmt: skip
    monkeypatch.setattr(gpu_check, "parts", lambda device, out: made)
    assert check(tmp_path, "cpu", 8.0, [part.name for part in made[:-1]]) == 4
    status = {part.name: part.status for part in made}
    assert status["fails"] == "failed (3)" and status["not chosen"] == "not run"
    assert status["passes"] == status["skips"] == status["writes"] == "passed"
    assert status["all skipped"] == "failed (no test ran)"
    assert status["polite"].startswith("out of time") and status["stubborn"].startswith("out of time")
    assert {f.name for f in tmp_path.iterdir()} <= set(gpu_check.WRITTEN)
    summary = (tmp_path / "summary.txt").read_text()
    assert "4 of 8 failed" in summary and "4 of 8 failed" in capsys.readouterr().out
    assert "1 passed, 1 skipped" in summary and "skipped 1: no time" in summary
    log = (tmp_path / "log.txt").read_text()
    assert "what went wrong" in log and "began" in log
    suites = ET.parse(tmp_path / "junit.xml").getroot()
    assert [suite.get("name") for suite in suites] == ["passes", "skips", "all skipped", "polite"]
    assert not (tmp_path / "steps.json").exists()
    assert "## kernels" in (tmp_path / "tables.md").read_text()


def test_time_that_is_left_is_the_next_ones(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(
        gpu_check, "run", lambda part, seconds, *more: seen.append(seconds) or setattr(part, "status", "passed")
    )
    made = [Part(name, "", share, []) for name, share in (("a", 0.5), ("b", 0.25), ("c", 0.25))]
    monkeypatch.setattr(gpu_check, "parts", lambda device, out: made)
    assert check(tmp_path, "cpu", 100.0, ["a", "b", "c"]) == 0
    assert seen == [pytest.approx(end, abs=5) for end in (50, 75, 100 - gpu_check.STOP)]


def test_results_that_make_no_table_are_a_failure(tmp_path):
    (tmp_path / "kernels.json").write_text('{"benchmarks": [{"device": "cpu"}], "machine_info": {}}')
    rendered, status = gpu_check.tables(tmp_path)
    assert status.startswith("failed (kernels.json: KeyError") and "KeyError" in rendered


@pytest.mark.slow
def test_the_whole_check_in_small_where_little_is_installed(bare, tmp_path):
    out = tmp_path / "out"
    done = python(bare, "-m", "bench.gpu_check", "--device", "cpu", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr + (out / "log.txt").read_text()
    assert {f.name for f in out.iterdir()} == set(gpu_check.WRITTEN)
    summary = (out / "summary.txt").read_text()
    assert "All passed" in summary and "needs a CUDA device" in summary
    for subject in ("kernels", "steps", "telemetry", "time-machine"):
        results = json.loads((out / f"{subject}.json").read_text())
        assert results["benchmarks"] and results["machine_info"]["hardware"]["device"] == "cpu"
        assert f"## {subject}" in (out / "tables.md").read_text()
    assert "Error" not in (out / "tables.md").read_text()
