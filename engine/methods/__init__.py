"""The methods: one file each, a step function over state and batches that returns device scalars.

Adding a method is its file and one row of `STEPS`. Steps know nothing of epochs, logging, checkpoints or graphs; the
trainer wraps them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from engine.batch import Batch
from engine.methods import finetune, kd, metadistil
from engine.methods.state import State

Step = Callable[[State, Sequence[Batch]], dict[str, Tensor]]

STEPS: dict[str, Step] = {"finetune": finetune.step, "kd": kd.step, "metadistil": metadistil.step}

__all__ = ["STEPS", "State", "Step"]
