"""Rows of token ids, padded to the width of a bucket."""

from __future__ import annotations

import numpy as np
import torch

from engine.data.buckets import Buckets
from engine.data.encoding import Encoding
from engine.data.token_files import Tokens


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
        if encoding.fixed:
            self.buckets = Buckets(np.array([encoding.max_length]), encoding.max_length)
        else:
            self.buckets = Buckets.of(self.training, encoding.max_length, buckets, batch_size)

    def pad(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """input_ids, attention_mask (and token_type_ids) of `rows`, each [B, L] int64, L the bucket of the longest."""
        positions, mask = self._layout(rows)
        # beside an example stand the next one's tokens, and behind the last one nothing: `clip` keeps reading in bounds
        source, hole = self._starts[rows][:, None] + positions, ~mask
        out = {"input_ids": _gather(self._ids, source, hole, self.encoding.tokenizer.pad_token_id)}
        out["attention_mask"] = torch.from_numpy(mask.astype(np.int64))
        if self._types is not None:
            out["token_type_ids"] = _gather(self._types, source, hole, 0)
        return out

    def beside(self, values: np.ndarray, rows: np.ndarray, padding: int) -> np.ndarray:
        """`values` [tokens], which go with the tokens of the mapped files, of `rows`: [B, L] as `pad` lays them out."""
        positions, mask = self._layout(rows)
        return np.where(mask, values.take(self._starts[rows][:, None] + positions, mode="clip"), padding)

    def _layout(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which token of its example stands at each place, [L] or [B, L], and the places [B, L] where one does."""
        lengths = self.lengths[rows]
        positions = self._positions[: self.buckets(lengths.max())]
        if self.encoding.padding == "right":
            return positions, positions < lengths[:, None]
        positions = positions - (len(positions) - lengths)[:, None]
        return positions, positions >= 0


def _gather(values: np.ndarray, source: np.ndarray, hole: np.ndarray, padding: int) -> torch.Tensor:
    out = values.take(source, mode="clip").astype(np.int64)
    out[hole] = padding
    return torch.from_numpy(out)
