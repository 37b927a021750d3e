"""The derivative of a derivative of `kd_loss` as a Triton kernel, which `meta_cotangent` is a part of.

Row by row, with p = softmax(m / T), q = softmax(s / T), q1 = softmax(s), h = log p - log q, KL = <p, h>, g what arrives at
the loss from above, a the scale of soft rows, b of rows that have a label y. Of cotangents X on the student's gradient and
A_k on the teachers', with A = sum_k w_k A_k, A' = A - <p, A>, V = <p, A' (h - KL)>:

    to g           a alpha T (<q, X> - <p, X> + V) + b (1 - alpha) (<q1, X> - X[y])
    to s           g a alpha (q (X - <q, X>) - p A') + g b (1 - alpha) q1 (X - <q1, X>)
    to teacher k   g a alpha w_k p (-(X - <p, X>) + A' (1 + h - KL) - V)

Source: Hinton, Vinyals and Dean (2015), differentiated by hand. The last line with A = 0 is the meta-gradient's cotangent,
which asks for no student.
"""

import triton
import triton.language as tl

from engine.kernels.ops.common.triton_rows import (
    combined,
    exponentials,
    load_cotangents,
    load_logits,
    publish,
    row_scales,
    statistics_of,
    store_row,
    take_ticket,
    weight_of,
)
from engine.kernels.ops.common.tuning import Plan


@triton.jit
def _finish(
    s, m, x, a_k, statistics, g, b, label, columns, row, to_upstream, outputs, weights, constants, R, C, inv_t, a, alpha,
    first_tile, WANTED: tl.constexpr, STUDENT: tl.constexpr, HARD: tl.constexpr, GIVEN: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    top_s, top_m, sum_s, sum_m, sum_1, sum_d, _, x_s, x_m, x_1, a_m, a_d, x_y = statistics
    soft, hard = a * alpha, b * (1 - alpha)  # [r, 1]
    mean_x, mean_a = x_m / sum_m, a_m / sum_m
    v = a_d / sum_m - mean_a * (sum_d / sum_m)  # the constant log(sum_s / sum_m) of h cancels
    if to_upstream is not None:
        value = soft / inv_t * (x_s / sum_s - mean_x + v)
        if HARD:
            value += tl.where(b == 0, 0.0, hard * (x_1 / sum_1 - x_y))
        tl.store(to_upstream + row, value, mask=(row < R) & first_tile)
    es, em, e1, d = exponentials(s - top_s, m - top_m, inv_t, STUDENT, HARD)
    p = em / sum_m
    if WANTED & 1:
        out = g * soft * (es / sum_s * (x - x_s / sum_s) - p * (a_k - mean_a))
        if HARD:
            out += tl.where(b == 0, 0.0, g * hard * (e1 / sum_1) * (x - x_1 / sum_1))
        store_row(outputs[0], row, columns, R, C, out)
    out = mean_x - x
    if GIVEN > 1:
        out += (a_k - mean_a) * (1 + d - sum_d / sum_m) - v
    out *= g * soft * p
    for k in tl.static_range(1, len(outputs)):
        if (WANTED >> k) & 1:
            store_row(outputs[k], row, columns, R, C, weight_of(weights, constants, k - 1, DTYPE) * out)


@triton.jit
def kd_second_kernel(
    tensors,  # 1 + K x [R, C] logits: student, teachers
    cotangents,  # 1 + K x [R, C]; those that GIVEN names are read
    labels, weights, constants, hard_scale, upstream,
    to_upstream,  # [R], or None
    outputs,  # 1 + K x [R, C] contiguous; those that WANTED names are written
    parts, tickets, lag, tiles,
    strides, cotangent_strides, step, R, inner, C,  # C, and strides but those of classes, divided by ALIGN
    ignore_index, inv_t: tl.float64, a: tl.float64, alpha: tl.float64,
    WANTED: tl.constexpr, GIVEN: tl.constexpr, STUDENT: tl.constexpr, HARD: tl.constexpr, DTYPE: tl.constexpr,
    ALIGN: tl.constexpr, TILED: tl.constexpr, WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
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
            s, m = load_logits(tensors, weights, constants, row, inner, strides, columns, R, C, STUDENT, DTYPE, ALIGN)
            x, a_k = load_cotangents(
                cotangents, weights, constants, row, inner, cotangent_strides, columns, R, C, GIVEN, DTYPE, ALIGN
            )
            if again:
                statistics = combined(parts, row, tiles, inv_t, WIDTH)
                _finish(
                    s, m, x, a_k, statistics, g, b, label, columns, row, to_upstream, outputs, weights, constants, R, C,
                    inv_t, a, alpha, tile == 0, WANTED, STUDENT, HARD, GIVEN, DTYPE,
                )  # fmt: skip
            else:
                statistics = statistics_of(s, m, x, a_k, label, columns, inv_t, STUDENT, HARD, GIVEN)
                publish(parts, done, row, tile, tiles, statistics)
    else:
        row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        columns = tl.arange(0, BLOCK_C)[None, :]
        g, b, label = row_scales(upstream, step, hard_scale, labels, row, R, C, ignore_index, HARD, DTYPE)
        s, m = load_logits(tensors, weights, constants, row, inner, strides, columns, R, C, STUDENT, DTYPE, ALIGN)
        x, a_k = load_cotangents(
            cotangents, weights, constants, row, inner, cotangent_strides, columns, R, C, GIVEN, DTYPE, ALIGN
        )
        statistics = statistics_of(s, m, x, a_k, label, columns, inv_t, STUDENT, HARD, GIVEN)
        _finish(
            s, m, x, a_k, statistics, g, b, label, columns, row, to_upstream, outputs, weights, constants, R, C, inv_t, a,
            alpha, True, WANTED, STUDENT, HARD, GIVEN, DTYPE,
        )  # fmt: skip


def launch_second(call, to_upstream, outputs, inv_t, a, alpha, wanted: int, given: int, student: bool) -> None:
    layout, n = call.layout, len(outputs)

    def launch(plan: Plan) -> None:
        grid, cut, scratch = call.cut(plan)
        kd_second_kernel[grid](
            layout.tensors[:n], layout.tensors[n:], *call.tensors, to_upstream, tuple(outputs), *scratch, call.strides[: 3 * n],
            call.strides[3 * n :], *call.numbers, inv_t, a, alpha, WANTED=wanted, GIVEN=given, STUDENT=student,
            HARD=call.labels is not None, **cut,
        )  # fmt: skip

    call.run("second", launch, launch)
