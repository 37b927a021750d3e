"""CUDA graphs on a CPU: a capture that records every operation a step dispatches, and replays them on the same tensors.

What CUDA forbids during a capture is forbidden here: values that the host reads, shapes that depend on them, generators
that are set. What a capture does not do, it does not do here: everything that was written is put back. A replay runs the
recorded operations again, so that a number which the host had computed, a learning rate say, stays what it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from engine.params import pass_state

aten = torch.ops.aten
# The host would wait for these, or their results' sizes.
WAIT = {aten._local_scalar_dense, aten.nonzero, aten.unique_consecutive, aten._unique2, aten.unique_dim}
WAIT |= {aten.masked_select, aten.is_nonzero, aten.equal, aten.repeat_interleave}


class SimulatedCapture:
    """Counts its captures and replays; `broken` raises in the middle of a capture."""

    def __init__(self, broken: Callable[[int], bool] = lambda operation: False):
        self.warm = self.captures = self.replays = 0
        self.broken = broken

    def warm_up(self, call: Callable[[], Any]) -> Any:
        self.warm += 1
        return call()

    def capture(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        recorder, random = _Recorder(self.broken), torch.get_rng_state()
        try:
            with pytest.MonkeyPatch.context() as patch, recorder:
                patch.setattr(torch, "set_rng_state", _forbidden)
                patch.setattr(pass_state, "capturing", lambda devices: True)
                kept = call()
        finally:
            torch.set_rng_state(random)
            recorder.undo()
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            recorder.replay()

        return replay, kept


def _forbidden(*_):
    raise RuntimeError("operation not permitted when stream is capturing (a generator was set)")


class _Recorder(TorchDispatchMode):
    def __init__(self, broken: Callable[[int], bool]):
        super().__init__()
        self.log: list[tuple] = []
        self._made: set[int] = set()  # storages that the step allocated
        self._written: dict[int, tuple[Tensor, Tensor]] = {}  # others: bytes, and what they were
        self._broken = broken

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        generators = func is aten.equal.default and args[0].dtype == torch.uint8  # a CPU's states, which no GPU holds
        if func._overloadpacket in WAIT and not generators:
            raise RuntimeError(f"operation not permitted when stream is capturing ({func})")
        if self._broken(len(self.log)):
            raise RuntimeError("the capture was broken")
        for given, argument in zip(args, func._schema.arguments, strict=False):
            self._keep(given, argument)
        for argument in func._schema.arguments:
            if argument.name in kwargs:
                self._keep(kwargs[argument.name], argument)
        out = func(*args, **kwargs)
        aliases = [r.alias_info is not None for r in func._schema.returns]
        if not any(aliases):
            self._made |= {_storage(t) for t in pytree.tree_leaves(out) if isinstance(t, Tensor)}
        self.log.append((func, args, kwargs, None if any(aliases) else out))
        return out

    def _keep(self, given: Any, argument) -> None:
        if argument.alias_info is None or not argument.alias_info.is_write:
            return
        for t in pytree.tree_leaves(given):
            if isinstance(t, Tensor) and _storage(t) not in self._made | self._written.keys():
                whole = torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())
                self._written[_storage(t)] = whole, whole.clone()

    @torch.no_grad()
    def undo(self) -> None:
        """Nothing of what was recorded has happened."""
        for whole, before in self._written.values():
            whole.copy_(before)

    def replay(self) -> None:
        with torch._C._AutoDispatchBelowAutograd():
            for func, args, kwargs, out in self.log:
                new = func(*args, **kwargs)
                if out is None:
                    continue
                for target, value in zip(pytree.tree_leaves(out), pytree.tree_leaves(new), strict=True):
                    if isinstance(target, Tensor):
                        target.copy_(value)


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata
