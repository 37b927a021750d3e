"""Fine-tuning as a user gets it without the engine: forward, cross-entropy, backward, clipping, AdamW."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from bench.baselines.published_loop import Batch, Learner, Precision, logits, pad


class PlainFineTuning:
    """The student alone, on the labels, in straightforward PyTorch."""

    def __init__(
        self,
        student: nn.Module,
        *,
        lr: float,
        max_grad_norm: float = 1.0,
        total_steps: int = 10_000,
        length: int = 128,
        precision: Precision = "fp32",
    ):
        self.student, self.length, self.precision = student, length, precision
        self.learner = Learner(student, lr, total_steps, max_grad_norm)

    def step(self, batch: Batch) -> dict[str, float]:
        batch = pad(batch, self.length, self.student.config.pad_token_id or 0)
        self.student.train()
        loss = F.cross_entropy(logits(self.student, batch, precision=self.precision), batch["labels"])
        loss.backward()
        self.learner.update()
        return {"loss": loss.item()}
