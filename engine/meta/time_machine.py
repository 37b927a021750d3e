"""The time machine: snapshots of flat weights and bit-exact rewind; besides optimizers, the only code that writes weights.

A snapshot taken by `advance` holds only what the step moves: the dense part, and of each table the rows. Snapshots form
a stack in time, so that a rewind over several steps undoes the rows of the later ones first.
"""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from engine.params import native
from engine.params.flat import FlatParameters
from engine.params.pass_state import Buffers
from engine.params.vectors import Rows, Vector
from engine.sections import section

Store = Literal["device", "pinned"]


@dataclass
class _Snapshot:
    dense: Tensor  # [dense]
    tables: list[Rows | Tensor]  # what the rows (or all) of each table were


class TimeMachine:
    """Takes flat parameters back, bit for bit, to where a snapshot found them.

    Weights are written through the flat buffer, which leaves version counters alone: a graph recorded before an excursion
    is valid again after the rewind. `store="pinned"` keeps the dense part in pinned host memory, registered once a name
    and reused; its copies run on a side stream and never block the host. On a CPU both stores are plain memory.
    `optimizer`, where given, is rewound too.
    """

    def __init__(self, flat: FlatParameters, store: Store = "device", optimizer: torch.optim.Optimizer | None = None):
        if store not in ("device", "pinned"):
            raise ValueError(f"store is {store!r}; it must be device or pinned.")
        self.flat, self.optimizer = flat, optimizer
        self._pinned = store == "pinned" and flat.weights.is_cuda
        self._stream = torch.cuda.Stream(flat.weights.device) if self._pinned else None
        self._buffers: dict[Hashable, Tensor] = {}  # dense storage by name, allocated once
        self._stack: dict[Hashable, _Snapshot] = {}  # in order of time
        self._floors: list[int] = []  # of every open excursion, how many snapshots there were before it
        self._here: _Snapshot | None = None  # the one rewound to last, while no step has been taken from it
        self._alphas: dict[float, Tensor] = {}

    @torch.no_grad()
    def snapshot(self, name: Hashable = "start") -> None:
        """Keep every weight under `name`."""
        self.flat.check()
        dense = self._storage(name)
        self._copy_out(dense)
        self._stack[name] = _Snapshot(dense, [t.weight.clone() for t in self.flat.tables])

    @torch.no_grad()
    def advance(self, step: Vector, scale: float | Tensor, name: Hashable = "start") -> None:
        """Keep what is about to move under `name`, then weights += scale * step, in one pass over memory.

        `scale` is a number or a device scalar; nothing waits for the device.
        """
        flat, self._here = self.flat, None
        flat.check()
        torch.clear_autocast_cache()  # it holds casts of weights until the outermost autocast ends
        dense, alpha, shadow = self._storage(name), self._alpha(scale), flat.shadow
        weights, dense_shadow = flat.weights[: flat.dense], None if shadow is None else shadow[: flat.dense]
        if self._pinned:
            self._copy_out(dense)
            weights.addcmul_(step.dense, alpha)
            if shadow is not None:
                dense_shadow.copy_(weights)
        else:
            native.pilot_update(weights, step.dense, dense, alpha, dense_shadow)
        before: list[Rows | Tensor] = []
        self._stack[name] = _Snapshot(dense, before)
        for table, part in zip(flat.tables, step.tables, strict=True):
            table_shadow = None if shadow is None else flat.views(shadow, [table.name])[table.name]
            if isinstance(part, Rows):
                kept = torch.empty_like(part.values)
                before.append(Rows(part.rows, kept))
                native.row_axpy(table.weight, part.rows, part.values, alpha, kept, table_shadow)
            else:
                kept = torch.empty_like(table.weight)
                before.append(kept)
                whole = (table.weight, part, kept, table_shadow)
                w, g, s, b = (None if t is None else t.reshape(-1) for t in whole)
                native.pilot_update(w, g, s, alpha, b)

    @section("rewind")
    @torch.no_grad()
    def rewind(self, name: Hashable = "start") -> None:
        """Back to `name`, which stays; snapshots taken after it are dropped.

        Raises KeyError for an unknown name, ValueError for one from before an excursion that is under way.
        """
        kept = self._stack[name]
        torch.clear_autocast_cache()
        if self._floors and list(self._stack).index(name) < self._floors[-1]:
            raise ValueError(f"{name!r} was taken before this excursion began; rewind to it after the excursion's end.")
        while next(reversed(self._stack)) != name:
            self._restore_tables(self._stack.popitem()[1])
        self._restore_tables(kept)
        self._here = kept
        flat = self.flat
        weights, shadow = flat.weights[: flat.dense], flat.shadow
        if self._pinned:
            weights.copy_(kept.dense, non_blocking=True)
            if shadow is not None:
                shadow[: flat.dense].copy_(weights)
        else:
            native.rewind(weights, kept.dense, None if shadow is None else shadow[: flat.dense])

    @contextmanager
    def perturbed(self, direction: Vector, scale: Tensor):
        """In the body weights + scale * direction; after it the weights are what they were, bit for bit."""
        with self._coming_back():
            self.advance(direction, scale, "perturbed")
            yield

    @contextmanager
    def excursion(self):
        """Whatever the body does to weights (through this object), buffers and optimizer is undone after it, also when
        it raises. Names taken in the body are gone then, and those from before mean what they meant."""
        self.flat.check()
        buffers = Buffers.and_renormed(self.flat.module)
        state = None if self.optimizer is None else _state(self.optimizer)
        try:
            with self._coming_back():
                yield self
        finally:
            buffers.restore()
            if state is not None:
                _restore_state(self.optimizer, state)

    @contextmanager
    def _coming_back(self):
        """After the body, weights and names are what they were before it."""
        before = dict(self._stack)
        self._floors.append(len(before))
        try:
            yield
        finally:
            try:
                later = list(self._stack)[len(before) :]
                if later and self._here is not self._stack[later[0]]:
                    self.rewind(later[0])
            finally:  # a CUDA graph whose capture broke off lets nothing be launched, and nothing has moved
                self._floors.pop()
                self._stack = before

    def held(self) -> list[Tensor]:
        """What snapshots take: storages that were allocated for them, and kept rows."""
        parts = [part for snapshot in self._stack.values() for part in snapshot.tables]
        return [*self._buffers.values(), *(part.values if isinstance(part, Rows) else part for part in parts)]

    def _free(self, name: Hashable) -> None:
        """A name that is taken again stands for the later time. The way to earlier snapshots still leads over the rows of
        the one that had it, which stays unnamed; with its dense part, where an excursion needs that."""
        if name not in self._stack:
            return
        at, floor = list(self._stack).index(name), self._floors[-1] if self._floors else -1
        if at <= floor:
            del self._buffers[name]
        if at == 0 and floor < 0:
            del self._stack[name]
        else:
            unnamed = object()
            self._stack = {unnamed if n == name else n: snapshot for n, snapshot in self._stack.items()}

    def _storage(self, name: Hashable) -> Tensor:
        self._free(name)
        if name not in self._buffers:
            weights = self.flat.weights[: self.flat.dense]
            kind = {"device": "cpu", "pin_memory": True} if self._pinned else {}
            self._buffers[name] = torch.empty_like(weights, **kind)
        return self._buffers[name]

    def _copy_out(self, dense: Tensor) -> None:
        weights = self.flat.weights[: self.flat.dense]
        if self._stream is None:
            dense.copy_(weights)
            return
        current = torch.cuda.current_stream(weights.device)
        self._stream.wait_stream(current)  # the writes before, and a rewind that still reads this storage
        with torch.cuda.stream(self._stream):
            dense.copy_(weights, non_blocking=True)
        current.wait_stream(self._stream)  # on the device: nobody overwrites the weights before they are out

    def _restore_tables(self, snapshot: _Snapshot) -> None:
        shadow = self.flat.shadow
        for table, before in zip(self.flat.tables, snapshot.tables, strict=False):
            table_shadow = None if shadow is None else self.flat.views(shadow, [table.name])[table.name]
            if isinstance(before, Rows):
                native.row_rewind(table.weight, before.rows, before.values, table_shadow)
            else:
                table.weight.copy_(before)
                if table_shadow is not None:
                    table_shadow.copy_(before)

    def _alpha(self, scale: float | Tensor) -> Tensor:
        if isinstance(scale, Tensor):
            return scale.to(self.flat.weights.dtype)
        if scale not in self._alphas:  # made once: building a device scalar waits for the device
            if len(self._alphas) > 8:
                self._alphas.clear()
            self._alphas[scale] = self.flat.weights.new_tensor(scale)
        return self._alphas[scale]


def _state(optimizer: torch.optim.Optimizer) -> tuple[dict[Tensor, dict[str, Any]], list[Any]]:
    """By parameter, and the step counts of the groups, None where they do not count (apex's do)."""

    def copy(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) else value

    state = {p: {key: copy(value) for key, value in entries.items()} for p, entries in optimizer.state.items()}
    return state, [copy(group.get("step")) for group in optimizer.param_groups]


@torch.no_grad()
def _restore_state(optimizer: torch.optim.Optimizer, before: tuple[dict[Tensor, dict[str, Any]], list[Any]]) -> None:
    """In place. What had no state has none again."""
    kept, counts = before
    for group, count in zip(optimizer.param_groups, counts, strict=True):
        if count is None:
            group.pop("step", None)
        elif isinstance(count, Tensor):
            group["step"].copy_(count)
        else:
            group["step"] = count
    for p, entries in list(optimizer.state.items()):
        if p not in kept:
            del optimizer.state[p]
            continue
        for key in list(entries):
            if key not in kept[p]:
                del entries[key]
            elif isinstance(kept[p][key], Tensor):
                entries[key].copy_(kept[p][key])
            else:
                entries[key] = kept[p][key]
