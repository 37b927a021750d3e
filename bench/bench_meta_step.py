"""The meta-step on the CPU at MiniLM size, beside the published loop and plain KD: time, memory, FLOPs.

Teacher of 6 layers, student of 3 (width 384, vocabulary 30,522, random weights, dropout 0.1), batch and quiz batch of 32. A
step is a whole one: pilot, quiz, meta-gradient, the teacher's AdamW, rewind, the student's AdamW.

    equal shapes    float32, every example 128 tokens long: the published loop and each strategy, plain KD on both sides
    lengths         every strategy and checkpointing at 64, 128, 256 and 512 tokens, 4,096 tokens a batch at most
    pilot steps     exact with M = 1, 2, 4
    as shipped      `python -m engine.train` on SST-2's own lengths, beside the published loop padded to 128, in one run

    pytest bench/bench_meta_step.py --full --save

Without --full the strategies are only compared: `bench_steps.py` has the short rows.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from bench.baselines.published_loop import PublishedLoop
from bench.measure import flops, measure
from bench.step_cases import LR, SETTINGS, SIZES, Case, Setting, as_dict, engine_step, masters, plain_step
from engine.losses.objectives import Objective
from engine.meta.meta_step import MetaStep
from engine.meta.strategies import STRATEGIES
from engine.models.network import Encoder

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
CPU, SIZE = torch.device("cpu"), SIZES["minilm"]
ROUNDS, BATCH, LENGTH = 3, 32, 128


@pytest.fixture
def full(request) -> None:
    if not request.config.getoption("--full"):
        pytest.skip("--full runs it")


def setting(method: str, length: int = LENGTH, size: int = BATCH, pilots: int = 1) -> Setting:
    return Setting(Case(method, size, length, 1), SIZE, CPU, pilots)


def step_of(how: str, length: int, size: int = BATCH, pilots: int = 1, **meta):
    """A step function of the engine: "kd" or a strategy."""
    if how == "kd":
        return engine_step(setting("kd", length, size))[1]
    return engine_step(setting("metadistil", length, size, pilots), strategy=how, **meta)[1]


def test_everything_agrees_before_it_is_timed():
    """float32, no dropout (masks differ where a layer runs on one token): the teacher's meta-gradient, from all."""
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


EQUAL = {
    "published loop": lambda: plain_step(setting("metadistil"))[1],
    "plain KD in PyTorch": lambda: plain_step(setting("kd"))[1],
    "kd": lambda: step_of("kd", LENGTH),
    "exact": lambda: step_of("exact", LENGTH),
    "exact, checkpointing teachers": lambda: step_of("exact", LENGTH, checkpointing="teachers"),
    "double_backward": lambda: step_of("double_backward", LENGTH),
    "finite_difference": lambda: step_of("finite_difference", LENGTH),
    "first_order": lambda: step_of("first_order", LENGTH),
}


@pytest.mark.parametrize("row", EQUAL)
def test_equal_shapes(full, record, row):
    step = EQUAL[row]()
    found = measure(step, ROUNDS)
    record(part="equal", row=row, flops=flops(step), **found)


# 512 tokens of double_backward without checkpointing would not fit otherwise
LENGTHS = {64: 32, 128: 32, 256: 16, 512: 8}
CHOICES = [("kd", "none"), *((s, c) for s in ("exact", "double_backward") for c in ("none", "student", "teachers", "both")),
           ("finite_difference", "none"), ("first_order", "none")]  # fmt: skip


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("strategy", "checkpointing"), CHOICES)
def test_lengths(full, record, strategy, checkpointing, length):
    meta = {} if strategy == "kd" else {"checkpointing": checkpointing}
    found = measure(step_of(strategy, length, LENGTHS[length], **meta), ROUNDS)
    record(part="lengths", row=strategy, checkpointing=checkpointing, length=length, batch=LENGTHS[length], **found)


@pytest.mark.parametrize("pilots", [1, 2, 4])
def test_pilot_steps(full, record, pilots):
    record(part="pilots", row="exact", pilots=pilots, **measure(step_of("exact", 64, pilots=pilots), ROUNDS))


@pytest.fixture(scope="module")
def sst2(tmp_path_factory):
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


@pytest.mark.parametrize(("row", "precision"), RUNS)
def test_as_shipped(full, record, sst2, tmp_path, row, precision):
    """One run of all rows, so that each can be held against any other."""
    shipped = published if row == "published loop" else trained
    record(part="shipped", row=row, precision=precision, **shipped(sst2, tmp_path, row, precision))


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
