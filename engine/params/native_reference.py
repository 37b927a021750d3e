"""The operations of `engine.params.native` in plain torch: what serves where nothing is compiled, and the oracle of the tests.

Same arguments, same checks with the same words, same arithmetic in the same order; `engine.params.native` holds the formulas.
Weights are written through `.data`, which leaves version counters alone. No device is waited for.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64)
CHUNK = 2**17  # elements


def pilot_update(
    weights: Tensor, gradient: Tensor, snapshot: Tensor, alpha: Tensor, shadow: Tensor | None = None
) -> None:
    check = _Check("pilot_update", "weights", weights, 1)
    check.sized(weights.dtype, weights.shape, gradient=gradient, snapshot=snapshot)
    check.scalars((weights.dtype,), alpha=alpha)
    check.sized(torch.bfloat16, weights.shape, shadow=shadow)
    for w, g, s, b in _chunks(weights, gradient, snapshot, shadow):
        s.copy_(w)
        w.add_(g * alpha.data)
        if b is not None:
            b.copy_(w)


def rewind(weights: Tensor, snapshot: Tensor, shadow: Tensor | None = None) -> None:
    check = _Check("rewind", "weights", weights, 1)
    check.sized(weights.dtype, weights.shape, snapshot=snapshot)
    check.sized(torch.bfloat16, weights.shape, shadow=shadow)
    weights.data.copy_(snapshot.data)
    if shadow is not None:
        shadow.data.copy_(snapshot.data)


def adamw(
    weights: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, lr: Tensor, beta1: float,
    beta2: float, eps: float, weight_decay: float, clip: Tensor | None = None, found_inf: Tensor | None = None,
    shadow: Tensor | None = None,
) -> None:  # fmt: skip
    check = _Check("adamw", "weights", weights, 1)
    check.sized(weights.dtype, weights.shape, gradient=gradient, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    check.scalars(FLOATS, step=step, lr=lr, clip=clip, found_inf=found_inf)
    check.sized(torch.bfloat16, weights.shape, shadow=shadow)
    dtype, t, rate = weights.dtype, step.data.double(), lr.data.double()  # the factors are taken in float64
    decay = (1 - rate * weight_decay).to(dtype)
    step_size = (rate / (1 - beta1**t)).to(dtype)
    correction2 = (1 - beta2**t).sqrt().to(dtype)
    factor = None if clip is None else clip.data.to(dtype)
    for w, g, m, v, b in _chunks(weights, gradient, exp_avg, exp_avg_sq, shadow):
        g = g if factor is None else g * factor
        new_m = (g - m).mul_(1 - beta1).add_(m)
        new_v = (g * (1 - beta2)).mul_(g).add_(v * beta2)
        new_w = w * decay - (new_m * step_size).div_(new_v.sqrt().div_(correction2).add_(eps))
        for target, new in [(w, new_w), (m, new_m), (v, new_v)] + ([] if b is None else [(b, new_w.bfloat16())]):
            target.copy_(new if found_inf is None else torch.where(found_inf.data != 0, target, new))


def row_axpy(
    table: Tensor, rows: Tensor, values: Tensor, alpha: Tensor, snapshot: Tensor | None = None,
    shadow: Tensor | None = None,
) -> None:  # fmt: skip
    check = _Check("row_axpy", "table", table, 2)
    sizes = check.rows(rows)
    check.sized(table.dtype, sizes, values=values)
    check.scalars((table.dtype,), alpha=alpha)
    check.sized(table.dtype, sizes, snapshot=snapshot)
    check.sized(torch.bfloat16, table.shape, shadow=shadow)
    before = table.data.index_select(0, rows)
    after = before + values.data * alpha.data
    if snapshot is not None:
        snapshot.data.copy_(before)
    table.data.index_copy_(0, rows, after)
    if shadow is not None:
        shadow.data.index_copy_(0, rows, after.bfloat16())


def row_rewind(table: Tensor, rows: Tensor, snapshot: Tensor, shadow: Tensor | None = None) -> None:
    check = _Check("row_rewind", "table", table, 2)
    check.sized(table.dtype, check.rows(rows), snapshot=snapshot)
    check.sized(torch.bfloat16, table.shape, shadow=shadow)
    table.data.index_copy_(0, rows, snapshot.data)
    if shadow is not None:
        shadow.data.index_copy_(0, rows, snapshot.data.bfloat16())


def _chunks(*tensors: Tensor | None):
    """The tensors [N], piece by piece on a CPU: temporaries stay in its cache, and none is new memory to be mapped.

    adamw on 17M float32, one thread of an AMD EPYC: 92 ms; in one piece 715 ms.
    """
    if tensors[0].device.type != "cpu" or torch.compiler.is_compiling():
        yield tuple(None if t is None else t.data for t in tensors)
        return
    for i in range(0, tensors[0].numel(), CHUNK):
        yield tuple(None if t is None else t.data[i : i + CHUNK] for t in tensors)


def _described(tensor: Tensor) -> str:
    contiguous = "" if tensor.is_contiguous() else " (not contiguous)"
    return f"{_name(tensor.dtype)} {list(tensor.shape)}{contiguous} on {tensor.device}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Check:
    """The checks of one call, `csrc/checks.cpp` once more; the others have to fit `model`."""

    def __init__(self, op: str, name: str, model: Tensor, dim: int):
        self.op, self.name, self.model = f"metadistil::{op}", name, model
        if model.dtype not in FLOATS or model.dim() != dim or not model.is_contiguous():
            dimensions = f"{dim} dimension" + "s" * (dim > 1)
            must = f"it must be float32 or float64, contiguous, with {dimensions}."
            raise ValueError(f"{self.op}: {name} is {_described(model)}; {must}")
        self._without_gradient(name, model)

    def sized(self, dtype: torch.dtype, sizes: tuple[int, ...], **tensors: Tensor | None) -> None:
        device = self.model.device
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            fits = tensor.dtype == dtype and tuple(tensor.shape) == tuple(sizes) and tensor.device == device
            if not fits or not tensor.is_contiguous():
                must = f"it must be {_name(dtype)} {list(sizes)}, contiguous, on {device}"
                to_fit = f"to fit {self.name} {_described(self.model)}"
                raise ValueError(f"{self.op}: {name} is {_described(tensor)}; {must}, {to_fit}.")
            self._without_gradient(name, tensor)

    def scalars(self, dtypes: tuple[torch.dtype, ...], **tensors: Tensor | None) -> None:
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            if tensor.dtype not in dtypes or tensor.dim() != 0 or tensor.device != self.model.device:
                must = f"it must be {' or '.join(map(_name, dtypes))} [] on {self.model.device}."
                raise ValueError(f"{self.op}: {name} is {_described(tensor)}; {must}")
            self._without_gradient(name, tensor)

    def rows(self, rows: Tensor) -> tuple[int, int]:
        """The sizes [n, H] of what belongs to `rows` [n]."""
        device = self.model.device
        if rows.dtype != torch.int64 or rows.dim() != 1 or not rows.is_contiguous() or rows.device != device:
            must = f"it must be int64, contiguous, with 1 dimension, on {device}."
            raise ValueError(f"{self.op}: rows is {_described(rows)}; {must}")
        length = self.model.shape[0]
        if device.type == "cpu" and type(rows) is Tensor and not torch.compiler.is_compiling():  # values are at hand
            outside = ((rows < 0) | (rows >= length)).nonzero()
            if len(outside):
                what = f"rows[{outside[0].item()}] is {rows[outside[0]].item()}"
                raise IndexError(f"{self.op}: {what}; the table has rows 0 to {length - 1}.")
        return rows.shape[0], self.model.shape[1]

    def _without_gradient(self, name: str, tensor: Tensor) -> None:
        if tensor.requires_grad and torch.is_grad_enabled():
            why = "requires grad, but the operation has no derivative; call it under torch.no_grad()."
            raise ValueError(f"{self.op}: {name} {why}")
