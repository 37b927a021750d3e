"""Vectors of the shape of a module's trainable weights (engine.params.flat): gradients and tangents, tables by their rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """A [V, H] matrix that is zero but for some rows."""

    rows: Tensor  # [n] int64, sorted, each once
    values: Tensor  # [n, H]

    def dense(self, like: Tensor) -> Tensor:
        return torch.zeros_like(like).index_copy_(0, self.rows, self.values)

    def lookup(self, ids: Tensor) -> Tensor:
        """[...] int64 -> [..., H]"""
        if not len(self.rows):
            return self.values.new_zeros(*ids.shape, self.values.shape[1])
        at = torch.searchsorted(self.rows, ids.contiguous()).clamp_(max=len(self.rows) - 1)
        return torch.where((self.rows[at] == ids).unsqueeze(-1), self.values[at], 0)

    @classmethod
    def summed(cls, rows: Tensor, values: Tensor) -> Rows:
        """From rows that may repeat: [m], [m, H]; the order of the sums is fixed."""
        unique, inverse = rows.unique(return_inverse=True)
        # not index_add_, which takes atomic sums in any order on a GPU
        return cls(unique, torch.ops.aten.embedding_dense_backward(values, inverse, len(unique), -1, False))


@dataclass
class Vector:
    """A direction in the space of a module's trainable weights: a gradient, or a tangent."""

    dense: Tensor  # [dense]
    tables: list[Rows | Tensor]  # a table: its non-zero rows, or all of [V, H]

    def scaled(self, factor: float | Tensor) -> Vector:
        return Vector(
            self.dense * factor,
            [Rows(t.rows, t.values * factor) if isinstance(t, Rows) else t * factor for t in self.tables],
        )

    def plus(self, other: Vector, factor: float = 1.0) -> Vector:
        """self + factor * other"""
        tables = []
        for a, b in zip(self.tables, other.tables, strict=True):
            if isinstance(a, Rows) and isinstance(b, Rows):
                tables.append(Rows.summed(torch.cat([a.rows, b.rows]), torch.cat([a.values, b.values * factor])))
            elif isinstance(b, Rows):
                tables.append(a.index_add(0, b.rows, b.values, alpha=factor))
            else:
                tables.append(b.mul(factor).index_add_(0, a.rows, a.values) if isinstance(a, Rows) else a + factor * b)
        return Vector(torch.add(self.dense, other.dense, alpha=factor), tables)

    def norm(self) -> Tensor:
        parts = [self.dense, *(t.values if isinstance(t, Rows) else t for t in self.tables)]
        return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(part) for part in parts]))
