"""The time machine: snapshots of a module's weights and buffers, and the only code that writes weights besides optimizers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class TimeMachine:
    """Takes a module back, bit for bit, to where a snapshot found it.

    Weights are written through `.data`, which leaves version counters alone: a graph recorded before an excursion is
    valid again after the rewind. Snapshot storage is allocated once per slot and reused.
    """

    def __init__(self, module: nn.Module):
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self._tensors = [*module.parameters(), *module.buffers()]
        self._slots: dict[int, list[Tensor]] = {}

    @torch.no_grad()
    def snapshot(self, slot: int = 0) -> None:
        """Copy every weight and buffer into `slot`."""
        if slot not in self._slots:
            self._slots[slot] = [torch.empty_like(t) for t in self._tensors]
        torch._foreach_copy_(self._slots[slot], [t.data for t in self._tensors])

    @torch.no_grad()
    def rewind(self, slot: int = 0) -> None:
        """Copy `slot` back; bit-exact. Raises KeyError for a slot without a snapshot."""
        torch._foreach_copy_([t.data for t in self._tensors], self._slots[slot])

    @torch.no_grad()
    def advance(self, gradients: Sequence[Tensor], lr: float) -> None:
        """phi <- phi - lr * g on the trainable weights, in their order: the pilot's plain SGD step."""
        torch._foreach_add_([p.data for p in self._parameters], list(gradients), alpha=-lr)

    @contextmanager
    def perturbed(self, direction: Sequence[Tensor], scale: Tensor):
        """phi + scale * direction for the body, bit for bit phi again behind it. `scale` is a device scalar."""
        self.snapshot(-1)
        with torch.no_grad():
            torch._foreach_add_([p.data for p in self._parameters], torch._foreach_mul(list(direction), scale))
        try:
            yield
        finally:
            self.rewind(-1)

    @contextmanager
    def excursion(self):
        """Snapshot (slot 0), run the body, rewind to it, also when the body raises."""
        self.snapshot(0)
        try:
            yield self
        finally:
            self.rewind(0)


class RandomState:
    """The state of the random generators that dropout draws from, so that a second forward sees the first one's masks."""

    def __init__(self, devices: Iterable[torch.device]):
        self._cpu = torch.get_rng_state()
        self._cuda = {d: torch.cuda.get_rng_state(d) for d in set(devices) if d.type == "cuda"}

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)
