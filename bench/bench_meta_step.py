"""The meta-gradient by strategy: time and memory growth beside a plain KD step, at MiniLM size on the CPU in float32.

Teacher of 6 layers, student of 3 (width 384, vocabulary 30,522, random weights), batch 32, one quiz batch of 32, fixed
length L, M pilot steps. Memory growth is the highest resident memory during a step over what was resident before it.
"""

from __future__ import annotations

import ctypes
import gc
from statistics import median

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import BertConfig, BertForSequenceClassification

from engine.batch import Batch
from engine.metagrad import STRATEGIES
from engine.network import Network
from engine.objectives import Objective
from engine.time_machine import TimeMachine

BATCH, ROUNDS = 32, 3


def network(layers: int) -> Network:
    config = BertConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=12,
        attn_implementation="sdpa",
    )  # fmt: skip
    return Network(f"{layers} layers", BertForSequenceClassification(config), "words")


def batch(length: int) -> Batch:
    ids = torch.randint(1000, 30_000, (BATCH, length))
    return Batch(torch.randint(2, (BATCH,)), {"words": {"input_ids": ids, "attention_mask": torch.ones_like(ids)}})


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    student, teacher = network(3), network(6)
    student.module.train()
    teacher.module.eval()
    with sdpa_kernel(SDPBackend.MATH):
        yield student, teacher, TimeMachine(student.module)


def meta_gradient(models, strategy: str, pilots: list[Batch], quiz: list[Batch]) -> None:
    student, teacher, time_machine = models
    teacher.module.zero_grad(set_to_none=False)  # the gradients' memory is there before and after, as in training
    STRATEGIES[strategy](student, [teacher], time_machine, pilots, quiz, Objective(), 5e-5)


def kd_gradient(models, batches: list[Batch]) -> None:
    """The same passes as a KD step on each batch, without its optimizer: what the meta-gradient is to be beside."""
    student, teacher, _ = models
    weights = list(student.trainable().values())
    for each in batches:
        with torch.no_grad():
            logits = teacher(each)
        torch.autograd.grad(Objective().distil(student(each), [logits], each.labels), weights, allow_unused=True)


def memory(field: str) -> int:
    """Bytes of /proc/self/status: VmRSS is resident now, VmHWM its highest since `reset_peak`."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(field + ":"))


def release() -> None:
    """Give back what was freed: glibc keeps it resident, and a step would then seem to need nothing."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def reset_peak() -> None:
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")


def test_strategies_agree(models):
    """Before anything is timed: float32 gradients of a teacher, relative to the exact one."""
    teacher, found = models[1].module, {}
    pilots, quiz = [batch(16), batch(16)], [batch(16)]
    for strategy in STRATEGIES:
        torch.manual_seed(1)
        meta_gradient(models, strategy, pilots, quiz)
        found[strategy] = torch.cat([p.grad.flatten() for p in teacher.parameters()])
    exact = found["exact"]
    assert exact.norm() > 0
    assert (found["double_backward"] - exact).norm() < 1e-4 * exact.norm()
    assert (found["finite_difference"] - exact).norm() < 0.1 * exact.norm()


LONG = [pytest.param(128, 3)]
SHORT = [(32, 1), (32, 3), (128, 1)]


@pytest.mark.parametrize(("length", "pilots"), SHORT + LONG)
@pytest.mark.parametrize("strategy", ["kd", *STRATEGIES])
def test_meta_step(benchmark, record, request, models, strategy, length, pilots):
    if (length, pilots) == (128, 3) and not request.config.getoption("--full"):
        pytest.skip("takes minutes; --full runs it")
    torch.manual_seed(2)
    batches, quiz = [batch(length) for _ in range(pilots)], [batch(length)]

    def step() -> None:
        if strategy == "kd":
            kd_gradient(models, batches)
        else:
            meta_gradient(models, strategy, batches, quiz)

    step()  # allocates what is kept
    release()
    before = memory("VmRSS")
    reset_peak()
    step()
    growth = memory("VmHWM") - before
    benchmark.pedantic(step, rounds=ROUNDS)
    times = benchmark.stats.stats.data
    row = {"strategy": strategy, "length": length, "pilots": pilots, "growth": growth,
           "seconds": median(times), "fastest": min(times), "slowest": max(times)}  # fmt: skip
    benchmark.extra_info.update(row)
    record(**row)
