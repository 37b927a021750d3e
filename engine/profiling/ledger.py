"""Who holds memory: the bytes of live tensors during a step, by device, by section, and by what they are for.

Every storage counts once, from the operation that made it until it is freed, in blocks of the device's allocator. It works
on real tensors and on fake ones (torch._subclasses.fake_tensor), whose storages have a size and nothing else.

What a storage is for:

    weights        of models: the flat buffers, bf16 shadows, frozen weights and their copies, buffers
    gradients      the flat gradients, and what has the shape of a weight or of all of them and no graph
    optimizer      its state
    snapshots      what a time machine keeps
    inputs         batches
    activations    made by a forward pass that records a graph, or freed by a backward pass: kept for it. Also what a
                   checkpointed layer makes when it runs again, inside of a backward pass
    second order   made in section "JVP" (tangents, duals, the graph over them), or by a backward pass that records a graph
                   of its own (create_graph) and outlives it
    other          temporaries, losses

The first five are known storages, told by `known`; the rest is told by how a storage was made and how it went. What an
operation allocates inside of its kernel does not show, nor what an allocator keeps in reserve (engine.profiling.estimate).

Ours stays: torch.distributed._tools.mem_tracker, which is private, goes by modules. It knows neither sections of a step nor
second derivatives, and a forward-mode pass or a flat gradient belongs to no module.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.sections import listening

CATEGORIES = ("weights", "gradients", "optimizer", "snapshots", "inputs", "activations", "second order", "other")
BLOCK = {"cuda": 512, "cpu": 64}  # bytes: what an allocator rounds sizes up to
TIMELINE = 4096  # points at most
OUTSIDE = "other"  # the section where none is named

Known = Callable[[], Iterable[tuple[str, Tensor]]]  # category, tensor


class Point(NamedTuple):
    """A place in a timeline."""

    event: int  # allocations and frees before it
    bytes: int  # live after it
    section: str


class _Storage:
    """One live storage, or one that was."""

    __slots__ = (
        "backward",
        "born",
        "category",
        "device",
        "drawn",
        "graph",
        "ref",
        "round",
        "section",
        "shape",
        "size",
        "survived",
    )

    def __init__(self, ref, device: str, size: int, born: int, section: str, shape: tuple[int, ...]):
        self.ref, self.device, self.size, self.born, self.section, self.shape = ref, device, size, born, section, shape
        self.category: str | None = None
        self.backward = in_backward()
        self.graph = torch.is_grad_enabled()  # whether the pass that made it records a graph
        self.drawn = False  # whether a backward pass freed it
        self.survived = True  # the outermost backward pass that it was made in
        self.round = 0


class _Account:
    """Of one device type."""

    def __init__(self):
        self.bytes = self.peak = self.peak_event = 0
        self.peak_section = OUTSIDE
        self.by_section: dict[str, int] = {}
        self.gone: list[_Storage] = []  # freed since the peak, when they were there
        self.timeline: list[Point] = []


class Ledger(TorchDispatchMode):
    """Follows the storages of a body, and those that `known` names.

        with ledger.following():
            step()
        ledger.peak("cuda"), ledger.at_peak("cuda"), ledger.by_section("cuda")

    `known` is asked at every section's end for (category, tensor) of what lives as long as the models do, `shapes` are those of
    weights. Storages that neither an operation of the body made nor `known` names are unseen. A storage that is resized by
    an operation counts its new size from there on.
    """

    def __init__(self, known: Known = tuple, shapes: Iterable[torch.Size] = (), timeline: int = TIMELINE):
        super().__init__()
        self.known, self.shapes = known, {tuple(s) for s in shapes}
        self._points = max(2, timeline)
        self._live: dict[int, _Storage] = {}
        self._accounts: dict[str, _Account] = {}
        self._sections: list[str] = []
        self._events = 0
        self._round = 0  # how many outermost backward passes there were
        self._outside = True

    # --- what is followed

    @contextmanager
    def following(self) -> Iterator[Ledger]:
        """The body's operations and sections are heard."""
        self.look()
        with listening(self), self:
            yield self
        self.look()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self._see(out)
        elif out is not None:
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self._see(leaf)
        return out

    def enter(self, name: str) -> None:
        self._sections.append(name)
        for account in self._accounts.values():
            self._top(account)

    def leave(self) -> None:
        self.look()
        self._sections.pop()

    def captured(self) -> Callable[[], None]:
        """Nothing is made by a replay: a graph's memory is its own."""
        return lambda: None

    def look(self) -> None:
        """Learn what the known storages are for, at once rather than at the next section's end."""
        for category, tensor in self.known():
            self._see(tensor, category)

    def _see(self, tensor: Tensor, category: str | None = None) -> None:
        if tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        self._turn()
        found = self._live.get(key)
        if found is None:
            ref = weakref.ref(storage, lambda _, key=key: self._free(key))
            device = tensor.device.type
            found = _Storage(ref, device, 0, self._events, self._section, tuple(tensor.shape))
            found.round = self._round
            self._live[key] = found
        if category is not None:
            found.category = category
        block = BLOCK.get(found.device, 1)
        size = -(-size // block) * block
        if size != found.size:
            found.size, grown = size, size - found.size
            self._book(found.device, grown)

    def _free(self, key: int) -> None:
        self._turn()
        storage = self._live.pop(key)
        storage.drawn, storage.survived = in_backward(), storage.round != self._round
        account = self._accounts.get(storage.device)
        if account is None:  # it never held a byte
            return
        if storage.born < account.peak_event:
            account.gone.append(storage)
        self._book(storage.device, -storage.size)

    def _turn(self) -> None:
        """Notice where an outermost backward pass began."""
        outside = not in_backward()
        if self._outside and not outside:
            self._round += 1
        self._outside = outside

    def _book(self, device: str, grown: int) -> None:
        account = self._accounts.setdefault(device, _Account())
        account.bytes += grown
        self._events += 1
        if account.bytes > account.peak:
            account.peak, account.peak_event, account.peak_section = account.bytes, self._events, self._section
            account.gone.clear()
        self._top(account)
        account.timeline.append(Point(self._events, account.bytes, self._section))
        if len(account.timeline) > 2 * self._points:
            account.timeline = self.thinned(account.timeline)

    def _top(self, account: _Account) -> None:
        section = self._section
        if account.bytes > account.by_section.get(section, 0):
            account.by_section[section] = account.bytes

    @property
    def _section(self) -> str:
        return self._sections[-1] if self._sections else OUTSIDE

    # --- what came of it

    def live(self, device: str) -> int:
        """Bytes, now."""
        return self._of(device).bytes

    def peak(self, device: str) -> int:
        """The most bytes that were live at once."""
        return self._of(device).peak

    def peak_section(self, device: str) -> str:
        """The section in which they were."""
        return self._of(device).peak_section

    def by_section(self, device: str) -> dict[str, int]:
        """The most bytes that were live in each section."""
        return dict(self._of(device).by_section)

    def at_peak(self, device: str) -> dict[str, int]:
        """Bytes by category when most were live; they add up to `peak`, unless a storage was resized since."""
        account, found = self._of(device), dict.fromkeys(CATEGORIES, 0)
        live = (s for s in self._live.values() if s.device == device and s.born < account.peak_event)
        for storage in [*account.gone, *live]:
            found[self._category(storage)] += storage.size
        return found

    def timeline(self, device: str) -> list[Point]:
        """Live bytes over the events, in no more points than were asked for; of several in one place the highest is kept."""
        points = self._of(device).timeline
        while len(points) > self._points:
            points = self.thinned(points)
        return points

    def _of(self, device: str) -> _Account:
        return self._accounts.get(device) or _Account()

    def _category(self, storage: _Storage) -> str:
        if storage.category is not None:
            return storage.category
        if storage.section == "JVP":
            return "second order"
        if storage.backward and storage.graph:
            return "second order" if storage.survived else "activations"
        if storage.graph:
            return "activations"
        if storage.shape in self.shapes:
            return "gradients"
        return "activations" if storage.drawn and not storage.backward else "other"

    @staticmethod
    def thinned(points: list[Point]) -> list[Point]:
        """Of two neighbours the higher one."""
        return [max(points[i : i + 2], key=lambda p: p.bytes) for i in range(0, len(points), 2)]


def in_backward() -> bool:
    """Whether autograd runs a backward pass on this thread."""
    return torch._C._current_graph_task_id() != -1
