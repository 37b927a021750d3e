"""The row functions of `kd_kernels.py` as the ops call them: allocate, decide how to cut the work, launch."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.ops.common.layout import Rows
from engine.kernels.ops.common.triton_rows import STATISTICS, kd_first_kernel, kd_second_kernel, scale_kernel
from engine.kernels.ops.common.tuning import Plan, choose, plans, resident
from engine.kernels.ops.kd_loss.naive import check_labels

ON_CHIP = 8192  # classes up to which a program keeps whole rows: two tensors of float32 in 32 KiB each
TILES = 256  # at most, of a row: their statistics are combined in one vector


def kd_first(
    student: Tensor,  # [..., C]
    teachers: Sequence[Tensor],  # K x [..., C]
    labels: Tensor | None,  # [...] int64
    weights: Tensor | None,  # [K]
    constants: Sequence[float],  # K, used where there are no weights
    temperature: float,
    alpha: float,
    ignore_index: int,
    soft_scale: float,
    hard_scale: Tensor | None,  # []
    upstream: Tensor | None,  # [] or [...]
    rows: bool,
    wanted: Sequence[bool],  # 1 + K
    in_place: bool = False,
) -> list[Tensor]:
    """Row losses [...], where `rows` are wanted, then the gradients wanted, of the shapes and dtypes of their inputs.

    `in_place` writes the student's gradient over its logits instead.
    """
    lie = Rows([student, *teachers])
    loss = student.new_empty(lie.shape[:-1], dtype=lie.dtype) if rows else None
    outputs = [_output(t) if w else t for t, w in zip(lie.tensors, wanted, strict=True)]
    common = _Common(lie, labels, weights, constants, hard_scale, upstream, ignore_index)

    def launch(plan: Plan, student_gradient: Tensor = outputs[0]) -> None:
        grid, cut, scratch = common.cut(plan)
        kd_first_kernel[grid](
            lie.tensors, *common.tensors, loss, (student_gradient, *outputs[1:]), *scratch, common.strides, *common.numbers,
            1 / temperature, soft_scale, alpha, WANTED=_bits([wanted[0] or in_place, *wanted[1:]]),
            HARD=labels is not None, **cut,
        )  # fmt: skip

    trial = (lambda plan: launch(plan, torch.empty_like(student))) if in_place else launch
    common.run("first", launch, trial)
    return ([loss] if rows else []) + [o for o, w in zip(outputs, wanted, strict=True) if w]


def kd_rows_(student: Tensor, *arguments) -> Tensor:
    """Row losses, with the student's gradient written over its logits: `kd_first`, its arguments up to `hard_scale`."""
    wanted = [False] * (1 + len(arguments[0]))
    return kd_first(student, *arguments, None, True, wanted, in_place=True)[0]


def kd_second(
    upstream: Tensor,  # [] or [...]
    student: Tensor,  # [..., C]
    teachers: Sequence[Tensor],  # K x [..., C]
    labels: Tensor | None,  # [...] int64
    weights: Tensor | None,  # [K]
    constants: Sequence[float],  # K
    temperature: float,
    alpha: float,
    ignore_index: int,
    soft_scale: float,
    hard_scale: Tensor | None,  # []
    cotangents: Sequence[Tensor],  # those given, [..., C]
    given: Sequence[bool],  # 1 + K
    wanted: Sequence[bool],  # 1 + K
) -> list[Tensor]:
    """What reaches the upstream, row by row [...], then what reaches the inputs wanted."""
    inputs, found = [student, *teachers], iter(cotangents)
    lie = Rows([*inputs, *(next(found) if g else t for t, g in zip(inputs, given, strict=True))])
    to_upstream = student.new_empty(lie.shape[:-1], dtype=lie.dtype)
    outputs = [_output(t) if w else t for t, w in zip(inputs, wanted, strict=True)]
    common = _Common(lie, labels, weights, constants, hard_scale, upstream, ignore_index)
    _second(common, to_upstream, outputs, 1 / temperature, soft_scale, alpha, _bits(wanted), _bits(given), True)
    return [to_upstream, *(o for o, w in zip(outputs, wanted, strict=True) if w)]


def kd_cotangent(
    teachers: Sequence[Tensor],  # K x [..., C]
    tangent: Tensor,  # [..., C]
    weights: Tensor | None,  # [K]
    constants: Sequence[float],  # K
    temperature: float,
    factor: float,
) -> list[Tensor]:
    """K x w_k factor p (u - <p, u>), in float32 (float64 where an input is)."""
    # the tangent's place among the logits is the student's, whose logits are not read
    lie = Rows([tangent, *teachers, tangent, *teachers])
    outputs = [_output(t, lie.dtype) for t in teachers]
    common = _Common(lie, None, weights, constants, None, None, 0)
    wanted = 2 ** (len(teachers) + 1) - 2
    _second(common, None, [tangent, *outputs], 1 / temperature, -factor, 1.0, wanted, 1, False)
    return outputs


def _second(common, to_upstream, outputs, inv_t, a, alpha, wanted: int, given: int, student: bool) -> None:
    lie, n = common.lie, len(outputs)

    def launch(plan: Plan) -> None:
        grid, cut, scratch = common.cut(plan)
        kd_second_kernel[grid](
            lie.tensors[:n], lie.tensors[n:], *common.tensors, to_upstream, tuple(outputs), *scratch, common.strides[: 3 * n],
            common.strides[3 * n :], *common.numbers, inv_t, a, alpha, WANTED=wanted, GIVEN=given, STUDENT=student,
            HARD=common.labels is not None, **cut,
        )  # fmt: skip

    common.run("second", launch, launch)


class _Common:
    """What both kernels are given besides the logits, and how they are cut into programs."""

    def __init__(self, lie: Rows, labels, weights, constants, hard_scale, upstream, ignore_index: int):
        self.lie, self.device = lie, lie.tensors[0].device
        check_labels(labels, lie.classes, ignore_index)
        step = 0
        if upstream is not None and upstream.dim():
            upstream = upstream.reshape(-1)
            step = upstream.stride(0)  # 0 for what a sum sends
        self.labels = None if labels is None else labels.reshape(-1).contiguous()
        if weights is None and lie.dtype == torch.float64:  # a number in a tuple is passed as float32
            weights = torch.cat([torch.full((1,), w, dtype=lie.dtype, device=self.device) for w in constants])
        self.tensors = self.labels, weights, tuple(constants), hard_scale, upstream
        # Triton knows of a number that it is a multiple of 16, but not of 8, which 16 bytes of bfloat16 ask for
        by_row = [stride for i, stride in enumerate(lie.strides) if i % 3 < 2]
        self.align = gcd(16, lie.classes, *by_row)
        self.strides = tuple(s // self.align if i % 3 < 2 else s for i, s in enumerate(lie.strides))
        self.numbers = step, lie.rows, lie.inner, lie.classes // self.align, ignore_index

    def cut(self, plan: Plan) -> tuple[tuple[int], dict, tuple]:
        """The grid, the constants of the kernel, and its scratch memory."""
        lie, tiles = self.lie, triton.cdiv(self.lie.classes, plan.block_c)
        constants = {
            "DTYPE": _DTYPES[lie.dtype],
            "ALIGN": self.align,
            "TILED": plan.tiled,
            "WIDTH": triton.next_power_of_2(tiles),
        }
        constants |= {"BLOCK_R": plan.block_r, "BLOCK_C": plan.block_c, "num_warps": plan.warps}
        if not plan.tiled:
            return (triton.cdiv(lie.rows, plan.block_r),), constants, (None, None, 0, 1)
        # a gradient comes so many rows after the statistics that these have been done by the programs that run at once
        lag = min(lie.rows, triton.cdiv(resident(self.device, plan.warps), tiles) + 1)
        parts = torch.empty(lie.rows * STATISTICS.value * tiles, dtype=lie.dtype, device=self.device)
        tickets = torch.zeros(1 + lie.rows, dtype=torch.int32, device=self.device)
        return ((lie.rows + lag) * 2 * tiles,), constants, (parts, tickets, lag, tiles)

    def run(self, kernel: str, launch: Callable[[Plan], None], trial: Callable[[Plan], None]) -> None:
        lie = self.lie
        if lie.rows == 0:
            return
        key = (kernel, lie.classes, len(lie.tensors), *(str(t.dtype).removeprefix("torch.") for t in lie.tensors))
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            launch(choose(key, plans(lie.classes, ON_CHIP, TILES), trial, self.device))


def scale_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """x = factor x for each contiguous x; where the device finds a factor [] of 1, each program ends at once."""
    for x in tensors:
        if x.numel():
            with torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext():
                scale_kernel[(min(triton.cdiv(x.numel(), 2048), 8 * resident(x.device, 4)),)](
                    x, factor, x.numel(), BLOCK=2048
                )


def _output(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(like.shape, dtype=dtype or like.dtype, device=like.device)


def _bits(flags: Sequence[bool]) -> int:
    return sum(1 << i for i, flag in enumerate(flags) if flag)


_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}
