"""Distillation losses of logits, their gradients and their second derivatives as Triton kernels.

s [R, C] student logits, z_k teachers' logits, m = sum_k w_k z_k, T temperature, y labels, row by row

    p = softmax(m / T)    q = softmax(s / T)    q1 = softmax(s)    h = log p - log q    KL = <p, h>

    first    loss  = a alpha T^2 KL + b (1 - alpha) CE(s, y)       a the scale of soft rows, b of rows that have a label
             G_s   = a alpha T (q - p) + b (1 - alpha) (q1 - onehot(y))
             G_m   = a alpha T p (h - KL)
             student's gradient = g G_s, teacher k's = g w_k G_m    g what arrives from above

    second   of cotangents X on the student's gradient and A_k on the teachers', A = sum_k w_k A_k, with
             A' = A - <p, A>,  V = <p, A' (h - KL)>
             to g           a alpha T (<q, X> - <p, X> + V) + b (1 - alpha) (<q1, X> - X[y])
             to s           g a alpha (q (X - <q, X>) - p A') + g b (1 - alpha) q1 (X - <q1, X>)
             to teacher k   g a alpha w_k p (-(X - <p, X>) + A' (1 + h - KL) - V)

The second with A = 0 is also the meta-gradient's cotangent, then without the student. Source: Hinton, Vinyals and Dean
(2015), differentiated by hand.

Each kernel serves two plans. Where a row fits on chip, a program has whole rows and reads every number once. Beyond, a
row is cut into tiles, and programs take tickets: statistics of a tile, or, some rows later, the gradient of a tile, for
which it waits until the tickets of the row's statistics, all lower than its own, are done. So the second reading finds
the row in the second-level cache, and a few long rows still occupy a whole device. Everything is taken relative to a
row's maxima; a class whose teacher probability is zero adds exactly nothing (two models may mask one class by -inf).
"""

import triton
import triton.language as tl

STATISTICS = tl.constexpr(13)  # of a row or a tile, in the order in which `_statistics` returns them


@triton.jit
def _offsets(row, inner, strides, k: tl.constexpr, columns, ALIGN: tl.constexpr):
    """Of rows [r, 1] and columns [1, c] in tensor k, whose strides are (outer, inner, class), the first two over ALIGN."""
    start = (row // inner) * (strides[3 * k] * ALIGN) + (row % inner) * (strides[3 * k + 1] * ALIGN)
    return start + columns.to(tl.int64) * strides[3 * k + 2]


@triton.jit
def _mean(
    tensors, weights, constants, row, inner, strides, columns, live, GIVEN: tl.constexpr, DTYPE: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """sum_k w_k tensors[1 + k] of those that GIVEN names; [r, c], zero outside."""
    total = tl.zeros(live.shape, DTYPE)
    for k in tl.static_range(1, len(tensors)):
        if (GIVEN >> k) & 1:
            z = tl.load(tensors[k] + _offsets(row, inner, strides, k, columns, ALIGN), mask=live, other=0.0).to(DTYPE)
            if GIVEN == -1:  # of a logit, no mask, and not to become one by its weight
                z = tl.where(z == float("inf"), float("nan"), z)
            total += _weight(weights, constants, k - 1, DTYPE) * z
    return total


@triton.jit
def _weight(weights, constants, k: tl.constexpr, DTYPE: tl.constexpr):
    return tl.full([], constants[k], DTYPE) if weights is None else tl.load(weights + k).to(DTYPE)


@triton.jit
def _logits(
    tensors, weights, constants, row, inner, strides, columns, R, C, STUDENT: tl.constexpr, DTYPE: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """s and m [r, c], -inf beyond the last class; rows beyond the last are zeros."""
    live, inside = (row < R) & (columns < C), columns < C
    m = _mean(tensors, weights, constants, row, inner, strides, columns, live, -1, DTYPE, ALIGN)
    m = tl.where(inside, m, float("-inf"))
    s = m
    if STUDENT:
        s = tl.load(tensors[0] + _offsets(row, inner, strides, 0, columns, ALIGN), mask=live, other=0.0).to(DTYPE)
        s = tl.where(inside, s, float("-inf"))
    return s, m


@triton.jit
def _cotangents(
    cotangents, weights, constants, row, inner, strides, columns, R, C, GIVEN: tl.constexpr, DTYPE: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """X and A [r, c]; zeros where none is given."""
    live = (row < R) & (columns < C)
    x = tl.zeros(live.shape, DTYPE)
    if GIVEN & 1:
        x = tl.load(cotangents[0] + _offsets(row, inner, strides, 0, columns, ALIGN), mask=live, other=0.0).to(DTYPE)
    return x, _mean(cotangents, weights, constants, row, inner, strides, columns, live, GIVEN, DTYPE, ALIGN)


@triton.jit
def _sum(x):
    """[r, 1] of [r, c], a scalar of [c]: in registers of every thread, where [1] would bring a layout of its own."""
    return tl.sum(x, 0) if len(x.shape) == 1 else tl.sum(x, 1)[:, None]


@triton.jit
def _max(x):
    return tl.max(x, 0) if len(x.shape) == 1 else tl.max(x, 1)[:, None]


@triton.jit
def _shifted(z):
    """max z [r, 1], and z minus it; of a tile without a finite number minus zero."""
    top = _max(z)
    return top, z - tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _exponentials(s, m, inv_t, STUDENT: tl.constexpr, HARD: tl.constexpr):
    """exp of s/T, m/T and s, given relative to the maxima; and log(em / es), zero where em is (NaNs stay in em)."""
    em = tl.exp(m * inv_t)
    es, e1, d = em, em, tl.zeros_like(em)
    if STUDENT:
        es = tl.exp(s * inv_t)
        d = tl.where(em > 0, (m - s) * inv_t, 0.0)
        e1 = tl.exp(s) if HARD else es
    return es, em, e1, d


@triton.jit
def _statistics(
    s, m, x, a, label, columns, inv_t, STUDENT: tl.constexpr, HARD: tl.constexpr, GIVEN: tl.constexpr
):  # fmt: skip
    """Of tiles [r, c]: maxima and sums [r, 1] relative to them."""
    top_s, rs = _shifted(s)
    top_m, rm = _shifted(m)
    es, em, e1, d = _exponentials(rs, rm, inv_t, STUDENT, HARD)
    sum_m = _sum(em)
    nothing = sum_m - sum_m  # not of the maxima: a tile may have none
    at_label = columns == label
    sum_s, sum_1, sum_d, at_y = nothing, nothing, nothing, nothing
    x_s, x_1, a_d, x_m, a_m, x_y = nothing, nothing, nothing, nothing, nothing, nothing
    if STUDENT:
        sum_s, sum_d = _sum(es), _sum(em * d)
        if HARD:
            sum_1, at_y = _sum(e1), _sum(tl.where(at_label, s, 0.0))
    if GIVEN & 1:
        x_m = _sum(em * x)
        if STUDENT:
            x_s = _sum(es * x)
            if HARD:
                x_1, x_y = _sum(e1 * x), _sum(tl.where(at_label, x, 0.0))
    if GIVEN > 1:
        a_m, a_d = _sum(em * a), _sum(em * d * a)
    return top_s, top_m, sum_s, sum_m, sum_1, sum_d, at_y, x_s, x_m, x_1, a_m, a_d, x_y


@triton.jit
def _combined(parts, row, tiles, inv_t, WIDTH: tl.constexpr):
    """The statistics of a row from those of its tiles, [row, STATISTICS, tiles]."""
    t = tl.arange(0, WIDTH)
    here = parts + row * (STATISTICS * tiles) + t
    live = t < tiles
    # past the first-level cache, which may hold a line from before another program wrote it
    tops = tl.load(here, mask=live, other=float("-inf"), cache_modifier=".cg")
    topm = tl.load(here + tiles, mask=live, other=float("-inf"), cache_modifier=".cg")
    top_s, top_m = _max(tops), _max(topm)
    down_s, down_m = (
        tl.where(tops == float("-inf"), 0.0, tops) - top_s,
        tl.where(topm == float("-inf"), 0.0, topm) - top_m,
    )
    by_s = tl.where(tops == float("-inf"), 0.0, tl.exp(down_s * inv_t))
    by_1 = tl.where(tops == float("-inf"), 0.0, tl.exp(down_s))
    by_m = tl.where(topm == float("-inf"), 0.0, tl.exp(down_m * inv_t))
    shift = (down_m - down_s) * inv_t
    sum_s = _sum(by_s * tl.load(here + 2 * tiles, mask=live, other=0.0, cache_modifier=".cg"))
    part_m = tl.load(here + 3 * tiles, mask=live, other=0.0, cache_modifier=".cg")
    sum_1 = _sum(by_1 * tl.load(here + 4 * tiles, mask=live, other=0.0, cache_modifier=".cg"))
    part_d = tl.load(here + 5 * tiles, mask=live, other=0.0, cache_modifier=".cg")
    at_y = _sum(tl.load(here + 6 * tiles, mask=live, other=0.0, cache_modifier=".cg"))
    x_s = _sum(by_s * tl.load(here + 7 * tiles, mask=live, other=0.0, cache_modifier=".cg"))
    x_m = _sum(by_m * tl.load(here + 8 * tiles, mask=live, other=0.0, cache_modifier=".cg"))
    x_1 = _sum(by_1 * tl.load(here + 9 * tiles, mask=live, other=0.0, cache_modifier=".cg"))
    part_a = tl.load(here + 10 * tiles, mask=live, other=0.0, cache_modifier=".cg")
    a_d = tl.load(here + 11 * tiles, mask=live, other=0.0, cache_modifier=".cg")
    x_y = _sum(tl.load(here + 12 * tiles, mask=live, other=0.0, cache_modifier=".cg"))
    # a tile whose teacher probability underflows to zero adds nothing, however far apart the student is there
    sum_d = _sum(tl.where(by_m > 0, by_m * (part_d + part_m * shift), 0.0))
    a_d = _sum(tl.where(by_m > 0, by_m * (a_d + part_a * shift), 0.0))
    sum_m, a_m = _sum(by_m * part_m), _sum(by_m * part_a)
    return top_s, top_m, sum_s, sum_m, sum_1, sum_d, at_y, x_s, x_m, x_1, a_m, a_d, x_y


@triton.jit
def _scales(upstream, step, hard_scale, labels, row, R, C, ignore_index, HARD: tl.constexpr, DTYPE: tl.constexpr):
    """g [r, 1], b or zero where a row has no label, and the label; NaN for b where it is out of range."""
    live, nothing = row < R, (row * 0).to(DTYPE)  # of the row's shape, which may be none
    g = nothing + 1
    if upstream is not None:
        g = tl.load(upstream + row * step, mask=live, other=0.0).to(DTYPE)
    b, label = nothing, row * 0 - 1
    if HARD:
        label = tl.load(labels + row, mask=live, other=ignore_index)
        b = nothing + 1
        if hard_scale is not None:
            b = b * tl.load(hard_scale).to(DTYPE)
        b = tl.where((label >= 0) & (label < C), b, float("nan"))
        b = tl.where(label == ignore_index, 0.0, b)
    return g, b, label


@triton.jit
def _take(tickets, lag, tiles):
    """Which row, which tile of it, and whether it is the row's second reading."""
    ticket = tl.atomic_add(tickets, 1)
    turn, place = ticket // (2 * tiles), ticket % (2 * tiles)
    again = place >= tiles
    return tl.where(again, turn - lag, turn).to(tl.int64), tl.where(again, place - tiles, place), again


@triton.jit
def _publish(parts, done, row, tile, tiles, values):
    here = parts + row * (STATISTICS * tiles) + tile
    for i in tl.static_range(STATISTICS):
        tl.store(here + i * tiles, values[i])
    tl.debug_barrier()  # every thread's numbers before the count
    tl.atomic_add(done, 1, sem="release")


@triton.jit
def _store(pointer, row, columns, R, C, value):
    value = value.to(pointer.dtype.element_ty) if pointer.dtype.element_ty.is_fp64() else value.to(tl.float32)
    tl.store(pointer + row * C + columns, value.to(pointer.dtype.element_ty), mask=(row < R) & (columns < C))


@triton.jit
def _finish_first(
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
        es, em, e1, d = _exponentials(s - top_s, m - top_m, inv_t, True, HARD)
        p = em / sum_m
        if WANTED & 1:
            out = g * soft * (es / sum_s - p)
            if HARD:
                out += tl.where(b == 0, 0.0, g * hard * (e1 / sum_1 - tl.where(columns == label, 1.0, 0.0)))
            _store(outputs[0], row, columns, R, C, out)
        out = g * soft * p * (d + c - kl)
        for k in tl.static_range(1, len(outputs)):
            if (WANTED >> k) & 1:
                _store(outputs[k], row, columns, R, C, _weight(weights, constants, k - 1, DTYPE) * out)


@triton.jit
def _finish_second(
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
    es, em, e1, d = _exponentials(s - top_s, m - top_m, inv_t, STUDENT, HARD)
    p = em / sum_m
    if WANTED & 1:
        out = g * soft * (es / sum_s * (x - x_s / sum_s) - p * (a_k - mean_a))
        if HARD:
            out += tl.where(b == 0, 0.0, g * hard * (e1 / sum_1) * (x - x_1 / sum_1))
        _store(outputs[0], row, columns, R, C, out)
    out = mean_x - x
    if GIVEN > 1:
        out += (a_k - mean_a) * (1 + d - sum_d / sum_m) - v
    out *= g * soft * p
    for k in tl.static_range(1, len(outputs)):
        if (WANTED >> k) & 1:
            _store(outputs[k], row, columns, R, C, _weight(weights, constants, k - 1, DTYPE) * out)


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
        turn, tile, again = _take(tickets, lag, tiles)
        if (turn >= 0) & (turn < R):
            row, columns = turn, tl.arange(0, BLOCK_C) + tile * BLOCK_C
            g, b, label = _scales(upstream, step, hard_scale, labels, row, R, C, ignore_index, HARD, DTYPE)
            done = tickets + 1 + turn
            if again:
                while tl.atomic_add(done, 0, sem="acquire") < tiles:
                    pass
            s, m = _logits(tensors, weights, constants, row, inner, strides, columns, R, C, True, DTYPE, ALIGN)
            if again:
                statistics = _combined(parts, row, tiles, inv_t, WIDTH)
                _finish_first(
                    s, m, statistics, g, b, label, columns, row, loss, outputs, weights, constants, R, C, inv_t, a, alpha,
                    tile == 0, WANTED, HARD, DTYPE,
                )  # fmt: skip
            else:
                statistics = _statistics(s, m, s, m, label, columns, inv_t, True, HARD, 0)
                _publish(parts, done, row, tile, tiles, statistics)
    else:
        row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        columns = tl.arange(0, BLOCK_C)[None, :]
        g, b, label = _scales(upstream, step, hard_scale, labels, row, R, C, ignore_index, HARD, DTYPE)
        s, m = _logits(tensors, weights, constants, row, inner, strides, columns, R, C, True, DTYPE, ALIGN)
        statistics = _statistics(s, m, s, m, label, columns, inv_t, True, HARD, 0)
        _finish_first(
            s, m, statistics, g, b, label, columns, row, loss, outputs, weights, constants, R, C, inv_t, a, alpha, True,
            WANTED, HARD, DTYPE,
        )  # fmt: skip


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
        turn, tile, again = _take(tickets, lag, tiles)
        if (turn >= 0) & (turn < R):
            row, columns = turn, tl.arange(0, BLOCK_C) + tile * BLOCK_C
            g, b, label = _scales(upstream, step, hard_scale, labels, row, R, C, ignore_index, HARD, DTYPE)
            done = tickets + 1 + turn
            if again:
                while tl.atomic_add(done, 0, sem="acquire") < tiles:
                    pass
            s, m = _logits(tensors, weights, constants, row, inner, strides, columns, R, C, STUDENT, DTYPE, ALIGN)
            x, a_k = _cotangents(
                cotangents, weights, constants, row, inner, cotangent_strides, columns, R, C, GIVEN, DTYPE, ALIGN
            )
            if again:
                statistics = _combined(parts, row, tiles, inv_t, WIDTH)
                _finish_second(
                    s, m, x, a_k, statistics, g, b, label, columns, row, to_upstream, outputs, weights, constants, R, C,
                    inv_t, a, alpha, tile == 0, WANTED, STUDENT, HARD, GIVEN, DTYPE,
                )  # fmt: skip
            else:
                statistics = _statistics(s, m, x, a_k, label, columns, inv_t, STUDENT, HARD, GIVEN)
                _publish(parts, done, row, tile, tiles, statistics)
    else:
        row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        columns = tl.arange(0, BLOCK_C)[None, :]
        g, b, label = _scales(upstream, step, hard_scale, labels, row, R, C, ignore_index, HARD, DTYPE)
        s, m = _logits(tensors, weights, constants, row, inner, strides, columns, R, C, STUDENT, DTYPE, ALIGN)
        x, a_k = _cotangents(
            cotangents, weights, constants, row, inner, cotangent_strides, columns, R, C, GIVEN, DTYPE, ALIGN
        )
        statistics = _statistics(s, m, x, a_k, label, columns, inv_t, STUDENT, HARD, GIVEN)
        _finish_second(
            s, m, x, a_k, statistics, g, b, label, columns, row, to_upstream, outputs, weights, constants, R, C, inv_t, a,
            alpha, True, WANTED, STUDENT, HARD, GIVEN, DTYPE,
        )  # fmt: skip


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
