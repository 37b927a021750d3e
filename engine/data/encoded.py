"""Splits in every encoding that a run's models read, and batches of their rows."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset

from engine.batch import Batch
from engine.config import DataConfig, OptimConfig
from engine.data.buckets import Buckets
from engine.data.encoding import Encoding, encode
from engine.data.noise import Noise
from engine.data.splits import Splits, content_hash
from engine.data.token_table import TokenTable


class EncodedSplit:
    """A split in every encoding a run needs, with its labels and whatever else is known of each example.

    `columns` are tensors [n] by name, int64 or float32; "domain" is among them where the data set has domains.
    """

    def __init__(
        self, dataset: Dataset, encodings: list[Encoding], content: str, cache: Path,
        buckets: int = DataConfig.length_buckets, batch_size: int = OptimConfig.batch_size,
        training: EncodedSplit | None = None,
    ):  # fmt: skip
        """Batches are padded to at most `buckets` widths an encoding, planned for batches of `batch_size` of the split
        `training`; without it, of this one.
        """
        planned = {} if training is None else {table.encoding.key: table.training for table in training.tables}
        self.tables = [
            TokenTable(e, encode(dataset, e, content, cache), buckets, batch_size, planned.get(e.key))
            for e in encodings
        ]
        self._plan = buckets, batch_size
        dtype = torch.float32 if dataset.features["label"].dtype.startswith("float") else torch.int64
        self.labels = torch.tensor(dataset["label"][:], dtype=dtype)
        self._group()
        self.answers: Sequence[Sequence[np.ndarray]] = ()
        self.noise: Noise | None = None
        self.columns: dict[str, torch.Tensor] = {}
        if "domain" in dataset.column_names:
            self.columns["domain"] = torch.tensor(dataset["domain"][:])

    def __len__(self) -> int:
        return len(self.labels)

    def _group(self) -> None:
        """`lengths` [n] of the longest encoding of each example, and `widths` [n], the buckets that these fall in.

        Batches are grouped by them, so that no encoding pays for another's grouping; each is padded by its own plan.
        """
        self.lengths = np.max([table.lengths for table in self.tables], axis=0)
        training = np.max([table.training for table in self.tables], axis=0)
        longest = max(table.encoding.max_length for table in self.tables)
        self.widths = Buckets.of(training, longest, *self._plan)(self.lengths)

    def only(self, keys: set[str]) -> EncodedSplit:
        """The same rows in these encodings alone, so that batches do not depend on what other models read."""
        part = copy.copy(self)
        part.tables = [table for table in self.tables if table.encoding.key in keys]
        if not self.answers:  # the teachers that gave them would have been read from these batches
            part._group()
        return part

    def with_answers(self, answers: Sequence[Sequence[np.ndarray]]) -> EncodedSplit:
        """The same rows, whose batches have what each teacher answered: arrays [n, ...] of every output, also memory-mapped.

        `only` leaves their grouping by length as it is here, so that batches are the ones that the teachers would read.
        """
        assert all(len(array) == len(self) for given in answers for array in given)
        part = copy.copy(self)
        part.answers = answers
        return part

    def with_columns(self, columns: Mapping[str, np.ndarray | torch.Tensor]) -> EncodedSplit:
        """The same rows with more columns [n], kept as int64 or, where they have fractions, float32."""
        part = copy.copy(self)
        part.columns = dict(self.columns)
        for name, values in columns.items():
            values = torch.as_tensor(values)
            assert values.shape == (len(self),), (name, values.shape, len(self))
            part.columns[name] = values.to(torch.float32 if values.is_floating_point() else torch.int64)
        return part

    def with_noise(self, noise: Noise) -> EncodedSplit:
        """The same rows, whose batches of an epoch have beside each encoding what the noise makes of it."""
        part = copy.copy(self)
        part.noise = noise
        return part

    def batch(self, rows: list[int], epoch: int | None = None) -> Batch:
        """The examples `rows`; where they are of an `epoch` of training, with its noise."""
        index = np.asarray(rows)
        inputs = {t.encoding.key: t.pad(index) for t in self.tables}
        if self.noise is not None and epoch is not None:
            for t in self.tables:
                inputs |= self.noise(t, index, inputs[t.encoding.key], epoch)
        answers = [[torch.from_numpy(array[index]) for array in given] for given in self.answers]
        columns = {name: values[index] for name, values in self.columns.items()}
        return Batch(self.labels[index], inputs, answers, columns)

    def padding_waste(self, batches: list[list[int]]) -> float:
        """Share of padded tokens in `batches`, over all encodings."""
        real = padded = 0
        for rows in batches:
            for t in self.tables:
                lengths = t.lengths[rows]
                real += int(lengths.sum())
                padded += len(rows) * int(t.buckets(lengths.max()))
        return 1 - real / max(1, padded)


@dataclass
class EncodedSplits:
    """All splits of a run, encoded, with the content hashes that identify what a teacher was prepared on."""

    train: list[EncodedSplit]
    quiz: EncodedSplit
    validation: EncodedSplit
    test: EncodedSplit
    hashes: list[str]  # of each training sample, then quiz, validation and test

    @classmethod
    def of(cls, splits: Splits, encodings: list[Encoding], cache: Path, buckets: int, batch_size: int) -> EncodedSplits:
        """Each training sample has widths of its own; quiz, validation and test have the first one's."""
        datasets = [*splits.train, splits.quiz, splits.validation, splits.test]
        hashes = [content_hash(dataset) for dataset in datasets]
        encoded: list[EncodedSplit] = []
        for i, (dataset, content) in enumerate(zip(datasets, hashes, strict=True)):
            training = None if i < len(splits.train) else encoded[0]
            encoded.append(EncodedSplit(dataset, encodings, content, cache, buckets, batch_size, training))
        return cls(encoded[:-3], *encoded[-3:], hashes)
