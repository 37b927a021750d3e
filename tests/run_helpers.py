"""What the tests of the command share: tiny data, the flags of a run of under a second, and how to start one."""

import json
import os
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.embedded import generate
from engine.telemetry.monitor import Monitor
from engine.train import main

ROOT = Path(__file__).parents[1]
SIZES = {"train-size": 64, "quiz-size": 12, "validation-size": 12, "test-size": 12, "max-length": 16, "batch-size": 16,
         "epochs": 1, "prepare-epochs": 1}  # fmt: skip


def sentences(count: int = 120, seed: int = 0) -> list[tuple[str, int]]:
    return generate(count, seed)


def table(path: Path, rows, header: str = "sentence\tlabel") -> Path:
    path.write_text("\n".join([header, *("\t".join(map(str, row)) for row in rows)]) + "\n", encoding="utf-8")
    return path


def flags(data: Path | str, output: Path | str | None = None, **changes) -> list[str]:
    """A whole command line; `changes` are flags with underscores, True for a switch, None to leave one out."""
    settings = {"source": "embedded", "teachers": "bert", "student": "distilbert", "data": data, **SIZES}
    settings |= {"output": output} | {name.replace("_", "-"): value for name, value in changes.items()}
    words = []
    for name, value in settings.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not None:
            words += [f"--{name}", str(value)]
    return words


def job(words: list[str], page: bool = False) -> int:
    """Run the command in this process; returns its exit status. Drawing the page takes half the time of such a run, so that it
    is left out where no test looks at it."""
    with pytest.MonkeyPatch.context() as patch:
        if not page:
            patch.setattr("engine.run.results._write_page", lambda output, console: None)
        return main(words)


def succeed(*arguments, page: bool = False, **changes) -> Path:
    """`job` of a whole command line; returns its output directory."""
    words = flags(*arguments, **changes)
    assert job(words, page) == 0, words
    return Path(words[words.index("--output") + 1])


def succeed_saying(*arguments, **changes) -> tuple[Path, str]:
    """`succeed`, and what it said."""
    with redirect_stdout(StringIO()) as said:
        return succeed(*arguments, **changes), said.getvalue()


def start(words: list[str], **options) -> subprocess.Popen:
    """The command in a process of its own, as a user starts it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.Popen([sys.executable, "-m", "engine.train", *words], cwd=ROOT, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)  # fmt: skip


class Killed(BaseException):
    """Takes the place of a kill, for a run in this process."""


def stop(words: list[str], phase: str, step: int, number: int | None = None) -> int:
    """Run the job in this process, which gets a signal right after `step` of `phase` is logged, or without one is "killed".

    Returns the exit status. A real kill is `run_signalled`.
    """
    log, numbers = Monitor.log, [number]

    def logged(self, name, at, values):
        log(self, name, at, values)
        if name == phase and at >= step and numbers:
            if (number := numbers.pop()) is None:
                raise Killed
            os.kill(os.getpid(), number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Monitor, "log", logged)
        try:
            return job(words)
        except Killed:
            return -signal.SIGKILL


SIGNALLED = """
import os, sys
from engine.telemetry.monitor import Monitor
from engine.train import main

phase, step, log = sys.argv[1], int(sys.argv[2]), Monitor.log
signals = [int(number) for number in sys.argv[3].split(",")]

def logged(self, name, at, values):
    log(self, name, at, values)
    while name == phase and at >= step and signals:
        os.kill(os.getpid(), signals.pop(0))

Monitor.log = logged
sys.exit(main(sys.argv[4:]))
"""


def run_signalled(words: list[str], phase: str, step: int, *numbers: int) -> subprocess.CompletedProcess:
    """The command in a process of its own, which gets these signals right after it has logged `step` of `phase`."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, "-c", SIGNALLED, phase, str(step), ",".join(str(int(n)) for n in numbers), *words]
    return subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=300, check=False)


def weights(folder: Path) -> dict:
    return load_file(folder / "model.safetensors")


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every path below `folder`, with the bytes of each file."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_models(one: Path, two: Path) -> None:
    names = ["student", *(f"teachers/{p.name}" for p in sorted((one / "teachers").glob("*")))]
    assert names == ["student", *(f"teachers/{p.name}" for p in sorted((two / "teachers").glob("*")))]
    for name in names:
        first, second = weights(one / name), weights(two / name)
        assert first.keys() == second.keys()
        different = [key for key in first if not torch.equal(first[key], second[key])]
        assert not different, (name, different)


# Figures of a log line that no two runs share begin so
MEASURED = (
    "time",
    "step_seconds",
    "seconds/",
    "examples_per",
    "tokens_per",
    "flops_per",
    "joules",
    "memory/",
    "host/",
    "device/",
)


def assert_as_if_nothing_had_happened(run: Path, whole: Path) -> None:
    assert_same_models(run, whole)
    lines = [
        [{k: v for k, v in line.items() if not k.startswith(MEASURED)} for line in metrics(r)] for r in (run, whole)
    ]
    assert lines[0] == lines[1], [pair for pair in zip(*lines, strict=False) if pair[0] != pair[1]]
    assert summary(run)["metrics"] == summary(whole)["metrics"]
    assert {p.name for p in run.iterdir()} ^ {p.name for p in whole.iterdir()} <= {"report.html"}
