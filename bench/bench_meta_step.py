"""The meta-step on the CPU at MiniLM size, beside the published loop and plain KD: time, memory, FLOPs.

Teacher of 6 layers, student of 3 (width 384, vocabulary 30,522, random weights, dropout 0.1), batch and quiz batch of 32. A
step is a whole one: pilot, quiz, meta-gradient, the teacher's AdamW, rewind, the student's AdamW.

    equal shapes    float32, every example 128 tokens long: the published loop and each strategy, plain KD on both sides
    lengths         every strategy and checkpointing at 64, 128, 256 and 512 tokens, 4,096 tokens a batch at most
    pilot steps     exact with M = 1, 2, 4
    as shipped      `python -m engine.train` on SST-2's own lengths, beside the published loop padded to 128, in one run

    pytest bench/bench_meta_step.py --full --benchmark-json meta-step.json

Without --full only equal shapes and pilot steps run; `bench_steps.py` has shorter rows.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from bench.baselines.published_loop import PublishedLoop
from bench.measure import flops, growth
from bench.replay import Clock, Group, replay
from bench.step_cases import LR, SETTINGS, SIZES, Case, Setting, as_dict, engine_step, masters, plain_step
from engine.losses.objectives import Objective
from engine.meta.meta_step import MetaStep
from engine.meta.strategies import STRATEGIES
from engine.models.network import Encoder

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
CPU, SIZE = torch.device("cpu"), SIZES["minilm"]
ROUNDS, BATCH, LENGTH = 3, 32, 128

Step = Callable[[], Any]
SettingOf = Callable[..., Setting]


@pytest.fixture(scope="module")
def setting(request) -> SettingOf:
    """`setting(method, length, size, pilots)`; with --small a miniature of it."""
    small = request.config.getoption("--small")

    def setting(method: str, length: int = LENGTH, size: int = BATCH, pilots: int = 1) -> Setting:
        case = Case(method, 4, length // 8, 1) if small else Case(method, size, length, 1)
        return Setting(case, SIZES["miniature"] if small else SIZE, CPU, pilots)

    return setting


@pytest.fixture(scope="module")
def full(request) -> None:
    if not request.config.getoption("--full"):
        pytest.skip("--full runs it")


@pytest.fixture(scope="module")
def checked(setting) -> None:
    """Before anything is timed, all agree on the teacher's meta-gradient: float32, no dropout (masks differ where a layer
    runs on one token)."""
    given = setting("metadistil", 16)
    (pilot,), (quiz,) = given.batches()
    student, (teacher,) = given.models(attention="eager", dropout=False)
    PublishedLoop(student, [teacher], **LR, **SETTINGS, length=16).meta_gradient(as_dict(pilot), as_dict(quiz))
    expected = {n: p.grad for n, p in teacher.named_parameters()}
    size = torch.stack([g.norm() for g in expected.values()]).norm()
    tolerance = {"exact": 1e-4, "double_backward": 1e-4, "finite_difference": 0.1}
    for strategy in STRATEGIES:
        student, (teacher,) = given.models(dropout=False)
        networks = Encoder("student", student, "words"), [Encoder("teacher", teacher, "words")]
        MetaStep(*networks, Objective(**SETTINGS), pilot_lr=LR["pilot_lr"], strategy=strategy).meta_gradient(
            [pilot], [quiz]
        )
        found = {n: p.grad for n, p in teacher.named_parameters()}
        apart = torch.stack([(found[n] - g).norm() for n, g in expected.items()]).norm()
        if strategy in tolerance:
            assert apart < tolerance[strategy] * size, strategy
        else:
            assert 0 < apart < 10 * size  # biased


@pytest.fixture
def time_step(checked, in_time, benchmark) -> Callable[..., None]:
    """Times a step, and keeps beside it how much memory it needs and what is given."""

    def time_step(step: Step, **info: Any) -> None:
        benchmark.extra_info.update(info, device="cpu")
        if benchmark.enabled:
            benchmark.extra_info["growth"] = growth(step)
        benchmark.pedantic(step, rounds=ROUNDS)

    return time_step


def step_of(given: Setting, strategy: str, **meta: Any) -> Step:
    """A strategy's step, or "kd"."""
    return engine_step(given, **({} if strategy == "kd" else {"strategy": strategy, **meta}))[1]


EQUAL = {
    "published loop": lambda setting: plain_step(setting("metadistil"))[1],
    "plain KD in PyTorch": lambda setting: plain_step(setting("kd"))[1],
    "kd": lambda setting: step_of(setting("kd"), "kd"),
    "exact": lambda setting: step_of(setting("metadistil"), "exact"),
    "exact, checkpointing teachers": lambda setting: step_of(setting("metadistil"), "exact", checkpointing="teachers"),
    "double_backward": lambda setting: step_of(setting("metadistil"), "double_backward"),
    "finite_difference": lambda setting: step_of(setting("metadistil"), "finite_difference"),
    "first_order": lambda setting: step_of(setting("metadistil"), "first_order"),
}


@pytest.mark.benchmark(group="meta-step equal shapes")
@pytest.mark.parametrize("row", EQUAL)
def test_equal_shapes(time_step, setting, row):
    step = EQUAL[row](setting)
    time_step(step, part="equal", row=row, flops=flops(step))


@pytest.mark.benchmark(group="meta-step pilot steps")
@pytest.mark.parametrize("pilots", [1, 2, 4])
def test_pilot_steps(time_step, setting, pilots):
    time_step(step_of(setting("metadistil", 64, pilots=pilots), "exact"), part="pilots", row="exact", pilots=pilots)


# 512 tokens of double_backward without checkpointing would not fit otherwise
LENGTHS = {64: 32, 128: 32, 256: 16, 512: 8}
CHOICES = [("kd", "none"), *((s, c) for s in ("exact", "double_backward") for c in ("none", "student", "teachers", "both")),
           ("finite_difference", "none"), ("first_order", "none")]  # fmt: skip


@pytest.mark.parametrize(
    "length",
    [pytest.param(n, marks=pytest.mark.benchmark(group=f"meta-step {size} x {n}")) for n, size in LENGTHS.items()],
)
@pytest.mark.parametrize(("strategy", "checkpointing"), CHOICES)
def test_lengths(full, time_step, setting, strategy, checkpointing, length):
    size = LENGTHS[length]
    given = setting("kd" if strategy == "kd" else "metadistil", length, size)
    step = step_of(given, strategy, checkpointing=checkpointing)
    time_step(step, part="lengths", row=strategy, checkpointing=checkpointing, length=length, batch=size)


@pytest.fixture(scope="module")
def sst2(full, tmp_path_factory):
    """4,000 rows of SST-2 and models of MiniLM's size whose heads count as trained, so that nothing is fine-tuned."""
    if not (SHARED / "data" / "sst2").exists() or not (SHARED / "models" / "minilm-l6-h384").exists():
        pytest.skip("SST-2 or MiniLM's tokenizer is not beside the project")
    folder = tmp_path_factory.mktemp("sst2")
    header, *lines = (SHARED / "data" / "sst2" / "train.tsv").read_text().splitlines()
    for name, part in {"train": lines[:4000], "quiz": lines[4000:4100], "validation": lines[4100:4164],
                       "test": lines[4164:4228]}.items():  # fmt: skip
        (folder / f"{name}.tsv").write_text("\n".join([header, *part]) + "\n")
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / "minilm-l6-h384")
    student, (teacher,) = masters(SIZE, 1, CPU).copies()
    for name, module in (("student", student), ("teacher", teacher)):
        module.config.id2label, module.config.label2id = {0: "0", 1: "1"}, {"0": 0, "1": 1}
        module.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


SHIPPED = {
    "finetune": ["--method", "finetune"],
    "kd": ["--method", "kd"],
    "kd, answers kept": ["--method", "kd", "--cache-teacher-logits"],
    "metadistil": ["--method", "metadistil"],
}
RUNS = [("published loop", "fp32"), *((row, precision) for precision in ("fp32", "bf16") for row in SHIPPED)]


@pytest.mark.benchmark(group="meta-step as shipped", timer=Clock())
@pytest.mark.parametrize(("row", "precision"), RUNS)
def test_as_shipped(full, checked, in_time, request, sst2, tmp_path, benchmark, row, precision):
    """One run of all rows, so that each can be held against any other. A row's time is that of its training alone."""
    shipped = published if row == "published loop" else trained
    found = shipped(sst2, tmp_path, row, precision)
    info = {"part": "shipped", "precision": precision, "device": "cpu", **found}
    clock = request.node.get_closest_marker("benchmark").kwargs["timer"]
    replay(benchmark, clock, Group({row: info}, {row: [info.pop("seconds")]}), row)


def published(sst2: Path, folder: Path, row: str, precision: str) -> dict:
    models = ["--student", str(sst2 / "student"), "--teacher", str(sst2 / "teacher")]
    return json.loads(output("bench.published_run", *models, "--data", str(sst2)).splitlines()[-1])


def trained(sst2: Path, folder: Path, row: str, precision: str) -> dict:
    method = SHIPPED[row]
    teachers = [] if row == "finetune" else ["--teachers", str(sst2 / "teacher")]
    output(
        "engine.train", *method, *teachers, "--student", str(sst2 / "student"), "--data", str(sst2), "--precision", precision,
        "--epochs", "1", "--output", str(folder / "run"), "--cache-dir", str(folder / "cache"),
    )  # fmt: skip
    summary = json.loads((folder / "run" / "summary.json").read_text())
    phase = summary["phases"][method[1]]
    answers = [p["seconds"] for name, p in summary["phases"].items() if name.startswith("answers of ")]
    return {
        "examples_per_second": phase["examples_per_second"], "seconds": phase["seconds"], "steps": phase["steps"],
        "padding_waste": summary["padding_waste"], "peak": summary["peak_memory"]["host"], "answers_seconds": sum(answers),
    }  # fmt: skip


def output(module: str, *arguments: str) -> str:
    """What a module prints. The shell between forks: a child of this process would begin with its peak of memory."""
    command = ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout
