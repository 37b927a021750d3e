"""From text to token ids: every split once per tokenizer, cached on disk by content and read memory-mapped."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from transformers import PreTrainedTokenizerBase

from engine.batch import Batch
from engine.data.splits import Splits, content_hash

disable_progress_bars()  # the console shows progress where it takes a while

PAD_MULTIPLE = 8  # bucket lengths are multiples of this: few shapes, little padding


@dataclass
class Encoding:
    """A tokenizer and its identity; models whose tokenizers agree in content share one."""

    key: str
    tokenizer: PreTrainedTokenizerBase
    max_length: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoding:
        """Raises AttributeError for a tokenizer without a fast backend; `engine.models` only loads fast ones."""
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        for used in ("truncation", "padding"):  # settings that the last call left behind
            content.pop(used, None)
        identity = json.dumps([content, max_length, tokenizer.pad_token_id], sort_keys=True)
        return cls(hashlib.sha256(identity.encode()).hexdigest()[:16], tokenizer, max_length)


class TokenTable:
    """Token ids of n examples in one encoding, ragged: `ids[offsets[i]:offsets[i + 1]]` is example i."""

    def __init__(self, encoding: Encoding, encoded: Dataset):
        self.encoding = encoding
        table = encoded.with_format("arrow")[:]
        self.offsets, self.ids = _ragged(table["input_ids"])
        self.types = _ragged(table["token_type_ids"])[1] if "token_type_ids" in table.column_names else None
        self.lengths = np.diff(self.offsets)

    def pad(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """input_ids, attention_mask (and token_type_ids) of `rows`, each [B, L], L the bucket of the longest."""
        lengths = self.lengths[rows]
        width = min(-(-int(lengths.max()) // PAD_MULTIPLE) * PAD_MULTIPLE, self.encoding.max_length)
        mask = np.arange(width) < lengths[:, None]  # [B, L]
        source = np.concatenate([np.arange(self.offsets[r], self.offsets[r + 1]) for r in rows])
        out = {"input_ids": self._fill(self.ids, mask, source, self.encoding.tokenizer.pad_token_id)}
        out["attention_mask"] = torch.from_numpy(mask.astype(np.int64))
        if self.types is not None:
            out["token_type_ids"] = self._fill(self.types, mask, source, 0)
        return out

    @staticmethod
    def _fill(values: np.ndarray, mask: np.ndarray, source: np.ndarray, padding: int) -> torch.Tensor:
        out = np.full(mask.shape, padding, np.int64)
        out[mask] = values[source]
        return torch.from_numpy(out)


class EncodedSplit:
    """A split in every encoding a run needs, with its labels."""

    def __init__(self, dataset: Dataset, encodings: list[Encoding], content: str, cache: Path):
        self.tables = [TokenTable(e, encode(dataset, e, content, cache)) for e in encodings]
        dtype = torch.float32 if dataset.features["label"].dtype.startswith("float") else torch.int64
        self.labels = torch.tensor(dataset["label"][:], dtype=dtype)
        # Batches are grouped by the longest encoding of each example, so that no encoding pays for another's grouping.
        self.lengths = np.max([t.lengths for t in self.tables], axis=0)

    def __len__(self) -> int:
        return len(self.labels)

    def only(self, keys: set[str]) -> EncodedSplit:
        """The same rows in these encodings alone, so that batches do not depend on what other models read."""
        part = copy.copy(self)
        part.tables = [table for table in self.tables if table.encoding.key in keys]
        part.lengths = np.max([table.lengths for table in part.tables], axis=0)
        return part

    def batch(self, rows: list[int]) -> Batch:
        index = np.asarray(rows)
        return Batch(self.labels[index], {t.encoding.key: t.pad(index) for t in self.tables})

    def padding_waste(self, batches: list[list[int]]) -> float:
        """Share of padded tokens in `batches`, over all encodings."""
        real = padded = 0
        for rows in batches:
            for t in self.tables:
                lengths = t.lengths[rows]
                real += int(lengths.sum())
                padded += len(rows) * min(-(-int(lengths.max()) // PAD_MULTIPLE) * PAD_MULTIPLE, t.encoding.max_length)
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
    def of(cls, splits: Splits, encodings: list[Encoding], cache: Path) -> EncodedSplits:
        datasets = [*splits.train, splits.quiz, splits.validation, splits.test]
        hashes = [content_hash(dataset) for dataset in datasets]
        encoded = [EncodedSplit(d, encodings, h, cache) for d, h in zip(datasets, hashes, strict=True)]
        return cls(encoded[:-3], *encoded[-3:], hashes)


def encode(dataset: Dataset, encoding: Encoding, content: str, cache: Path) -> Dataset:
    """`dataset` (text, optional pair) as token ids. `content` identifies its rows; the result is reused from `cache`."""
    cache.mkdir(parents=True, exist_ok=True)

    def tokenize(rows: dict[str, list]) -> dict[str, list]:
        return encoding.tokenizer(
            rows["text"], rows.get("pair"), truncation=True, max_length=encoding.max_length,
            return_token_type_ids="pair" in rows or None, return_attention_mask=False,
        ).data  # fmt: skip

    return dataset.map(
        tokenize,
        batched=True,
        remove_columns=dataset.column_names,
        cache_file_name=str(cache / f"{content[:16]}-{encoding.key}.arrow"),
        new_fingerprint=f"{content[:16]}{encoding.key}",
    )


def _ragged(column) -> tuple[np.ndarray, np.ndarray]:
    """Offsets [n + 1] and flat values of an arrow list column."""
    array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    offsets = array.offsets.to_numpy()
    return offsets, array.values.to_numpy()
