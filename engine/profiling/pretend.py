"""A step without its work: fake tensors on a CPU, or on a GPU that is not there.

Under torch's FakeTensorMode an operation gives a tensor of the right shape, dtype and device and computes nothing, so that the
engine's own steps run in a second for models of any size, in no memory. What that mode leaves open is settled here:

    a GPU without CUDA     autograd asks where tensors are and would look for a device there: it is told "cpu", and runs on the
                           host's thread; what its passes make "on the cpu" is made on the GPU
    dropout, attention     torch chooses by device in C++, which was told "cpu": what it does on CUDA is chosen here
    unique                 as many values as there can be
    random numbers         no weights are drawn; generators of a GPU have a state that means nothing
    streams                there are none, and copies to pinned memory are copies
    engine.params.native          its kernels for CUDA, which write in place and allocate nothing, are taken to be compiled
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from engine.params import native
from engine.profiling.ledger import in_backward

aten = torch.ops.aten
FILLS = {aten.normal_, aten.uniform_, aten.bernoulli_, aten.random_}
HOST = torch.device("cpu")
IS_CUDA = Tensor.is_cuda.__get__


@contextmanager
def pretending(device: torch.device):
    """Tensors made in the body are fake; those on a CUDA `device` need no such device. Do not use real tensors in it."""
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        stack.enter_context(patch.object(nn.Module, "to", _move))
        stack.enter_context(_Answers(device))
        if device.type == "cuda":
            stack.enter_context(_AsOnCuda())
            _without_cuda(stack)
        yield


class _Answers(TorchDispatchMode):
    """What fake tensors cannot know, and where they are as C++ sees it."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return HOST
        if func is aten._unique2.default:
            x = args[0]
            return x.new_empty(x.numel()), torch.empty_like(x), x.new_empty(x.numel())
        if func is aten.equal.default:  # of the generators' states
            return True
        if func._overloadpacket in FILLS:
            return args[0]
        if kwargs.get("device") == HOST and (in_backward() or forward_ad._current_level >= 0):
            kwargs = kwargs | {"device": self.device}
        return func(*args, **kwargs)


class _AsOnCuda(TorchFunctionMode):
    """The kernels that torch takes on CUDA, whose memory is another than on the CPU, and moves from device to device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func == IS_CUDA:
            return args[0].device.type == "cuda"
        if func is F.dropout:
            return _dropout(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is Tensor.to:
            return _to(*args, **kwargs)
        return func(*args, **kwargs)


def _to(tensor: Tensor, *args, **kwargs) -> Tensor:
    """Torch's own looks for the device."""
    device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
    if device is None or device.type == tensor.device.type:
        return tensor if dtype in (None, tensor.dtype) else aten._to_copy(tensor, dtype=dtype)
    return aten._to_copy(tensor, dtype=dtype, device=device)


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """One kernel, whose graph holds a mask of a byte an element; on a CPU it is a floating-point one."""
    if not training or p == 0:
        return input
    output = torch.native_dropout(input, p, True)[0]
    return input.copy_(output) if inplace else output


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """The memory-efficient kernel, which takes masks; plain products where `sdpa_kernel` allows those alone.

    Torch makes a boolean mask one that is added, of its whole size.
    """
    if not (torch.backends.cuda.flash_sdp_enabled() or torch.backends.cuda.mem_efficient_sdp_enabled()):
        return aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(
                attn_mask.logical_not(), float("-inf")
            )
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    graph = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, graph, dropout_p, is_causal, scale=scale
    )[0]


def _move(module: nn.Module, *args, **kwargs) -> nn.Module:
    """nn.Module.to by new parameters, tied ones staying tied; torch would exchange fake ones in place, and cannot."""
    moved: dict[int, Tensor] = {}

    def move(tensor: Tensor) -> Tensor:
        if id(tensor) not in moved:
            new = tensor.detach().to(*args, **kwargs)
            same = new.device == tensor.device and new.dtype == tensor.dtype
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, tensor.requires_grad)
            moved[id(tensor)] = tensor if same else new
        return moved[id(tensor)]

    for each in module.modules():
        for tensors in (each._parameters, each._buffers):
            tensors.update({name: None if t is None else move(t) for name, t in tensors.items()})
    return module


class _Stream:
    def __init__(self, *_):
        pass

    def wait_stream(self, other: _Stream) -> None:
        pass


def _without_cuda(stack: ExitStack) -> None:
    """Calls of torch.cuda that a step makes, for the body of `stack`."""
    nothing = {
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda *_: None,
        "is_current_stream_capturing": lambda: False,
        "is_initialized": lambda: False,
        "current_stream": _Stream,
        "Stream": _Stream,
        "stream": lambda _: nullcontext(),
    }
    for name, instead in nothing.items():
        stack.enter_context(patch.object(torch.cuda, name, instead))
    operations = ("pilot_update", "rewind", "adamw", "row_axpy", "row_rewind")
    kernels = SimpleNamespace(**dict.fromkeys(operations, lambda *_: None))
    stack.enter_context(patch.object(native, "_operations", lambda _: kernels))
