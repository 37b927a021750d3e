"""One batch of examples, as every model reads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass
class Batch:
    """The same B examples in each encoding, padded to a length L of its own (tokenizers differ)."""

    labels: Tensor  # [B] int64 class ids, or float32 for regression
    # encoding -> {input_ids, attention_mask, token_type_ids: [B, L] int64}; with noise in what the models of a role read,
    # that is beside it under "encoding/role"
    inputs: dict[str, dict[str, Tensor]]
    # per teacher what it gives to these examples, where that was kept: [B, C] logits, [B, layers, H] features if matched
    answers: list[list[Tensor]] = field(default_factory=list)
    # what else is known of the examples, by name: [B] int64 or float32, as the id of each one's domain
    columns: dict[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`; copies from pinned memory do not block the host."""
        return self._each(lambda t: t.to(device, non_blocking=True))

    def pin(self) -> Batch:
        """The batch in page-locked memory."""
        return self._each(Tensor.pin_memory)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Have the allocator wait for `stream`, which reads the batch, before it reuses memory that another stream took."""

        def record(t: Tensor) -> Tensor:
            t.record_stream(stream)
            return t

        self._each(record)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(
            change(self.labels),
            {encoding: {name: change(t) for name, t in given.items()} for encoding, given in self.inputs.items()},
            [[change(t) for t in given] for given in self.answers],
            {name: change(t) for name, t in self.columns.items()},
        )


pytree.register_pytree_node(  # a batch is its tensors, named as they are in the program
    Batch,
    lambda batch: (list(vars(batch).values()), tuple(vars(batch))),
    lambda values, names: Batch(**dict(zip(names, values, strict=True))),
    flatten_with_keys_fn=lambda batch: (
        [(pytree.GetAttrKey(name), value) for name, value in vars(batch).items()],
        tuple(vars(batch)),
    ),
)
