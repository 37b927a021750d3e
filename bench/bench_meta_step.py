"""The meta-step on the CPU at MiniLM size, beside the published loop and plain KD: time, memory, FLOPs.

Teacher of 6 layers, student of 3 (width 384, vocabulary 30,522, random weights, dropout 0.1 in the student), batch and
quiz batch of 32. A step is a whole one: pilot, quiz, meta-gradient, the teacher's AdamW, rewind, the student's AdamW.

    equal shapes    float32, every example 128 tokens long: the published loop and each strategy, plain KD on both sides
    lengths         every strategy and checkpointing at 64, 128, 256 and 512 tokens, 4,096 tokens a batch at most
    pilot steps     exact with M = 1, 2, 4
    as shipped      `python -m engine.train` on SST-2's own lengths in bf16, beside the published loop padded to 128
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from bench.baselines.published_loop import PlainKD, PublishedLoop
from bench.measure import flops, measure
from engine.batch import Batch
from engine.learner import Learner
from engine.meta_step import MetaStep
from engine.metagrad import STRATEGIES
from engine.methods import METHODS, State
from engine.network import Encoder
from engine.objectives import Objective

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
ROUNDS, BATCH, LENGTH = 3, 32, 128
LR = {"lr": 6e-5, "teacher_lr": 1e-5, "pilot_lr": 6e-5}
SETTINGS = {"temperature": 5.0, "alpha": 0.5}


def model(layers: int, attention: str = "sdpa", dropout: float = 0.1) -> BertForSequenceClassification:
    return BertForSequenceClassification(BertConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=12,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, attn_implementation=attention,
    ))  # fmt: skip


def models(**settings) -> tuple[BertForSequenceClassification, BertForSequenceClassification]:
    """Student and teacher, the same ones every time."""
    torch.manual_seed(0)
    return model(3, **settings), model(6, **settings).eval()


def batch(length: int, size: int = BATCH) -> Batch:
    ids = torch.randint(1000, 30_000, (size, length))
    return Batch(torch.randint(2, (size,)), {"words": {"input_ids": ids, "attention_mask": torch.ones_like(ids)}})


def plain(batch: Batch) -> dict[str, torch.Tensor]:
    return batch.inputs["words"] | {"labels": batch.labels}


def learner(module, name: str, lr: float, precision: str) -> Learner:
    network = Encoder(name, module, "words", precision)
    return Learner.adamw(network, lr=lr, steps=10_000, warmup_ratio=0.0, weight_decay=0.01, max_grad_norm=1.0)


def engine_step(how: str, length: int, size: int = BATCH, pilots: int = 1, precision: str = "fp32", **settings):
    """A step function of the engine: "kd" or a strategy."""
    student, teacher = models()
    student = learner(student, "student", LR["lr"], precision)
    batches, quiz = [batch(length, size) for _ in range(pilots)], [batch(length, size)]
    if how == "kd":
        state = State(student, Objective(**SETTINGS), [Encoder("teacher", teacher, "words", precision)])
        return lambda: METHODS["kd"].step(state, batches)
    teacher = learner(teacher, "teacher", LR["teacher_lr"], precision)
    step = MetaStep.of(student, [teacher.network], [teacher], None, Objective(**SETTINGS), pilot_lr=LR["pilot_lr"],
                       strategy=how, **settings)  # fmt: skip
    return lambda: step(batches, quiz)


def published_step(length: int = LENGTH, attention: str = "eager"):
    student, teacher = models(attention=attention)
    loop = PublishedLoop(student, [teacher], **LR, **SETTINGS, length=length)
    pilot, quiz = plain(batch(length)), plain(batch(length))
    return lambda: loop.step(pilot, quiz)


def plain_kd_step(length: int = LENGTH):
    student, teacher = models(attention="eager")
    kd, pilot = PlainKD(student, [teacher], lr=LR["lr"], **SETTINGS, length=length), plain(batch(length))
    return lambda: kd.step(pilot)


def test_everything_agrees_before_it_is_timed():
    """float32, no dropout (masks differ where a layer runs on one token): the teacher's meta-gradient, from all."""
    torch.manual_seed(1)
    pilot, quiz = batch(16), batch(16)
    student, teacher = models(attention="eager", dropout=0.0)
    PublishedLoop(student, [teacher], **LR, **SETTINGS, length=16).meta_gradient(plain(pilot), plain(quiz))
    expected = {n: p.grad for n, p in teacher.named_parameters()}
    size = torch.stack([g.norm() for g in expected.values()]).norm()
    tolerance = {"exact": 1e-4, "double_backward": 1e-4, "finite_difference": 0.1}
    for strategy in STRATEGIES:
        student, teacher = models(dropout=0.0)
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
    "published loop": published_step,
    "plain KD in PyTorch": plain_kd_step,
    "kd": lambda: engine_step("kd", LENGTH),
    "exact": lambda: engine_step("exact", LENGTH),
    "exact, checkpointing teachers": lambda: engine_step("exact", LENGTH, checkpointing="teachers"),
    "double_backward": lambda: engine_step("double_backward", LENGTH),
    "finite_difference": lambda: engine_step("finite_difference", LENGTH),
    "first_order": lambda: engine_step("first_order", LENGTH),
}


@pytest.mark.parametrize("row", EQUAL)
def test_equal_shapes(record, row):
    step = EQUAL[row]()
    found = measure(step, ROUNDS)
    record(part="equal", row=row, flops=flops(step), **found)


# 512 tokens of double_backward without checkpointing would not fit otherwise
LENGTHS = {64: 32, 128: 32, 256: 16, 512: 8}
CHOICES = [("kd", "none"), *((s, c) for s in ("exact", "double_backward") for c in ("none", "student", "teachers", "both")),
           ("finite_difference", "none"), ("first_order", "none")]  # fmt: skip


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("strategy", "checkpointing"), CHOICES)
def test_lengths(request, record, strategy, checkpointing, length):
    if length > 64 and not request.config.getoption("--full"):
        pytest.skip("takes minutes; --full runs it")
    settings = {} if strategy == "kd" else {"checkpointing": checkpointing}
    step = engine_step(strategy, length, LENGTHS[length], **settings)
    found = measure(step, ROUNDS)
    record(part="lengths", row=strategy, checkpointing=checkpointing, length=length, batch=LENGTHS[length], **found)


@pytest.mark.parametrize("pilots", [1, 2, 4])
def test_pilot_steps(record, pilots):
    found = measure(engine_step("exact", 64, pilots=pilots), ROUNDS)
    record(part="pilots", row="exact", pilots=pilots, **found)


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
    for name, module in zip(("student", "teacher"), models(), strict=True):
        module.config.id2label, module.config.label2id = {0: "0", 1: "1"}, {"0": 0, "1": 1}
        module.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("method", ["kd", "metadistil"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_as_shipped(record, sst2, tmp_path, method, precision):
    command = [
        sys.executable, "-m", "engine.train", "--method", method, "--teachers", str(sst2 / "teacher"), "--student",
        str(sst2 / "student"), "--data", str(sst2), "--precision", precision, "--epochs", "1", "--output", str(tmp_path / "run"),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    phase = summary["phases"][method]
    record(
        part="shipped", row=method, precision=precision, examples_per_second=phase["examples_per_second"],
        seconds=phase["seconds"], steps=phase["steps"], padding_waste=summary["padding_waste"],
        peak=summary["peak_memory"]["host"],
    )  # fmt: skip
