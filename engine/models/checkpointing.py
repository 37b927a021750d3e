"""Activation checkpointing that still saves memory where a gradient is differentiated again.

A checkpointed layer h = f(x, w) keeps its inputs alone. Its gradient is a function with a derivative of its own, and that
function keeps its inputs alone, too:

    forward       h = f(x, w)                                       keeps x, w
    gradient      (dx, dw) = G(x, w, dh) = dh^T df/d(x, w)           runs f again; with create_graph keeps x, w, dh
    derivative    of < G(x, w, dh), a > by x, w and dh               runs f and G again; raises where it is to have a graph

so that a layer's activations live only while that layer is worked on, in the pilot's first backward as well as in the
meta-gradient's. `torch.utils.checkpoint` cannot give this: differentiated twice, its recomputed activations become inputs
of the first backward's graph, which then holds what the forward's graph let go (tests/models/test_checkpointing.py counts it).
Source: Chen et al., "Training deep nets with sublinear memory cost", 2016, here one order higher.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, get_args

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_unflatten

from engine.config import Checkpointing
from engine.models.encoder_layers import encoder_layers
from engine.params.pass_state import RandomState, capturing
from engine.params.swapped import swapped

CHOICES = get_args(Checkpointing)

# What else goes by the name of checkpointing, and why a gradient of a gradient cannot run through it; each seen to fail
# with torch 2.13 in tests/models/test_checkpointing.py
REFUSED = {
    "selective": "selective checkpointing hands a saved tensor out once, detached from the graph: a second derivative "
    "needs it again, and a backward over it stops with an error",
    "reentrant": "reentrant checkpointing records no graph in its forward and works under .backward() alone, without "
    "inputs=: torch.autograd.grad, which the pilot's gradient needs, stops with an error",
}

KERNELS = {
    SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled,
    SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled,
    SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled,
    SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled,
}


@contextmanager
def checkpointed(module: nn.Module):
    """Forwards in the body keep of every encoder layer its inputs only; backwards may come after it.

    Weights that stand in for the layer's own (engine.params.swapped), buffers, train or eval mode, the kind of
    attention (transformers' and sdpa_kernel's), autocast and the random state are those of the forward when a layer runs
    again. In forward mode the layers run as they are, and so do layers with an embedding in them. What hooks inside a
    layer collect (attention maps) has no graph; what hooks on a layer collect (hidden states) has.
    Raises ValueError where the layers are not known; the backward raises RuntimeError where an input was overwritten.
    """
    with ExitStack() as stack:
        for layer in encoder_layers(module):
            # by a hook engine.params.flat puts looked-up rows in the place of an embedding's output: inputs that none knows of
            if any(isinstance(m, nn.Embedding) for m in layer.modules()):
                continue
            stack.callback(_set_forward, layer, layer.__dict__.get("forward"))
            _set_forward(layer, _checkpointed_forward(layer))
        yield


def _set_forward(layer: nn.Module, forward: Callable | None) -> None:
    """In the instance, over its class's; None takes it away."""
    if forward is None:
        layer.__dict__.pop("forward", None)
    else:
        layer.__dict__["forward"] = forward


def _checkpointed_forward(layer: nn.Module) -> Callable:
    body = _Body(layer)

    def forward(*args, **kwargs):
        call, tensors = _Call.of(body, args, kwargs)
        if not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors) or _dual(tensors):
            return body(*args, **kwargs)
        return _join(_Layer.apply(call, *tensors), *call.outputs)

    return forward


def _dual(tensors: Sequence[Tensor]) -> bool:
    """Whether one of them carries a forward-mode tangent, which torch.autograd.Function would refuse."""
    return any(t.is_floating_point() and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


class _Body(nn.Module):
    """A layer's own forward, without the layer's hooks: those run around the checkpoint, once."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer, self.original = layer, layer.forward

    def forward(self, *args, **kwargs):
        return self.original(*args, **kwargs)


_DRAWING: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # layers that were seen to draw in eval mode

_TENSOR = object()  # stands in a flattened tree where a tensor was


def _split(tree: Any) -> tuple[list[Tensor], list[Any], Any]:
    """The tensors of a tree, and the tree without them."""
    leaves, spec = tree_flatten(tree)
    return [x for x in leaves if isinstance(x, Tensor)], [_TENSOR if isinstance(x, Tensor) else x for x in leaves], spec


def _join(tensors: Sequence[Tensor], leaves: list[Any], spec: Any) -> Any:
    waiting = iter(tensors)
    return tree_unflatten([next(waiting) if x is _TENSOR else x for x in leaves], spec)


class _Call:
    """One call of a layer, with all but its tensors that it takes to make it again and get the same."""

    @classmethod
    def of(cls, body: _Body, args: tuple, kwargs: dict[str, Any]) -> tuple[_Call, list[Tensor]]:
        """The call and its tensors, weights first, which are autograd's to keep and to free."""
        call = cls()
        weights = dict(body.named_parameters())  # inside `swapped` these are the ones that stand in
        inputs, *call.inputs = _split((args, kwargs))
        call.body, call.names = body, list(weights)
        return call, [*weights.values(), *inputs]

    def first(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Run the layer, which may update its buffers, and remember the state in which it began."""
        devices = {t.device for t in tensors}
        self.modes, self.attention = _modes(self.body), _attention(self.body)
        self.kernels = [kernel for kernel, enabled in KERNELS.items() if enabled()]
        self.buffers = {name: b.detach().clone() for name, b in self.body.named_buffers()}
        self.casts = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in {"cpu", *(d.type for d in devices)}
        ]
        # a layer that draws nothing leaves a CUDA graph, which cannot draw again, both passes; in eval mode few do
        quiet = not any(m.training for m in self.body.layer.modules()) and self.body.layer not in _DRAWING
        self.random = None if quiet and capturing(devices) else RandomState(devices)
        outputs, *self.outputs = _split(self._run(tensors, {}))
        if quiet and self.random is not None:
            if self.random.moved():
                _DRAWING.add(self.body.layer)
            else:
                self.random = None
        return outputs

    def again(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What `first` gave, from these tensors, in its state; today's modes, buffers and random state are left alone."""
        with ExitStack() as stack:
            for recorded, now in ((self.modes, _modes(self.body)), (self.attention, _attention(self.body))):
                stack.callback(_set, now)
                _set(recorded)
            stack.enter_context(sdpa_kernel(self.kernels) if self.kernels else nullcontext())
            stack.enter_context(nullcontext() if self.random is None else self.random.again())
            for kind, dtype, enabled in self.casts:
                stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
            # a batch norm would otherwise count the batch once more
            buffers = {name: b.clone() for name, b in self.buffers.items()}
            return _split(self._run(tensors, buffers))[0]

    def _run(self, tensors: Sequence[Tensor], buffers: dict[str, Tensor]) -> Any:
        weights = dict(zip(self.names, tensors, strict=False))
        args, kwargs = _join(tensors[len(weights) :], *self.inputs)
        with swapped(self.body, weights | buffers):
            return self.body(*args, **kwargs)


State = list[tuple[Any, str, Any]]  # object, attribute, value


def _modes(body: nn.Module) -> State:
    return [(m, "training", m.training) for m in body.modules()]


def _attention(body: nn.Module) -> State:
    """The kind of attention that transformers' layers read from the configuration that they share."""
    name = "_attn_implementation"
    configs = {id(c): c for m in body.modules() if hasattr(c := getattr(m, "config", None), name)}
    return [(c, name, getattr(c, name)) for c in configs.values()]


def _set(state: State) -> None:
    for thing, name, value in state:
        if getattr(thing, name) is not value:
            setattr(thing, name, value)


def _leaves(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The same values at the root of a new graph."""
    return [None if t is None else t.detach().requires_grad_(t.requires_grad) for t in tensors]


def _pull_back(outputs, inputs, cotangents, create_graph: bool = False) -> list[Tensor | None]:
    """cotangents^T d outputs / d inputs, None for an input that takes no gradient or has none."""
    pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if c is not None and o is not None]
    pairs = [(o, c) for o, c in pairs if o.requires_grad]
    wanted = [i for i, t in enumerate(inputs) if t is not None and t.requires_grad]
    result: list[Tensor | None] = [None] * len(inputs)
    if pairs and wanted:
        outputs, cotangents = zip(*pairs, strict=True)
        gradients = torch.autograd.grad(
            outputs, [inputs[i] for i in wanted], cotangents, create_graph=create_graph, allow_unused=True
        )
        for i, gradient in zip(wanted, gradients, strict=True):
            result[i] = gradient
    return result


class _Layer(torch.autograd.Function):
    """h = f(x, w), of which only x and w are kept."""

    @staticmethod
    def forward(ctx, call: _Call, *tensors):
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        # detached, since autocast would store a weight's cast for later forwards, here without its graph
        outputs = call.first([t.detach() for t in tensors])
        ctx.mark_non_differentiable(*(o for o in outputs if not o.is_floating_point()))
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *cotangents):
        return None, *_LayerGradient.apply(ctx.call, len(cotangents), *cotangents, *ctx.saved_tensors)


class _LayerGradient(torch.autograd.Function):
    """(dx, dw) = G(x, w, dh), of which only x, w and dh are kept."""

    @staticmethod
    def forward(ctx, call: _Call, n: int, *tensors):
        ctx.call, ctx.n = call, n
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        with torch.enable_grad():
            inputs = _leaves(tensors[n:])
            outputs = call.again(inputs)
        return tuple(_pull_back(outputs, inputs, [None if c is None else c.detach() for c in tensors[:n]]))

    @staticmethod
    def backward(ctx, *directions):
        # once_differentiable would give None, not an error, to torch.autograd.grad(..., allow_unused=True)
        if torch.is_grad_enabled():
            raise RuntimeError("Checkpointed layers have two derivatives; this backward asks for the graph of a third.")
        given = _leaves(ctx.saved_tensors)
        cotangents, inputs = given[: ctx.n], given[ctx.n :]
        with torch.enable_grad():
            gradients = _pull_back(ctx.call.again(inputs), inputs, cotangents, create_graph=True)
            return None, None, *_pull_back(gradients, given, directions)
