"""What the Triton kernels of logits are made of: numbers of rows read, reduced to statistics, and written.

s [R, C] student logits, z_k teachers' logits, m = sum_k w_k z_k, T temperature, X and A cotangents or tangents like s and m.

A kernel serves two plans. Where a row fits on chip, a program has whole rows and reads every number once. Beyond, a row is
cut into tiles, and programs take tickets: statistics of a tile, or, some rows later, the gradient of a tile, for which
it waits until the tickets of the row's statistics, all lower than its own, are done. So the second reading finds the row
in the second-level cache, and a few long rows still occupy a whole device. Everything is taken relative to a row's maxima;
a class whose teacher probability is zero adds exactly nothing (two models may mask one class by -inf).
"""

import triton
import triton.language as tl

STATISTICS = tl.constexpr(13)  # of a row or a tile, in the order in which `statistics_of` returns them


@triton.jit
def offsets(row, inner, strides, k: tl.constexpr, columns, ALIGN: tl.constexpr):
    """Of rows [r, 1] and columns [1, c] in tensor k, whose strides are (outer, inner, class), the first two over ALIGN."""
    start = (row // inner) * (strides[3 * k] * ALIGN) + (row % inner) * (strides[3 * k + 1] * ALIGN)
    return start + columns.to(tl.int64) * strides[3 * k + 2]


@triton.jit
def load_mean(
    tensors, weights, constants, row, inner, strides, columns, live, GIVEN: tl.constexpr, DTYPE: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """sum_k w_k tensors[1 + k] of those that GIVEN names; [r, c], zero outside."""
    total = tl.zeros(live.shape, DTYPE)
    for k in tl.static_range(1, len(tensors)):
        if (GIVEN >> k) & 1:
            z = tl.load(tensors[k] + offsets(row, inner, strides, k, columns, ALIGN), mask=live, other=0.0).to(DTYPE)
            if GIVEN == -1:  # of a logit, no mask, and not to become one by its weight
                z = tl.where(z == float("inf"), float("nan"), z)
            total += weight_of(weights, constants, k - 1, DTYPE) * z
    return total


@triton.jit
def weight_of(weights, constants, k: tl.constexpr, DTYPE: tl.constexpr):
    return tl.full([], constants[k], DTYPE) if weights is None else tl.load(weights + k).to(DTYPE)


@triton.jit
def load_logits(
    tensors, weights, constants, row, inner, strides, columns, R, C, STUDENT: tl.constexpr, DTYPE: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """s and m [r, c], -inf beyond the last class; rows beyond the last are zeros."""
    live, inside = (row < R) & (columns < C), columns < C
    m = load_mean(tensors, weights, constants, row, inner, strides, columns, live, -1, DTYPE, ALIGN)
    m = tl.where(inside, m, float("-inf"))
    s = m
    if STUDENT:
        s = tl.load(tensors[0] + offsets(row, inner, strides, 0, columns, ALIGN), mask=live, other=0.0).to(DTYPE)
        s = tl.where(inside, s, float("-inf"))
    return s, m


@triton.jit
def load_cotangents(
    cotangents, weights, constants, row, inner, strides, columns, R, C, GIVEN: tl.constexpr, DTYPE: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """X and A [r, c]; zeros where none is given."""
    live = (row < R) & (columns < C)
    x = tl.zeros(live.shape, DTYPE)
    if GIVEN & 1:
        x = tl.load(cotangents[0] + offsets(row, inner, strides, 0, columns, ALIGN), mask=live, other=0.0).to(DTYPE)
    return x, load_mean(cotangents, weights, constants, row, inner, strides, columns, live, GIVEN, DTYPE, ALIGN)


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
def exponentials(s, m, inv_t, STUDENT: tl.constexpr, HARD: tl.constexpr):
    """exp of s/T, m/T and s, given relative to the maxima; and log(em / es), zero where em is (NaNs stay in em)."""
    em = tl.exp(m * inv_t)
    es, e1, d = em, em, tl.zeros_like(em)
    if STUDENT:
        es = tl.exp(s * inv_t)
        d = tl.where(em > 0, (m - s) * inv_t, 0.0)
        e1 = tl.exp(s) if HARD else es
    return es, em, e1, d


@triton.jit
def statistics_of(
    s, m, x, a, label, columns, inv_t, STUDENT: tl.constexpr, HARD: tl.constexpr, GIVEN: tl.constexpr
):  # fmt: skip
    """Of tiles [r, c]: maxima and sums [r, 1] relative to them."""
    top_s, rs = _shifted(s)
    top_m, rm = _shifted(m)
    es, em, e1, d = exponentials(rs, rm, inv_t, STUDENT, HARD)
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
def combined(parts, row, tiles, inv_t, WIDTH: tl.constexpr):
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
def row_scales(upstream, step, hard_scale, labels, row, R, C, ignore_index, HARD: tl.constexpr, DTYPE: tl.constexpr):
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
def take_ticket(tickets, lag, tiles):
    """Which row, which tile of it, and whether it is the row's second reading."""
    ticket = tl.atomic_add(tickets, 1)
    turn, place = ticket // (2 * tiles), ticket % (2 * tiles)
    again = place >= tiles
    return tl.where(again, turn - lag, turn).to(tl.int64), tl.where(again, place - tiles, place), again


@triton.jit
def publish(parts, done, row, tile, tiles, values):
    here = parts + row * (STATISTICS * tiles) + tile
    for i in tl.static_range(STATISTICS):
        tl.store(here + i * tiles, values[i])
    tl.debug_barrier()  # every thread's numbers before the count
    tl.atomic_add(done, 1, sem="release")


@triton.jit
def store_row(pointer, row, columns, R, C, value):
    value = value.to(pointer.dtype.element_ty) if pointer.dtype.element_ty.is_fp64() else value.to(tl.float32)
    tl.store(pointer + row * C + columns, value.to(pointer.dtype.element_ty), mask=(row < R) & (columns < C))
