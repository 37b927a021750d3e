"""What a forward-mode pass of a model does otherwise than torch, so that its derivatives are those of a backward.

**torch.no_grad() holds.** Torch's forward mode goes through it. A backward does not: a running statistic that a forward
updates without a gradient, and then reads, is a constant.

**Some functions are composed of simpler ones.** H d is the forward-mode derivative of a gradient: it needs a derivative of the
backward of every operation. Torch 2.13 has none for those of silu, mish, hardsigmoid and group_norm; the operations that they
are composed of have. Values differ by rounding alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def _silu(input: Tensor, inplace: bool = False) -> Tensor:
    x = _read(input, inplace)
    return _given(input, x * torch.sigmoid(x), inplace)


def _mish(input: Tensor, inplace: bool = False) -> Tensor:
    x = _read(input, inplace)
    return _given(input, x * torch.tanh(F.softplus(x)), inplace)


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    return _given(input, F.relu6(_read(input, inplace) + 3) / 6, inplace)


def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """[N, C, ...]"""
    grouped = input.reshape(len(input), num_groups, -1)
    var, mean = torch.var_mean(grouped, -1, correction=0, keepdim=True)
    y = ((grouped - mean) * torch.rsqrt(var + eps)).view(input.shape)
    channels = (1, -1, *[1] * (input.ndim - 2))
    y = y if weight is None else y * weight.view(channels)
    return y if bias is None else y + bias.view(channels)


def _read(input: Tensor, inplace: bool) -> Tensor:
    return input.clone() if inplace else input  # the graph of the operations needs what is written over


def _given(input: Tensor, output: Tensor, inplace: bool) -> Tensor:
    return input.copy_(output) if inplace else output


COMPOSED = {F.silu: _silu, F.mish: _mish, F.hardsigmoid: _hardsigmoid, F.group_norm: _group_norm}


SWITCH = torch._C._set_grad_enabled  # what torch.no_grad() and torch.enable_grad() call, coming and going


class DualPass(TorchFunctionMode):
    """For a forward on dual numbers, which is to believe that it runs in grad mode: under torch.enable_grad().

    Where it is not to be differentiated in `reverse`, too, what it computes records no graph.
    """

    def __init__(self, reverse: bool):
        super().__init__()
        self._reverse, self._believed = reverse, True

    def __exit__(self, *error):
        torch._C._set_fwd_grad_enabled(True)  # whatever the body left
        return super().__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is SWITCH:
            self._believed = args[0]
            torch._C._set_fwd_grad_enabled(self._believed)
            return SWITCH(self._believed)
        if self._reverse:
            return COMPOSED.get(func, func)(*args, **(kwargs or {}))
        SWITCH(False)
        try:
            return self.call(func, args, kwargs or {})
        finally:
            SWITCH(self._believed)

    def call(self, func, args: tuple, kwargs: dict):
        """One function of the pass; a tape has it otherwise."""
        return func(*args, **kwargs)
