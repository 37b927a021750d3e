"""Noise in training batches: words replaced at random, in what teachers read, students read, or both.

Section 4 of "Improving MetaDistil Framework": each word is replaced with probability P, by a noise token or by a random word
of the vocabulary. A number u in [0, 1) is drawn for each word, and the word replaced for every role whose P exceeds it. So
roles with one encoding and one P see the same, and a smaller P replaces some of the words that a larger one does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from engine.data.encoding import Encoding
from engine.data.token_table import TokenTable
from engine.data.words import special_ids, words_of
from engine.errors import UserError

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # what a SplitMix64 stream is stepped by
OTHER = np.uint64(0xD1B54A32D192ED03)  # sets an example's replacements apart from its words


@dataclass(frozen=True)
class Reader:
    """The models of one role: the encodings that they read, and the probability P of a word to be replaced for them."""

    encodings: frozenset[str]
    probability: float


class Noise:
    """What each role reads of a batch: a pure function of (seed, epoch, row of the split, encoding)."""

    def __init__(
        self, dataset: Dataset, encodings: Sequence[Encoding], content: str, cache: Path, readers: Mapping[str, Reader],
        kind: Literal["mask", "vocabulary"], seed: int,
    ):  # fmt: skip
        """`dataset`, `content` and `cache` are those of the split that is trained on; `readers` are by role.

        Raises UserError for masks of a tokenizer that has none, and where the words cannot be written to `cache`.
        """
        self.readers, self.seed = {role: reader for role, reader in readers.items() if reader.probability > 0}, seed
        self._words: dict[str, np.ndarray] = {}
        self._substitutes: dict[str, np.ndarray] = {}  # ids that a token is replaced by
        read = {key for reader in self.readers.values() for key in reader.encodings}
        for encoding in (e for e in encodings if e.key in read):
            self._substitutes[encoding.key] = _substitutes(encoding.tokenizer, kind)
            self._words[encoding.key] = words_of(dataset, encoding, content, cache)

    def __call__(
        self, table: TokenTable, rows: np.ndarray, clean: dict[str, Tensor], epoch: int
    ) -> dict[str, dict[str, Tensor]]:
        """Noised versions of `clean`, which `table.pad(rows)` gave, under "<encoding>/<role>". Shapes stay as they are."""
        key = table.encoding.key
        roles = {role: r.probability for role, r in self.readers.items() if key in r.encodings}
        if not roles:
            return {}
        words = table.beside(self._words[key], rows, -1)  # [B, L]
        streams = _mixed(rows.astype(np.uint64) * GOLDEN + _state(self.seed, epoch, key))[:, None]  # one an example
        # numbers of 53 bits, as many as a float64 holds; what is no word is never replaced
        u = np.where(
            words < 0, 2.0, (_mixed(streams + (words + 1).astype(np.uint64) * GOLDEN) >> np.uint64(11)) * 2.0**-53
        )
        ids, substitutes = clean["input_ids"].numpy(), self._substitutes[key]
        if len(substitutes) > 1:  # drawn for each piece
            positions = np.arange(1, ids.shape[1] + 1, dtype=np.uint64)
            bits = _mixed((streams ^ OTHER) + positions * GOLDEN) >> np.uint64(32)
            substitutes = substitutes[(bits * np.uint64(len(substitutes))) >> np.uint64(32)]
        return {
            f"{key}/{role}": {**clean, "input_ids": torch.from_numpy(np.where(u < probability, substitutes, ids))}
            for role, probability in roles.items()
        }


def _substitutes(tokenizer, kind: str) -> np.ndarray:
    if kind == "mask":
        if tokenizer.mask_token_id is None:
            raise UserError(
                f"--noise-kind mask needs a mask token, which the tokenizer of {tokenizer.name_or_path or 'a model'} has "
                "not; use --noise-kind vocabulary."
            )
        return np.array([tokenizer.mask_token_id])
    return np.array(sorted(set(tokenizer.get_vocab().values()) - special_ids(tokenizer)))


@lru_cache(maxsize=64)
def _state(seed: int, epoch: int, encoding: str) -> np.uint64:
    return np.frombuffer(hashlib.sha256(f"{seed} {epoch} {encoding}".encode()).digest(), np.uint64, 1)[0]


def _mixed(x: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64 (Steele, Lea and Flood 2014), arithmetic modulo 2^64: all bits of x in each bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
