"""Random generators taken back, so that a second forward draws what the first one drew."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import contextmanager

import torch


class RandomState:
    """The state of the random generators that dropout draws from, so that a second forward sees the first one's masks.

    While a CUDA graph is captured the device's generator can be neither asked nor set: then a state is empty, and drawing
    the same again raises RuntimeError.
    """

    def __init__(self, devices: Iterable[torch.device]):
        self._devices = set(devices)
        self._captured = capturing(self._devices)
        self._cpu = torch.get_rng_state()
        self._cuda = {d: torch.cuda.get_rng_state(d) for d in self._devices if d.type == "cuda" and not self._captured}

    @contextmanager
    def again(self):
        """The body draws what was drawn after this state was taken; after it the generators are where they were before."""
        if self._captured or capturing(self._devices):
            raise RuntimeError("a CUDA graph cannot draw the same dropout masks twice (--pilot-steps above 1, --meta-grad "
                               "double_backward and finite_difference need it, and --checkpointing of the student)")  # fmt: skip
        before = RandomState(self._devices)
        self.restore()
        try:
            yield
        finally:
            before.restore()

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)


def capturing(devices: Iterable[torch.device]) -> bool:
    """Whether a CUDA graph is being captured that would hold work on one of `devices`."""
    return any(d.type == "cuda" for d in devices) and torch.cuda.is_current_stream_capturing()
