"""One batch of examples, as every model reads it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Batch:
    """The same B examples in each encoding, padded to a length L of its own (tokenizers differ)."""

    labels: Tensor  # [B] int64 class ids, or float32 for regression
    inputs: dict[str, dict[str, Tensor]]  # encoding -> {input_ids, attention_mask, token_type_ids: [B, L] int64}

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`; copies from pinned memory do not block the host."""

        def move(t: Tensor) -> Tensor:
            return t.to(device, non_blocking=True)

        return Batch(move(self.labels), {k: {n: move(t) for n, t in v.items()} for k, v in self.inputs.items()})

    def pin(self) -> Batch:
        return Batch(
            self.labels.pin_memory(), {k: {n: t.pin_memory() for n, t in v.items()} for k, v in self.inputs.items()}
        )
