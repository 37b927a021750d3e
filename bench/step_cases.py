"""Whole training steps to be measured: models, batches, and the implementations of one method at one shape.

    plain           what people write in PyTorch, eager attention; for metadistil the published loop
    plain, fused    the same with transformers' default, fused attention; not metadistil, which needs second derivatives
    engine          the engine's step
    graph           the engine's step as a CUDA graph; on CUDA

Precision bf16 is autocast in the plain ones, the engine's own bf16 in the others. A metadistil step has one pilot batch and
one quiz batch of the same size, and every teacher learns.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

from bench.baselines.fine_tuning import PlainFineTuning
from bench.baselines.published_loop import PlainKD, PublishedLoop
from engine.batch import Batch
from engine.losses.objectives import Objective
from engine.meta.meta_step import MetaStep
from engine.methods import METHODS, State
from engine.models.cuda_graph import StepGraphs
from engine.models.learner import Learner
from engine.models.network import Encoder

LR = {"lr": 6e-5, "teacher_lr": 1e-5, "pilot_lr": 6e-5}
SETTINGS = {"temperature": 5.0, "alpha": 0.5}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DROPOUT = 0.1


class Size(NamedTuple):
    """Teachers are BERTs, the student a BERT or a DistilBERT of the same width."""

    title: str
    width: int
    heads: int
    teacher_layers: int
    student_layers: int
    student: str = "bert"
    vocabulary: int = 30_522


SIZES = {
    "base": Size("BERT-base teachers, a DistilBERT student", 768, 12, 12, 6, "distilbert"),
    "minilm": Size("teachers of 6 layers, a student of 3, width 384", 384, 12, 6, 3),
    "miniature": Size("miniatures", 16, 2, 2, 1, vocabulary=2_100),
    "miniature distilbert": Size("miniatures", 16, 2, 2, 1, "distilbert", vocabulary=2_100),
}


class Case(NamedTuple):
    method: str
    batch: int
    length: int
    teachers: int = 1  # 0 of finetune
    precision: str = "fp32"
    full: bool = False  # only with --full

    @property
    def name(self) -> str:
        teachers = f"-K{self.teachers}" if self.teachers else ""
        return f"{self.method}-{self.batch}x{self.length}{teachers}-{self.precision}"


def model(size: Size, layers: int, student: bool = False, dropout: float = DROPOUT) -> nn.Module:
    """A classifier of two classes, random weights."""
    if student and size.student == "distilbert":
        return DistilBertForSequenceClassification(DistilBertConfig(
            vocab_size=size.vocabulary, dim=size.width, hidden_dim=4 * size.width, n_layers=layers, n_heads=size.heads,
            dropout=dropout, attention_dropout=dropout,
        ))  # fmt: skip
    return BertForSequenceClassification(BertConfig(
        vocab_size=size.vocabulary, hidden_size=size.width, intermediate_size=4 * size.width, num_hidden_layers=layers,
        num_attention_heads=size.heads, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    ))  # fmt: skip


class Models(NamedTuple):
    """A student and its teachers."""

    student: nn.Module
    teachers: list[nn.Module]

    def copies(self, attention: str = "sdpa", dropout: bool = True) -> Models:
        """Of its own weights; attention "eager" or "sdpa", as transformers calls them."""
        found = copy.deepcopy(self)
        for module in (found.student, *found.teachers):
            module.config._attn_implementation = attention
            if not dropout:
                without_dropout(module)
        return found


def without_dropout(module: nn.Module) -> None:
    for each in module.modules():
        if isinstance(each, nn.Dropout):
            each.p = 0.0
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"):
        if hasattr(module.config, name):
            setattr(module.config, name, 0.0)


@lru_cache(maxsize=2)
def masters(size: Size, teachers: int, device: torch.device) -> Models:
    """The same ones every time; they are copied and stay as they are."""
    torch.manual_seed(0)
    student = model(size, size.student_layers, student=True).to(device)
    return Models(student, [model(size, size.teacher_layers).eval().to(device) for _ in range(teachers)])


def batch(size: Size, length: int, count: int, device: torch.device, seed: int) -> Batch:
    """`count` examples of `length` tokens, none of them padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1000, size.vocabulary, (count, length), generator=generator)
    labels = torch.randint(2, (count,), generator=generator)
    return Batch(labels, {"words": {"input_ids": ids, "attention_mask": torch.ones_like(ids)}}).to(device)


def as_dict(batch: Batch) -> dict[str, Tensor]:
    """The batch as transformers takes it."""
    return batch.inputs["words"] | {"labels": batch.labels}


class Setting(NamedTuple):
    """A case with what it is run on; implementations copy the models and share the batches."""

    case: Case
    size: Size
    device: torch.device
    pilots: int = 1  # batches a round, of the engine alone

    def models(self, **settings: Any) -> Models:
        return masters(self.size, self.case.teachers, self.device).copies(**settings)

    def batches(self) -> tuple[list[Batch], list[Batch]]:
        """Of a round, and its quiz batches."""
        found = [
            batch(self.size, self.case.length, self.case.batch, self.device, seed) for seed in range(self.pilots + 1)
        ]
        return found[1:], found[:1] if self.case.method == "metadistil" else []

    def implementations(self) -> dict[str, Callable[[], Callable[[], Any]]]:
        """By name, what builds a step: a call that takes one."""
        found = {"plain": lambda: plain_step(self)[1]}
        if self.case.method != "metadistil":
            found["plain, fused"] = lambda: plain_step(self, "sdpa")[1]
        found["engine"] = lambda: engine_step(self)[1]
        if self.device.type == "cuda":
            found["graph"] = lambda: graph_step(self)[1]
        return found


# Plain PyTorch


def plain_step(setting: Setting, attention: str = "eager", dropout: bool = True):
    """The object and a call that takes a step."""
    case = setting.case
    student, teachers = setting.models(attention=attention, dropout=dropout)
    (pilot,), quizzes = setting.batches()
    shared = {"length": case.length, "precision": case.precision}
    if case.method == "finetune":
        plain, batches = PlainFineTuning(student, lr=LR["lr"], **shared), [pilot]
    elif case.method == "kd":
        plain, batches = PlainKD(student, teachers, lr=LR["lr"], **SETTINGS, **shared), [pilot]
    else:
        plain, batches = PublishedLoop(student, teachers, **LR, **SETTINGS, **shared), [pilot, *quizzes]
    given = [as_dict(each) for each in batches]
    return plain, lambda: plain.step(*given)


# The engine


def learner(module: nn.Module, name: str, lr: float, precision: str) -> Learner:
    network = Encoder(name, module, "words", precision)
    return Learner.adamw(network, lr=lr, steps=10_000, warmup_ratio=0.0, weight_decay=0.01, max_grad_norm=1.0)


def state_of(setting: Setting, dropout: bool = True, **meta: Any) -> State:
    """What the engine's step works on; `meta` are settings of the meta-step, as `strategy` and `store`."""
    case, objective = setting.case, Objective(**SETTINGS)
    module, teachers = setting.models(dropout=dropout)
    student = learner(module, "student", LR["lr"], case.precision)
    if case.method == "finetune":
        return State(student, objective)
    if case.method == "kd":
        taught = [Encoder("teacher", t, "words", case.precision) for t in teachers]
        for network in taught:
            network.flatten()
        return State(student, objective, taught)
    learners = [learner(t, "teacher", LR["teacher_lr"], case.precision) for t in teachers]
    meta = {"pilot_lr": LR["pilot_lr"]} | meta
    step = MetaStep(student, learners, objective, **meta)
    return State(student, objective, meta_step=step)


def engine_step(setting: Setting, **settings: Any):
    """The state and a call that takes a step, with what the trainer does between two."""
    state, (batches, quizzes) = state_of(setting, **settings), setting.batches()
    step = METHODS[setting.case.method].step

    def call() -> dict[str, Tensor]:
        values = step(state, batches, quizzes)
        state.advance(len(batches))
        return values

    return state, call


class NotCaptured(RuntimeError):
    """There is no graph to be measured; the message says why."""


def graph_step(setting: Setting, capture: Any = None, **settings: Any):
    """As `engine_step`, captured: the steps before the graph are taken here. Raises NotCaptured."""
    state, (batches, quizzes) = state_of(setting, **settings), setting.batches()
    step = METHODS[setting.case.method].step
    graphs = StepGraphs(
        lambda batches, quizzes: step(state, batches, quizzes), setting.device, forget=state.forget, capture=capture
    )

    def call() -> dict[str, Tensor]:
        values = graphs(batches, quizzes)
        state.advance(len(batches))
        return values

    for _ in range(10):
        if graphs.captured or graphs.cause is not None:
            break
        call()
    if not graphs.captured:
        raise NotCaptured(graphs.cause or "no call captured a graph")
    return state, call
