"""How the Triton kernels are launched: how logits lie in memory, how the work is cut into programs, on which device."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.ops.common.checks import check_labels
from engine.kernels.ops.common.layout import Rows
from engine.kernels.ops.common.triton_rows import STATISTICS
from engine.kernels.ops.common.tuning import Plan, choose, plans, resident

ON_CHIP = 8192  # classes up to which a program keeps whole rows: two tensors of float32 in 32 KiB each
TILES = 256  # at most, of a row: their statistics are combined in one vector
DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


class Launch:
    """What both kernels are given besides the logits, and how they are cut into programs."""

    def __init__(self, layout: Rows, labels, weights, constants, hard_scale, upstream, ignore_index: int):
        self.layout, self.device = layout, layout.tensors[0].device
        check_labels(labels, layout.classes, ignore_index)
        step = 0
        if upstream is not None and upstream.dim():
            upstream = upstream.reshape(-1)
            step = upstream.stride(0)  # 0 for what a sum sends
        self.labels = None if labels is None else labels.reshape(-1).contiguous()
        if weights is None and layout.dtype == torch.float64:  # a number in a tuple is passed as float32
            weights = torch.cat([torch.full((1,), w, dtype=layout.dtype, device=self.device) for w in constants])
        self.tensors = self.labels, weights, tuple(constants), hard_scale, upstream
        # Triton knows of a number that it is a multiple of 16, but not of 8, which 16 bytes of bfloat16 ask for
        by_row = [stride for i, stride in enumerate(layout.strides) if i % 3 < 2]
        self.align = gcd(16, layout.classes, *by_row)
        self.strides = tuple(s // self.align if i % 3 < 2 else s for i, s in enumerate(layout.strides))
        self.numbers = step, layout.rows, layout.inner, layout.classes // self.align, ignore_index

    def cut(self, plan: Plan) -> tuple[tuple[int], dict, tuple]:
        """The grid, the constants of the kernel, and its scratch memory."""
        layout, tiles = self.layout, triton.cdiv(self.layout.classes, plan.block_c)
        constants = {
            "DTYPE": DTYPES[layout.dtype],
            "ALIGN": self.align,
            "TILED": plan.tiled,
            "WIDTH": triton.next_power_of_2(tiles),
        }
        constants |= {"BLOCK_R": plan.block_r, "BLOCK_C": plan.block_c, "num_warps": plan.warps}
        if not plan.tiled:
            return (triton.cdiv(layout.rows, plan.block_r),), constants, (None, None, 0, 1)
        # a gradient comes so many rows after the statistics that these have been done by the programs that run at once
        lag = min(layout.rows, triton.cdiv(resident(self.device, plan.warps), tiles) + 1)
        parts = torch.empty(layout.rows * STATISTICS.value * tiles, dtype=layout.dtype, device=self.device)
        tickets = torch.zeros(1 + layout.rows, dtype=torch.int32, device=self.device)
        return ((layout.rows + lag) * 2 * tiles,), constants, (parts, tickets, lag, tiles)

    def run(self, kernel: str, launch: Callable[[Plan], None], trial: Callable[[Plan], None]) -> None:
        layout = self.layout
        if layout.rows == 0:
            return
        key = (
            kernel,
            layout.classes,
            len(layout.tensors),
            *(str(t.dtype).removeprefix("torch.") for t in layout.tensors),
        )
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            launch(choose(key, plans(layout.classes, ON_CHIP, TILES), trial, self.device))


def output_like(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(like.shape, dtype=dtype or like.dtype, device=like.device)


def bits(flags: Sequence[bool]) -> int:
    return sum(1 << i for i, flag in enumerate(flags) if flag)


def scale_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """x = factor x for each contiguous x; where the device finds a factor [] of 1, each program ends at once."""
    for x in tensors:
        if x.numel():
            with torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext():
                scale_kernel[(min(triton.cdiv(x.numel(), 2048), 8 * resident(x.device, 4)),)](
                    x, factor, x.numel(), BLOCK=2048
                )


@triton.jit
def scale_kernel(x, factor, n, BLOCK: tl.constexpr):
    """x [n] = factor x; a few programs pass over all of it, so that a factor of 1 costs no more than their start."""
    f = tl.load(factor)
    dtype: tl.constexpr = f.dtype if f.dtype.is_fp64() else tl.float32
    if f != 1:
        start = tl.program_id(0).to(tl.int64) * BLOCK
        while start < n:  # a range of tensors is more than the interpreter of Triton 3.6 takes
            here = start + tl.arange(0, BLOCK)
            value = tl.load(x + here, mask=here < n, other=0.0).to(dtype) * f.to(dtype)
            tl.store(x + here, value.to(x.dtype.element_ty), mask=here < n)
            start += tl.num_programs(0) * BLOCK
