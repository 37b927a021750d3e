"""CUDA graphs of a step: captured once for each shape of its inputs, then replayed with a single launch.

    step = StepGraphs(lambda batches, quizzes: METHODS["metadistil"].step(state, batches, quizzes), device)
    values = step(batches, quizzes)

The step is a function of tensors: what it changes (weights, moments, gradients) lies where it lay, what the host decides
between two steps (learning rates, which batches) reaches it through tensors. The first calls of a shape run it as it is,
on a stream of their own, and are steps like any other: they load modules, tune kernels and make optimizer state. The next
call captures it, and from then on a step of that shape is a copy of its inputs and a replay: every forward, backward,
pilot, optimizer step and rewind in one graph. Graphs share one pool of memory. Random numbers go on from replay to replay
as they do from step to step, so that replays give the bits of eager steps.

What cannot be captured runs eagerly, and why is said once; `mode="on"` raises instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from engine.errors import UserError
from engine.sections import captured

Mode = Literal["auto", "on", "off"]
Step = Callable[..., dict[str, Tensor]]

WARM_UP = 3  # eager steps before the first capture
WARM_SHAPE = 1  # eager steps of every further shape: kernels are tuned by shape
MOST = 256  # graphs; shapes that come after them run eagerly


class Capture(Protocol):
    """What a device offers; `CudaCapture` is CUDA's."""

    def warm_up(self, call: Callable[[], Any]) -> Any:
        """What the call returns, run as it is."""

    def capture(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """A function that runs the recorded work once more, and what the call returned: the same tensors every time.

        Nothing of the call's work has been done. Raises RuntimeError where it cannot be recorded.
        """


class CudaCapture:
    """`torch.cuda.graph` on a stream of its own, one pool of memory for all graphs."""

    def __init__(self, device: torch.device):
        torch.cuda.init()
        self._index = torch.cuda.current_device() if device.index is None else device.index
        self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def warm_up(self, call: Callable[[], Any]) -> Any:
        current = torch.cuda.current_stream(self._index)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            out = call()
        current.wait_stream(self._stream)
        return out

    def capture(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        graph, generator = torch.cuda.CUDAGraph(), torch.cuda.default_generators[self._index]
        before = generator.clone_state()
        try:
            # thread_local: the thread that prepares batches may pin memory meanwhile
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                kept = call()
        except BaseException:
            # torch up to 2.11 leaves a generator behind that believes it is being captured still
            generator.graphsafe_set_state(before)
            raise
        return graph.replay, kept


class Graph:
    """One captured step, with the tensors that it reads its inputs from and writes its values to."""

    def __init__(self, step: Step, inputs: tuple, capture: Capture):
        self._names = list(inspect.signature(step).parameters)
        self._static, self._spec = pytree.tree_flatten(inputs)
        self._static = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in self._static]
        static = pytree.tree_unflatten(self._static, self._spec)
        self._replay, (self._keys, self._values) = capture.capture(lambda: _together(step(*static)))
        self._replayed = captured()

    def __call__(self, *inputs: Any) -> dict[str, Tensor]:
        """The step on other inputs of one structure, shape, dtype and device; ValueError names the one that is not the same."""
        leaves, spec = pytree.tree_flatten(inputs)
        if spec != self._spec:
            raise ValueError(f"a CUDA graph captured for inputs of the structure {self._spec} was given {spec}.")
        for i, (static, leaf) in enumerate(zip(self._static, leaves, strict=True)):
            if _signature(static) != _signature(leaf):
                name = _paths(inputs, self._names)[i]
                raise ValueError(f"{name} is {_described(leaf)}, but this CUDA graph was captured with {_described(static)}; "
                                 "a graph takes inputs of one shape, dtype and device only.")  # fmt: skip
        return self.replay(leaves)

    def replay(self, leaves: Sequence[Any]) -> dict[str, Tensor]:
        """The step on leaves that are known to fit."""
        pairs = [(s, leaf) for s, leaf in zip(self._static, leaves, strict=True) if isinstance(s, Tensor)]
        torch._foreach_copy_([s for s, _ in pairs], [leaf for _, leaf in pairs], non_blocking=True)
        self._replay()
        self._replayed()
        return dict(zip(self._keys, self._values.clone().unbind(), strict=True))


class StepGraphs:
    """`step(*inputs) -> {name: device scalar}`, run eagerly, captured and replayed by the shapes of its inputs.

    Inputs are nests of lists, dicts and batches with tensors on `device` in them. `forget` is called where a capture
    broke off: the step's Python ran, its work did not. `cause` says why steps run eagerly, None where they do not.

    Raises UserError for `mode="on"` without a CUDA device, or where a capture fails; ValueError for an input that lies
    on another device, naming it.
    """

    def __init__(
        self, step: Step, device: torch.device, mode: Mode = "auto", *, say: Callable[[str], None] = lambda _: None,
        forget: Callable[[], None] = lambda: None, capture: Capture | None = None,
    ):  # fmt: skip
        if mode not in get_args(Mode):
            raise ValueError(f"mode is {mode!r}; it must be one of {', '.join(get_args(Mode))}.")
        self.step, self.device, self.mode = step, device, mode
        self._say, self._forget, self._capture = say, forget, capture
        self._graphs: dict[Any, Graph] = {}
        self._seen: dict[Any, int] = {}
        self._full = False
        self.cause: str | None = None
        if mode == "off":
            self.cause = "they are switched off"
        elif capture is None and device.type != "cuda":
            require(mode, device)
            self.cause = f"the device is {device.type}"
        elif capture is None:
            self._capture = CudaCapture(device)

    @property
    def captured(self) -> int:
        """How many graphs there are."""
        return len(self._graphs)

    def __call__(self, *inputs: Any) -> dict[str, Tensor]:
        if self.cause is not None:
            return self.step(*inputs)
        leaves, spec = pytree.tree_flatten(inputs)
        key = spec, tuple(_signature(leaf) for leaf in leaves)
        if key in self._graphs:
            return self._graphs[key].replay(leaves)
        self._check(inputs, leaves)
        seen = self._seen[key] = self._seen.get(key, 0) + 1
        if seen <= (WARM_SHAPE if self._graphs else WARM_UP) or not self._room():
            return self._capture.warm_up(lambda: self.step(*inputs))
        try:
            self._graphs[key] = Graph(self.step, inputs, self._capture)
        except RuntimeError as error:
            self._give_up(error)
            return self.step(*inputs)
        return self._graphs[key].replay(leaves)

    def _check(self, inputs: tuple, leaves: Sequence[Any]) -> None:
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and (leaf.device.type != self.device.type or leaf.requires_grad):
                name = _paths(inputs, list(inspect.signature(self.step).parameters))[i]
                raise ValueError(f"{name} is {_described(leaf)}; a captured step takes tensors on {self.device} that require "
                                 "no grad.")  # fmt: skip

    def _room(self) -> bool:
        if len(self._graphs) < MOST:
            return True
        if not self._full:
            self._full = True
            self._say(f"CUDA graphs: {MOST} shapes are captured; further ones run eagerly.")
        return False

    def _give_up(self, error: RuntimeError) -> None:
        self._forget()
        self.cause = _root(error)
        if self.mode == "on":
            raise UserError(
                f"--cuda-graphs on, but the step cannot be captured: {self.cause}; use --cuda-graphs auto."
            ) from error
        self._say(f"CUDA graphs: not used, since {self.cause}; steps run eagerly.")


def require(mode: Mode, device: torch.device) -> None:
    """Raises UserError where graphs are demanded of a device that has none."""
    if mode == "on" and device.type != "cuda":
        raise UserError(
            f"--cuda-graphs on needs a CUDA device, and this run is on {device.type}; use --cuda-graphs auto."
        )


def _together(values: dict[str, Tensor]) -> tuple[list[str], Tensor]:
    """All values in one tensor [n], which one copy takes out of the next replay's way."""
    return list(values), torch.stack(list(values.values()))


def _signature(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype, leaf.device, leaf.requires_grad) if isinstance(leaf, Tensor) else leaf


def _described(leaf: Any) -> str:
    if not isinstance(leaf, Tensor):
        return repr(leaf)
    gradient = " that requires grad" if leaf.requires_grad else ""
    return f"{str(leaf.dtype).removeprefix('torch.')} {list(leaf.shape)} on {leaf.device}{gradient}"


def _paths(inputs: tuple, names: list[str]) -> list[str]:
    """What each leaf is called: batches[0].inputs['words']['input_ids']."""
    found = []
    for path, _ in pytree.tree_flatten_with_path(inputs)[0]:
        first, *rest = path
        found.append(names[min(first.idx, len(names) - 1)] + pytree.keystr(tuple(rest)))
    return found


def _root(error: BaseException) -> str:
    """The first line of the first error: what follows a broken capture says only that it broke."""
    while error.__context__ is not None:
        error = error.__context__
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
