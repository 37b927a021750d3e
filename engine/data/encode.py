"""From text to token ids to batches: every split once per tokenizer, cached on disk by content and read memory-mapped."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import BatchEncoding, PreTrainedTokenizerBase

from engine.batch import Batch
from engine.config import DataConfig, OptimConfig
from engine.data.buckets import Buckets
from engine.data.noise import Noise
from engine.data.splits import Splits, content_hash
from engine.data.token_files import Chunk, Tokens, load, save

TOKENIZED_AT_ONCE = 1000  # texts


@dataclass
class Encoding:
    """A tokenizer and its identity; models whose tokenizers agree in content share one."""

    key: str
    tokenizer: PreTrainedTokenizerBase
    max_length: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoding:
        """Raises AttributeError for a tokenizer without a fast backend; `engine.models.load` only loads fast ones."""
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        for used in ("truncation", "padding"):  # settings that the last call left behind
            content.pop(used, None)
        identity = json.dumps([content, max_length, tokenizer.pad_token_id], sort_keys=True)
        return cls(hashlib.sha256(identity.encode()).hexdigest()[:16], tokenizer, max_length)

    def tokenized(self, dataset: Dataset) -> Iterator[BatchEncoding]:
        """`dataset` (text, optional pair), some texts at a time: token ids, and types where there is a pair."""
        for start in range(0, len(dataset), TOKENIZED_AT_ONCE):
            rows = dataset[start : start + TOKENIZED_AT_ONCE]
            yield self.tokenizer(
                rows["text"], rows.get("pair"), truncation=True, max_length=self.max_length,
                return_token_type_ids="pair" in rows or None, return_attention_mask=False,
            )  # fmt: skip


class TokenTable:
    """The tokens of n examples in one encoding, and the widths that batches of them are padded to."""

    def __init__(
        self, encoding: Encoding, tokens: Tokens, buckets: int, batch_size: int, training: np.ndarray | None = None
    ):
        """At most `buckets` widths, planned for batches of `training`, the training set's lengths; without it, of these."""
        self.encoding, self.tokens = encoding, tokens
        # the same mapped memory as plain arrays, which take 3 us less to index
        self._ids, self._starts = np.asarray(tokens.ids), np.asarray(tokens.offsets)
        self._types = None if tokens.types is None else np.asarray(tokens.types)
        self._positions = np.arange(encoding.max_length)
        self.lengths = np.diff(self._starts)  # [n]
        self.training = self.lengths if training is None else training
        self.buckets = Buckets.of(self.training, encoding.max_length, buckets, batch_size)

    def pad(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """input_ids, attention_mask (and token_type_ids) of `rows`, each [B, L] int64, L the bucket of the longest."""
        lengths = self.lengths[rows]
        positions = self._positions[: self.buckets(lengths.max())]  # [L]
        mask = positions < lengths[:, None]  # [B, L]
        # behind an example stand the next one's tokens, and behind the last one nothing: `clip` keeps reading in bounds
        source, hole = self._starts[rows][:, None] + positions, ~mask
        out = {"input_ids": _gather(self._ids, source, hole, self.encoding.tokenizer.pad_token_id)}
        out["attention_mask"] = torch.from_numpy(mask.astype(np.int64))
        if self._types is not None:
            out["token_type_ids"] = _gather(self._types, source, hole, 0)
        return out

    def beside(self, values: np.ndarray, rows: np.ndarray, padding: int) -> np.ndarray:
        """`values` [tokens], which go with the tokens of the mapped files, of `rows`: [B, L] as `pad` lays them out."""
        lengths = self.lengths[rows]
        positions = self._positions[: self.buckets(lengths.max())]
        found = values.take(self._starts[rows][:, None] + positions, mode="clip")
        return np.where(positions < lengths[:, None], found, padding)


def _gather(values: np.ndarray, source: np.ndarray, hole: np.ndarray, padding: int) -> torch.Tensor:
    out = values.take(source, mode="clip").astype(np.int64)
    out[hole] = padding
    return torch.from_numpy(out)


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


def encode(dataset: Dataset, encoding: Encoding, content: str, cache: Path) -> Tokens:
    """`dataset` (text, optional pair) as token ids. `content` identifies its rows; the result is reused from `cache`.

    Raises UserError where it cannot be written there.
    """
    folder = cache / f"{content[:16]}-{encoding.key}"
    return load(folder, len(dataset)) or save(folder, _tokenize(dataset, encoding))


def _tokenize(dataset: Dataset, encoding: Encoding) -> Iterator[Chunk]:
    for done in encoding.tokenized(dataset):
        yield done["input_ids"], done.get("token_type_ids")
