"""`kd_loss` and its gradients as a Triton kernel. Row by row, with p = softmax(m / T), q = softmax(s / T), q1 = softmax(s),
h = log p - log q, KL = <p, h>, a the scale of soft rows, b of rows that have a label y, g what arrives from above:

    loss                   a alpha T^2 KL + b (1 - alpha) CE(s, y)
    student's gradient     g G_s      G_s = a alpha T (q - p) + b (1 - alpha) (q1 - onehot(y))
    teacher k's gradient   g w_k G_m  G_m = a alpha T p (h - KL)

m = sum_k w_k z_k is the teachers' mean, s the student's logits. The derivative of these gradients is in
common/triton_second.py. Source: Hinton, Vinyals and Dean (2015), differentiated by hand.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.ops.common.layout import Rows
from engine.kernels.ops.common.triton_launch import Launch, bits, output_like
from engine.kernels.ops.common.triton_rows import (
    combined,
    exponentials,
    load_logits,
    publish,
    row_scales,
    statistics_of,
    store_row,
    take_ticket,
    weight_of,
)
from engine.kernels.ops.common.triton_second import launch_second
from engine.kernels.ops.common.tuning import Plan


@triton.jit
def _finish(
    s, m, statistics, g, b, label, columns, row, loss, outputs, weights, constants, R, C, inv_t, a, alpha, first_tile,
    WANTED: tl.constexpr, HARD: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    top_s, top_m, sum_s, sum_m, sum_1, sum_d, at_y, _, _, _, _, _, _ = statistics
    soft, hard = a * alpha / inv_t, b * (1 - alpha)  # [r, 1]; a alpha T
    c = tl.log(sum_s) - tl.log(sum_m)
    kl = sum_d / sum_m + c
    if loss is not None:
        value = soft / inv_t * kl
        if HARD:
            value += tl.where(b == 0, 0.0, hard * (tl.log(sum_1) + (top_s - at_y)))
        tl.store(loss + row, value, mask=(row < R) & first_tile)
    if WANTED != 0:
        es, em, e1, d = exponentials(s - top_s, m - top_m, inv_t, True, HARD)
        p = em / sum_m
        if WANTED & 1:
            out = g * soft * (es / sum_s - p)
            if HARD:
                out += tl.where(b == 0, 0.0, g * hard * (e1 / sum_1 - tl.where(columns == label, 1.0, 0.0)))
            store_row(outputs[0], row, columns, R, C, out)
        out = g * soft * p * (d + c - kl)
        for k in tl.static_range(1, len(outputs)):
            if (WANTED >> k) & 1:
                store_row(outputs[k], row, columns, R, C, weight_of(weights, constants, k - 1, DTYPE) * out)


@triton.jit
def kd_first_kernel(
    tensors,  # 1 + K x [R, C] logits: student, teachers
    labels,  # [R] int64, or None
    weights,  # [K], or None: constants
    constants,  # K floats
    hard_scale,  # [] b, or None: 1
    upstream,  # [R], or [] with step 0, or None: 1
    loss,  # [R], or None
    outputs,  # 1 + K x [R, C] contiguous; those that WANTED names are written
    parts, tickets, lag, tiles,  # [R, STATISTICS, tiles], [1 + R] int32 zeros: the second plan's
    strides, step, R, inner, C,  # C, and strides but those of classes, divided by ALIGN
    ignore_index, inv_t: tl.float64, a: tl.float64, alpha: tl.float64,
    WANTED: tl.constexpr, HARD: tl.constexpr, DTYPE: tl.constexpr, ALIGN: tl.constexpr, TILED: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C = C * ALIGN
    inv_t, a, alpha = tl.full([], inv_t, DTYPE), tl.full([], a, DTYPE), tl.full([], alpha, DTYPE)
    if TILED:
        turn, tile, again = take_ticket(tickets, lag, tiles)
        if (turn >= 0) & (turn < R):
            row, columns = turn, tl.arange(0, BLOCK_C) + tile * BLOCK_C
            g, b, label = row_scales(upstream, step, hard_scale, labels, row, R, C, ignore_index, HARD, DTYPE)
            done = tickets + 1 + turn
            if again:
                while tl.atomic_add(done, 0, sem="acquire") < tiles:
                    pass
            s, m = load_logits(tensors, weights, constants, row, inner, strides, columns, R, C, True, DTYPE, ALIGN)
            if again:
                statistics = combined(parts, row, tiles, inv_t, WIDTH)
                _finish(
                    s, m, statistics, g, b, label, columns, row, loss, outputs, weights, constants, R, C, inv_t, a, alpha,
                    tile == 0, WANTED, HARD, DTYPE,
                )  # fmt: skip
            else:
                statistics = statistics_of(s, m, s, m, label, columns, inv_t, True, HARD, 0)
                publish(parts, done, row, tile, tiles, statistics)
    else:
        row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        columns = tl.arange(0, BLOCK_C)[None, :]
        g, b, label = row_scales(upstream, step, hard_scale, labels, row, R, C, ignore_index, HARD, DTYPE)
        s, m = load_logits(tensors, weights, constants, row, inner, strides, columns, R, C, True, DTYPE, ALIGN)
        statistics = statistics_of(s, m, s, m, label, columns, inv_t, True, HARD, 0)
        _finish(
            s, m, statistics, g, b, label, columns, row, loss, outputs, weights, constants, R, C, inv_t, a, alpha, True,
            WANTED, HARD, DTYPE,
        )  # fmt: skip


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
    layout = Rows([student, *teachers])
    loss = student.new_empty(layout.shape[:-1], dtype=layout.dtype) if rows else None
    outputs = [output_like(t) if w else t for t, w in zip(layout.tensors, wanted, strict=True)]
    call = Launch(layout, labels, weights, constants, hard_scale, upstream, ignore_index)

    def launch(plan: Plan, student_gradient: Tensor = outputs[0]) -> None:
        grid, cut, scratch = call.cut(plan)
        kd_first_kernel[grid](
            layout.tensors, *call.tensors, loss, (student_gradient, *outputs[1:]), *scratch, call.strides, *call.numbers,
            1 / temperature, soft_scale, alpha, WANTED=bits([wanted[0] or in_place, *wanted[1:]]),
            HARD=labels is not None, **cut,
        )  # fmt: skip

    trial = (lambda plan: launch(plan, torch.empty_like(student))) if in_place else launch
    call.run("first", launch, trial)
    return ([loss] if rows else []) + [o for o, w in zip(outputs, wanted, strict=True) if w]


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
    layout = Rows([*inputs, *(next(found) if g else t for t, g in zip(inputs, given, strict=True))])
    to_upstream = student.new_empty(layout.shape[:-1], dtype=layout.dtype)
    outputs = [output_like(t) if w else t for t, w in zip(inputs, wanted, strict=True)]
    call = Launch(layout, labels, weights, constants, hard_scale, upstream, ignore_index)
    launch_second(call, to_upstream, outputs, 1 / temperature, soft_scale, alpha, bits(wanted), bits(given), True)
    return [to_upstream, *(o for o, w in zip(outputs, wanted, strict=True) if w)]
