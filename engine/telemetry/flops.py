"""Floating-point operations: counted in one step, and what that makes of steps of other shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


def _shapes(count: Callable[..., int], tensors: int) -> Callable[..., int]:
    return lambda *args, **_: count(*(t.shape for t in args[:tensors]))


# torch counts the fused attention of GPUs alone
FORMULAS = flop_registry | {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _shapes(sdpa_flop_count, 3),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _shapes(sdpa_backward_flop_count, 4),
}
PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.convolution, torch.ops.aten.convolution_backward}


class FlopCounter(TorchDispatchMode):
    """Counts the matrix products and fused attention of its body, a multiplication and an addition as two; what is computed
    again, as fused attention does in its backward, counts again.

    It is torch's FlopCounterMode without its hooks on modules, which checkpointed layers do not take. `products` are those
    with weights, `attention` those of every example by itself. `complete` turns False where an operation's formula does not
    take its arguments: a figure is not worth a run.
    """

    def __init__(self):
        super().__init__()
        self.products = self.attention = 0
        self.complete = True

    @property
    def total(self) -> int:
        return self.products + self.attention

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in FORMULAS:
            try:
                count = FORMULAS[packet](*args, **(kwargs or {}), out_val=out)
            except Exception:  # noqa: BLE001 - whatever it is, the operation itself was done
                self.complete = False
                return out
            if packet in PRODUCTS:
                self.products += count
            else:
                self.attention += count
        return out


class FlopRate:
    """Of a step over batches of B examples, L tokens wide: a sum B L + b sum B L^2, a and b from one step that was counted.

    For encoders: products with weights grow with the tokens, those of attention also with the width.
    """

    def __init__(self, counter: FlopCounter, shapes: Iterable[tuple[int, int]]):
        shapes = list(shapes)
        self._a = counter.products / sum(b * width for b, width in shapes)
        self._b = counter.attention / sum(b * width * width for b, width in shapes)

    def of(self, shapes: Iterable[tuple[int, int]]) -> float:
        return sum(self._a * b * width + self._b * b * width * width for b, width in shapes)
