"""Batches of one width each, in an order that is a pure function of (seed, epoch), made ahead of time by a thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch

from engine.batch import Batch

if TYPE_CHECKING:
    from engine.data.encoded import EncodedSplit

AHEAD = 3  # batches that wait for the consumer


def training_rows(widths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Row numbers of each batch of an epoch: every row once, all batches full but one.

    `widths` [n] are the buckets of the rows. Rows are shuffled, and full batches are cut within each bucket; what is left
    of one stands first in the next wider one. Then the batches are shuffled.
    """
    random = np.random.default_rng((seed, epoch))
    order = random.permutation(len(widths))
    order = order[np.argsort(widths[order], kind="stable")]
    batches = [order[start : start + batch_size].tolist() for start in range(0, len(order), batch_size)]
    return [batches[i] for i in random.permutation(len(batches))]


class TrainingBatches:
    """The batches of a split, epoch by epoch, on `device`. Draws nothing from the global random state."""

    def __init__(self, split: EncodedSplit, batch_size: int, seed: int, device: torch.device):
        self.split, self.batch_size, self.seed, self.device = split, batch_size, seed, device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __len__(self) -> int:
        """Batches an epoch."""
        return -(-len(self.split) // self.batch_size)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """The batches of epoch `number` from the `start`-th on. What goes wrong in the thread is raised where it is due."""
        waiting: deque[Future] = deque()
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as thread:
            try:
                for rows in training_rows(self.split.widths, self.batch_size, self.seed, number)[start:]:
                    waiting.append(thread.submit(self._make, rows, number))
                    if len(waiting) > AHEAD:
                        yield self._take(waiting.popleft())
                while waiting:
                    yield self._take(waiting.popleft())
            finally:  # also where the consumer goes away: what has not begun is not begun
                for made in waiting:
                    made.cancel()

    def _make(self, rows: list[int], epoch: int) -> tuple[Batch, torch.cuda.Event | None]:
        batch = self.split.batch(rows, epoch)
        if self._copies is None:
            return batch.to(self.device), None
        with torch.cuda.stream(self._copies):  # which also sets the thread's device
            return batch.pin().to(self.device), self._copies.record_event()

    def _take(self, made: Future) -> Batch:
        batch, copied = made.result()
        if copied is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(copied)
            batch.record_stream(stream)
        return batch


def evaluation_batches(split: EncodedSplit, batch_size: int) -> Iterator[tuple[list[int], Batch]]:
    """Every row once, longest first, with its row numbers."""
    order = np.argsort(-split.lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size].tolist()
        yield rows, split.batch(rows)


class QuizBatches:
    """The quiz batches of a round, drawn with replacement between batches: a pure function of (seed, round).

    A batch is examples of like length, as a training batch is: a random stretch of the quiz set in the order of the buckets
    (shuffled within one, and going round), so that every example is drawn equally often.
    """

    def __init__(self, split: EncodedSplit, batch_size: int, count: int, seed: int, device: torch.device):
        self.split, self.count, self.seed, self.device = split, count, seed, device
        self.batch_size = min(batch_size, len(split))

    def __call__(self, round: int) -> list[Batch]:
        random = np.random.default_rng((self.seed, round))
        batches = [self.split.batch(self._draw(random)) for _ in range(self.count)]
        return [(b.pin() if self.device.type == "cuda" else b).to(self.device) for b in batches]

    def _draw(self, random: np.random.Generator) -> list[int]:
        order = random.permutation(len(self.split))
        order = order[np.argsort(self.split.widths[order], kind="stable")]
        start = random.integers(len(order))
        return order.take(range(start, start + self.batch_size), mode="wrap").tolist()
