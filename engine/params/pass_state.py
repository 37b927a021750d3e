"""What a forward begins from beside weights and inputs: the state of the random generators and of its modules' buffers.

A forward that is run again (the walk back, finite differences, teachers whose graph was not kept) has to begin from both: else
it draws other dropout masks, or reads a running statistic that the first one has moved.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from engine.params.swapped import every


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

    def moved(self) -> bool:
        """Whether something was drawn since. Never during a capture, which cannot tell."""
        devices = {} if capturing(self._devices) else self._cuda
        return not torch.equal(torch.get_rng_state(), self._cpu) or any(
            not torch.equal(torch.cuda.get_rng_state(d), state) for d, state in devices.items()
        )

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)


class Buffers:
    """The buffers of modules: which tensor each one is, and a copy of its values."""

    def __init__(self, holders: list[dict[str, Tensor | None]]):
        """`holders` are modules' own dictionaries of buffers."""
        self._holders = holders
        self._kept = [
            (holder, name, buffer, None if buffer is None else buffer.detach().clone())
            for holder in holders
            for name, buffer in holder.items()
        ]

    @classmethod
    def of(cls, *modules: nn.Module) -> Buffers:
        """Those of the modules and of all below them."""
        return cls([m._buffers for module in modules for m in every(module) if m._buffers])

    @classmethod
    def and_renormed(cls, module: nn.Module) -> Buffers:
        """Also the weights that a forward itself writes: those of embeddings with a max_norm, whose rows it scales down."""
        modules = every(module)
        renormed = [m for m in modules if isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.max_norm is not None]
        return cls([m._buffers for m in modules if m._buffers] + [m._parameters for m in renormed])

    @contextmanager
    def again(self):
        """The body has copies of these values; after it the buffers are the tensors that they were before, which nothing wrote to.

        A graph that the body records keeps the copies that it needs.
        """
        before = [(holder, dict(holder)) for holder in self._holders]
        for holder, name, _, values in self._kept:
            holder[name] = None if values is None else values.clone()
        try:
            yield
        finally:
            for holder, own in before:
                holder.update(own)

    def restore(self) -> None:
        """The same tensors with the same values. Version counters stay, so that graphs recorded before are still valid."""
        for holder, name, buffer, values in self._kept:
            if buffer is not None:
                buffer.data.copy_(values)
            holder[name] = buffer  # a forward may have put another tensor there


class PassState:
    """Both, before a pass through `modules` on `devices`."""

    def __init__(self, modules: Iterable[nn.Module], devices: Iterable[torch.device]):
        self.random, self.buffers = RandomState(devices), Buffers.of(*modules)

    @contextmanager
    def again(self):
        """The body begins where the pass began; after it generators and buffers are where they were before."""
        with self.random.again(), self.buffers.again():
            yield


def capturing(devices: Iterable[torch.device]) -> bool:
    """Whether a CUDA graph is being captured that would hold work on one of `devices`."""
    return any(d.type == "cuda" for d in devices) and torch.cuda.is_current_stream_capturing()
