"""Floating-point operations: counted in one step, and what that makes of steps of other shapes.

A multiplication and an addition count as two, what is computed again, as fused attention does in its backward, counts again.
`products` are those with weights, `attention` those of every example by itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from engine.sections import section


def _shapes(count: Callable[..., int], tensors: int) -> Callable[..., int]:
    return lambda *args, **_: count(*(t.shape for t in args[:tensors]))


# torch counts the fused attention of GPUs alone
FORMULAS = flop_registry | {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _shapes(sdpa_flop_count, 3),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _shapes(sdpa_backward_flop_count, 4),
}
OPERANDS = {"aten::mm": (0, 1), "aten::addmm": (1, 2), "aten::bmm": (0, 1), "aten::baddbmm": (1, 2)}  # by place
KINDS = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
FUSED = {f"aten::_scaled_dot_product_{kind}" for kind in KINDS}
FUSED_BACKWARD = {f"{name}_backward" for name in FUSED}
PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.convolution, torch.ops.aten.convolution_backward}


class FlopCounter(TorchDispatchMode):
    """Counts the matrix products and fused attention of its body, also on fake tensors.

    It is torch's FlopCounterMode without its hooks on modules, which checkpointed layers do not take. Under a dispatch mode
    autograd takes other paths through some formulas, whose last bits differ: not for a step of a run (`FlopRecord`).
    """

    def __init__(self):
        super().__init__()
        self.products = self.attention = 0

    @property
    def total(self) -> int:
        return self.products + self.attention

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in FORMULAS:
            count = FORMULAS[packet](*args, **(kwargs or {}), out_val=out)
            if packet in PRODUCTS:
                self.products += count
            else:
                self.attention += count
        return out


class FlopRecord:
    """Counts the same from what torch's profiler records of its body, which it leaves alone to the last bit.

    `complete` is False where the profiler cannot be had, or an operation's shapes do not fit: a figure is not worth a run.
    """

    def __init__(self):
        self.products = self.attention = 0
        self.complete = False
        self._profile: profile | None = None

    @section("logging")  # a tenth of a second or two, once a phase
    def __enter__(self) -> FlopRecord:
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # it would tell of its start and its stop
        try:
            self._profile = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
            self._profile.__enter__()
        except Exception:  # noqa: BLE001 - somebody else is profiling, say
            self._profile = None
        return self

    @section("logging")
    def __exit__(self, *raised: Any) -> None:
        if self._profile is None:
            return
        try:
            self._profile.__exit__(*raised)
            for event in self._profile.profiler.kineto_results.events():
                self._add(event.name(), event.shapes())
            self.complete = True
        except Exception:  # noqa: BLE001 - whatever it is, the step was taken
            self.complete = False
        self._profile = None

    def _add(self, name: str, shapes: list[list[int]]) -> None:
        if name in OPERANDS:
            a, b = (shapes[i] for i in OPERANDS[name])
            count = 2 * a[-2] * a[-1] * b[-1] * (a[0] if len(a) == 3 else 1)
            if len(a) == 3:
                self.attention += count
            else:
                self.products += count
        elif name in FUSED:
            self.attention += sdpa_flop_count(*shapes[:3])
        elif name in FUSED_BACKWARD:
            self.attention += sdpa_backward_flop_count(*shapes[:4])


class FlopRate:
    """Of a step over batches of B examples, L tokens wide: a sum B L + b sum B L^2, a and b from one step that was counted.

    For encoders: products with weights grow with the tokens, those of attention also with the width.
    """

    def __init__(self, counter: FlopCounter | FlopRecord, shapes: Iterable[tuple[int, int]]):
        shapes = list(shapes)
        self._a = counter.products / sum(b * width for b, width in shapes)
        self._b = counter.attention / sum(b * width * width for b, width in shapes)

    def of(self, shapes: Iterable[tuple[int, int]]) -> float:
        return sum(self._a * b * width + self._b * b * width * width for b, width in shapes)
