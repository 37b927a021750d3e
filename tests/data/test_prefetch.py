"""Batches made ahead of time: their order, what goes wrong in the thread, and that the thread goes away."""

import multiprocessing
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch import Batch
from engine.data.batches import AHEAD, TrainingBatches, training_rows

CPU = torch.device("cpu")


class Numbers:
    """A split of n examples whose only token is their row number; `before` is called with the rows of each batch."""

    def __init__(self, n, before=lambda rows: None):
        self.widths, self.before, self.made, self.threads = np.arange(n) % 7, before, [], set()

    def __len__(self):
        return len(self.widths)

    def batch(self, rows, epoch):
        self.threads.add(threading.current_thread())
        self.before(rows)
        self.made.append(rows)
        ids = torch.tensor(rows)
        return Batch(ids, {"a": {"input_ids": ids[:, None]}, "b": {"input_ids": ids[:, None]}}, [[ids.float()]])


def rows_of(batches):
    return [batch.labels.tolist() for batch in batches]


def left():
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    assert not left()
    yield
    assert not left()


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    n=st.integers(1, 60), size=st.integers(1, 20), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 9),
    start=st.integers(0, 60),
)  # fmt: skip
def test_an_epoch_is_its_rows_from_any_start(n, size, seed, epoch, start):
    split = Numbers(n)
    batches = TrainingBatches(split, size, seed, CPU)
    expected = training_rows(split.widths, size, seed, epoch)
    assert len(batches) == len(expected)
    start = min(start, len(batches))
    assert rows_of(batches.epoch(epoch, start)) == expected[start:]
    assert split.made == expected[start:]  # and none was made that was not asked for
    assert rows_of(batches.epoch(epoch)) == expected


def test_a_thread_makes_them_a_few_ahead():
    split = Numbers(100)
    epoch = TrainingBatches(split, 5, 0, CPU).epoch(0)
    assert not left()  # nothing begins before it is asked for
    for taken in range(1, 8):
        next(epoch)
        wait_until(lambda taken=taken: len(split.made) == taken + AHEAD)
    time.sleep(0.02)
    assert len(split.made) == 7 + AHEAD  # memory does not grow with the epoch
    assert len(split.threads) == 1 and threading.main_thread() not in split.threads
    epoch.close()


@pytest.mark.parametrize("at", [0, 7])
def test_an_exception_in_the_thread_is_raised_where_its_batch_is_due(at):
    wrong = training_rows(Numbers(100).widths, 5, 0, 0)[at]

    def before(rows):
        if rows == wrong:
            raise KeyError("this batch")

    split, taken = Numbers(100, before), []
    with pytest.raises(KeyError, match="this batch"):
        for batch in TrainingBatches(split, 5, 0, CPU).epoch(0):
            taken.append(batch)
    assert len(taken) == at
    assert len(split.made) <= at + AHEAD


@pytest.mark.parametrize("how", ["close", "forgotten"])
def test_a_consumer_that_stops_leaves_no_thread_and_waits_for_one_batch_at_most(how, monkeypatch):
    """The thread stands in a batch when the consumer stops; it may go on as soon as it is waited for."""
    permits, begun, shutdown = threading.Semaphore(1), [], ThreadPoolExecutor.shutdown

    def before(rows):
        begun.append(rows)
        assert permits.acquire(timeout=60)

    def go_on(thread, *arguments, **settings):
        permits.release(1000)
        shutdown(thread, *arguments, **settings)

    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", go_on)
    split = Numbers(1000, before)
    epoch = TrainingBatches(split, 5, 0, CPU).epoch(0)
    next(epoch)
    wait_until(lambda: len(begun) == 2)
    if how == "close":
        epoch.close()
    else:
        del epoch
    assert not left()
    assert len(split.made) == 2


def test_two_epochs_at_once():
    batches = TrainingBatches(Numbers(50), 8, 3, CPU)
    whole = [rows_of(batches.epoch(e)) for e in range(2)]
    both = list(zip(batches.epoch(0), batches.epoch(1), strict=True))
    assert [rows_of(each) for each in zip(*both, strict=True)] == whole and whole[0] != whole[1]


def test_a_process_ends_in_the_middle_of_an_epoch():
    held = []

    def begin():
        held.append(TrainingBatches(Numbers(1000), 5, 0, CPU).epoch(0))
        next(held[0])

    process = multiprocessing.get_context("fork").Process(target=begin, daemon=True)
    process.start()
    process.join(60)
    assert process.exitcode == 0


def test_a_batch_is_handed_out_behind_its_copy(monkeypatch):
    """The order of calls, with stand-ins for the streams; tests/data/test_prefetch_gpu.py has the real ones."""
    calls = []

    class Stream:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            calls.append("on the side stream")

        def __exit__(self, *exception):
            calls.append("back")

        def record_event(self):
            calls.append("event")
            return "event"

        def wait_event(self, event):
            calls.append(f"wait for {event}")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(Batch, "pin", lambda batch: calls.append("pin") or batch)
    monkeypatch.setattr(Batch, "to", lambda batch, device: calls.append(f"copy to {device}") or batch)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: calls.append("used"))
    (batch,) = TrainingBatches(Numbers(3), 3, 0, torch.device("cuda", 0)).epoch(0)
    made = ["on the side stream", "pin", "copy to cuda:0", "event", "back"]
    assert calls == [*made, "wait for event", *["used"] * 4]  # labels, two encodings, one teacher's answers
