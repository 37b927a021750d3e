"""Length-grouped batches, resumable: the order is a pure function of (seed, epoch)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from engine.batch import Batch
from engine.data.encode import PAD_MULTIPLE, EncodedSplit

WINDOW = 50  # batches that are sorted by length together: longer windows pad less and shuffle less


class LengthGroupedBatches:
    """Row numbers of each batch of the current epoch: shuffled, sorted by length within windows, batches shuffled."""

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        random = np.random.default_rng((self.seed, self.epoch))
        order = random.permutation(len(self.lengths))
        batches = []
        for start in range(0, len(order), WINDOW * self.batch_size):
            window = order[start : start + WINDOW * self.batch_size]
            window = window[np.argsort(self.lengths[window], kind="stable")]
            batches += [window[i : i + self.batch_size].tolist() for i in range(0, len(window), self.batch_size)]
        return (batches[i] for i in random.permutation(len(batches)))


def training_loader(split: EncodedSplit, batch_size: int, seed: int, pin: bool) -> StatefulDataLoader:
    """Batches of `split`; the epoch is `loader.batch_sampler.epoch`. Draws nothing from the global random state."""

    def collate(rows: list[int]) -> Batch:
        batch = split.batch(rows)
        return batch.pin() if pin else batch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # torchdata 0.11 with torch 2.13
        return StatefulDataLoader(
            range(len(split)),  # the data set is its row numbers; collate reads the rows
            batch_sampler=LengthGroupedBatches(split.lengths, batch_size, seed),
            collate_fn=collate,
            generator=torch.Generator(),
        )


def evaluation_batches(split: EncodedSplit, batch_size: int) -> Iterator[tuple[list[int], Batch]]:
    """Every row once, longest first, with its row numbers."""
    order = np.argsort(-split.lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size].tolist()
        yield rows, split.batch(rows)


class QuizBatches:
    """The quiz batches of a round, drawn with replacement between batches: a pure function of (seed, round).

    A batch is examples of like length, as a training batch is: a random stretch of the quiz set in the order of padded
    length (shuffled within one, and going round), so that every example is drawn equally often.
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
        padded = -(-self.split.lengths[order] // PAD_MULTIPLE)
        order = order[np.argsort(padded, kind="stable")]
        start = random.integers(len(order))
        return order.take(range(start, start + self.batch_size), mode="wrap").tolist()
