"""Batches made ahead of time on a GPU: the copies are waited for, and nothing is in a graph's way. Needs torch and numpy alone."""

import time

import numpy as np
import pytest
import torch

from engine.batch import Batch
from engine.data.batches import TrainingBatches, training_rows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class Long:
    """1,920 examples of 32,768 tokens that tell rows and positions apart: batches of 32 have 8 MB."""

    widths = np.arange(32 * 60) % 7

    def __len__(self):
        return len(self.widths)

    def batch(self, rows, epoch=0):
        ids = torch.tensor(rows)[:, None] * 1000 + torch.arange(32_768)
        return Batch(torch.tensor(rows), {"a": {"input_ids": ids}})


@pytest.fixture
def device():
    return torch.device("cuda", torch.cuda.current_device())


def read(batch):
    return torch.cat([batch.labels, batch.inputs["a"]["input_ids"].sum(1)])


def expected():
    return [read(Long().batch(rows)) for rows in training_rows(Long.widths, 32, 0, 0)]


def test_batches_are_those_on_the_cpu(device):
    """They are read at once and forgotten, while the device is busy and memory goes round."""
    found, busy = [], torch.randn(2048, 2048, device=device)
    for batch in TrainingBatches(Long(), 32, 0, device).epoch(0):
        assert batch.labels.device == batch.inputs["a"]["input_ids"].device == device
        for _ in range(5):
            busy = (busy @ busy).clamp(-1, 1)
        found.append(read(batch))
        del batch
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected(), strict=True))


def test_the_current_stream_waits_whichever_it_is(device):
    found, stream = [], torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        for batch in TrainingBatches(Long(), 32, 0, device).epoch(0):
            found.append(read(batch))
            del batch
    stream.synchronize()
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected(), strict=True))


def test_a_graph_is_captured_while_batches_are_made(device):
    """As `engine.models.cuda_graph` captures: with an eye on its own thread alone."""
    found, ones = [], torch.ones(4, device=device)
    for i, batch in enumerate(TrainingBatches(Long(), 32, 0, device).epoch(0)):
        found.append(read(batch))
        if i % 10 == 0:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                twice = ones * 2
                time.sleep(0.05)  # the thread allocates, pins and copies
            graph.replay()
            assert twice.tolist() == [2.0] * 4
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected(), strict=True))
