"""The meter on a CUDA device: eager work, captured work, memory."""

import time

import pytest
import torch

from engine.models.cuda_graph import StepGraphs
from engine.sections import listening, section
from engine.telemetry.meter import CudaMeter

pytestmark = [
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]  # fmt: skip
CUDA = torch.device("cuda")
SIZE, LONG = 2048, 8  # products of one section, and how many times as many the other has


@pytest.fixture
def matrix():
    return torch.randn(SIZE, SIZE, device=CUDA) / SIZE**0.5


def step(x):
    with section("pilot"):
        y = x @ x
    with section("quiz"):
        for _ in range(LONG):
            y = y @ x
    return {"loss": y.sum()}


@pytest.mark.parametrize("captured", [False, True])
def test_sections_add_up(matrix, captured):
    """Device time from the first mark to the last, which the host's clock brackets; also of marks inside a graph."""
    graphs, meter = StepGraphs(step, CUDA, "on"), CudaMeter(CUDA)
    call = graphs if captured else step
    with listening(meter):
        for _ in range(5):
            call(matrix)
        torch.cuda.synchronize()
        meter.take()
        started = time.perf_counter()
        for _ in range(100):
            with section("data wait"):
                pass
            call(matrix)
        taken = meter.take()
        seconds = time.perf_counter() - started
    assert graphs.captured == captured
    assert sum(taken.values()) == pytest.approx(seconds, rel=0.03, abs=2e-4)
    assert taken["quiz"] / taken["pilot"] == pytest.approx(LONG, rel=0.25)
    assert taken["pilot"] + taken["quiz"] > 0.8 * seconds


def test_marks_change_nothing_in_a_graph(matrix):
    plain = StepGraphs(step, CUDA, "on")
    expected = [plain(matrix)["loss"].clone() for _ in range(6)][-1]
    marked, meter = StepGraphs(step, CUDA, "on"), CudaMeter(CUDA)
    with listening(meter):
        found = [marked(matrix)["loss"].clone() for _ in range(6)][-1]
    assert torch.equal(found, expected)


def test_memory_by_section(matrix):
    meter = CudaMeter(CUDA)
    meter.watch(True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with listening(meter):
        with section("pilot"):
            big = torch.empty(2**26, dtype=torch.uint8, device=CUDA)
            del big
        with section("quiz"):
            small = torch.empty(2**22, dtype=torch.uint8, device=CUDA)
            del small
    assert meter.memory["pilot"] - before >= 2**26
    assert 2**22 <= meter.memory["quiz"] - before < 2**26
    assert meter.peak() >= before + 2**26
