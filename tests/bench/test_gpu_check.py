"""The check for a machine with a GPU: it needs few packages, goes on after a failure, keeps its time, and leaves what it found."""

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from importlib.util import find_spec
from pathlib import Path

import pytest

from bench import gpu_check, gpu_tests
from bench.gpu_check import Part, check, main, parts, run
from bench.gpu_tests import MARK, missing

ROOT = Path(__file__).parents[2]
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
def two_files(monkeypatch):
    """Two files of tests can run, and one that lacks a package is left out: parsing all files takes a while."""
    found = [gpu_check.GRAPHS, "tests/test_a.py"], {"tests/test_b.py": {"peft"}}
    monkeypatch.setattr(gpu_check, "gpu_tests", lambda: found)


# Few packages


def test_what_a_gpu_check_runs_imports_little(monkeypatch):
    """Move a test for a GPU to a file of its own where its file imports what a lent machine need not have."""
    files, lacking = gpu_tests.gpu_tests()
    tests = {f.relative_to(ROOT).as_posix(): f.read_text() for f in (ROOT / "tests").rglob("test_*.py")}
    marked = {name for name, text in tests.items() if f"@{MARK}" in text or f"[{MARK}" in text}
    assert len(marked) > 5 and marked <= set(files) and not lacking  # all of them, where everything is installed
    monkeypatch.setattr(gpu_tests, "_installed", lambda name: name not in ABSENT and find_spec(name) is not None)
    files, lacking = gpu_tests.gpu_tests()
    assert not [file for file in lacking if file.endswith("_gpu.py")]
    assert {"tests/params/test_native.py", "tests/meta/test_time_machine.py", gpu_check.GRAPHS} <= set(files)
    bench = [word for part in parts("cuda", ROOT) for word in part.command if word.startswith("bench/bench_")]
    assert len(bench) == 4 and not {package for file in bench for package in missing(ROOT / file)}
    assert "datasets" in missing(ROOT / "tests" / "data" / "test_data_read.py")  # over the engine, and through a helper
    assert missing(ROOT / "tests" / "meta" / "test_time_machine_sequences.py") == {"hypothesis"}


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


def test_a_gpu_and_pytest_benchmark_are_asked_for(two_files, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_check, "check", lambda *given: 0)
    assert main(["--out", str(tmp_path)]) == 2
    assert "no CUDA device is here" in capsys.readouterr().err
    assert main(["--dry-run", "--parts", "graphs", "tests"]) == 0
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == ["tests", "graphs"]
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: None)
    given = ["--device", "cpu", "--out", str(tmp_path)]
    assert main(given) == 2
    assert "kernels, time-machine, telemetry, steps need pytest-benchmark; install it" in capsys.readouterr().err
    assert main([*given, "--parts", "compile", "tests", "graphs"]) == 0


def test_parts(two_files, tmp_path):
    on_gpu, on_cpu = ({part.name: part.command for part in parts(device, tmp_path)} for device in ("cuda", "cpu"))
    assert list(on_gpu) == list(gpu_check.SHARES) and sum(gpu_check.SHARES.values()) == pytest.approx(1)
    assert on_gpu["graphs"][-1] == gpu_check.GRAPHS and on_gpu["tests"][-2:] == ["--durations=5", "tests/test_a.py"]
    timing = {name for name, command in on_gpu.items() if "--benchmark-only" in command}
    assert timing == {name for name, command in on_cpu.items() if "--small" in command} and len(timing) == 4
    assert not any("--small" in command for command in on_gpu.values())
    assert len(gpu_check.WRITTEN) <= 8  # what comes back from a lent machine
    assert set(gpu_check.WRITTEN) > {f"{name}.json" for name in timing}


# What becomes of the parts


def script(code):
    return [sys.executable, "-S", "-E", "-c", code]


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


def test_every_part_runs_and_the_folder_holds_what_was_found(two_files, tmp_path, capsys):
    (tmp_path / "steps.json").write_text("{}")  # of an earlier run
    results = json.dumps({"machine_info": {}, "benchmarks": [{"name": "nothing"}]})
    skipped = WRITE.format(inner='<skipped message="no time"/>')
    made = [
        Part("compile", "", script("print('what went wrong'); raise SystemExit(3)"), tests=False),
        Part("tests", "", script(WRITE.format(inner="")), some=True),
        Part("graphs", "", script(skipped), some=True),
        Part("steps", "", script(skipped.replace('<testcase name="a"/>', "")), some=True),
        Part("kernels", "", script(f"open({str(tmp_path / 'kernels.json')!r}, 'w').write({results!r})"), tests=False),
    ]  # fmt: skip
    assert check(tmp_path, "cpu", 60.0, made) == 3
    status = {part.name: part.status for part in made}
    assert status["compile"] == "failed (3)"
    assert status["tests"] == status["graphs"] == status["kernels"] == "passed"
    assert status["steps"] == "failed (no test ran)"
    assert {f.name for f in tmp_path.iterdir()} == {"summary.txt", "log.txt", "junit.xml", "tables.md", "kernels.json"}
    summary = (tmp_path / "summary.txt").read_text()
    assert "3 of 6 failed" in summary and "3 of 6 failed" in capsys.readouterr().out
    assert "1 passed, 1 skipped" in summary and "skipped 1: no time" in summary
    assert "tests/test_b.py: peft missing" in summary
    assert "what went wrong" in (tmp_path / "log.txt").read_text()
    suites = ET.parse(tmp_path / "junit.xml").getroot()
    assert [suite.get("name") for suite in suites] == ["tests", "graphs", "steps"]
    assert "failed (kernels.json: KeyError" in summary  # results that make no table
    assert "## kernels\n\nKeyError" in (tmp_path / "tables.md").read_text()


def test_a_part_that_is_out_of_time_is_interrupted_then_killed(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "STOP", 0.2)
    log, junit = tmp_path / "log.txt", tmp_path / "junit.xml"
    polite, stubborn = Part("tests", "", script(POLITE)), Part("compile", "", script(STUBBORN), tests=False)
    run(polite, 0.7, dict(os.environ), log, junit)
    assert polite.status == "out of time (1 s)" and polite.counts == {"passed": 1}  # what it had is written
    assert "began" in log.read_text()
    run(stubborn, 0.3, dict(os.environ), log, tmp_path / "none.xml")
    assert stubborn.status.startswith("out of time") and stubborn.took < 30


def test_time_that_is_left_is_the_next_ones(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(
        gpu_check, "run", lambda part, seconds, *more: seen.append(seconds) or setattr(part, "status", "passed")
    )
    made = [Part(name, "", []) for name in ("compile", "tests", "graphs")]
    assert check(tmp_path, "cpu", 100.0, made) == 0
    assert seen == [pytest.approx(end, abs=5) for end in (46, 77, 100 - gpu_check.STOP)]


@pytest.mark.slow
def test_the_whole_check_in_small_where_little_is_installed(tmp_path):
    """Its Pythons, and theirs, find none of the absent packages; other plugins of pytest need them."""
    (tmp_path / "sitecustomize.py").write_text(SITE)
    out = tmp_path / "out"
    bare = {"PYTHONPATH": str(tmp_path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "CUDA_VISIBLE_DEVICES": ""}
    bare |= {"PYTEST_PLUGINS": "pytest_benchmark.plugin"}
    command = [sys.executable, "-m", "bench.gpu_check", "--device", "cpu", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | bare, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr + (out / "log.txt").read_text()
    assert {f.name for f in out.iterdir()} == set(gpu_check.WRITTEN)
    summary = (out / "summary.txt").read_text()
    assert "All passed" in summary and "needs a CUDA device" in summary
    for subject in ("kernels", "steps", "telemetry", "time-machine"):
        results = json.loads((out / f"{subject}.json").read_text())
        assert results["benchmarks"] and results["machine_info"]["hardware"]["device"] == "cpu"
        assert f"## {subject}" in (out / "tables.md").read_text()
    assert "Error" not in (out / "tables.md").read_text()
