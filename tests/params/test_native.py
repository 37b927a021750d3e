"""Native operations against plain torch and torch.optim, bit for bit where that is promised; the dispatcher's rules."""

import pytest
import torch
from torch.library import opcheck

from engine.params import native, native_reference

SIZES = [0, 1, 7, 300_007]  # nothing, one, less than a vector, many blocks and a rest
SHAPES = [(5, 0, 3), (1, 1, 1), (11, 7, 4), (3001, 37, 1000), (6, 40_009, 3)]  # V, H, n
DTYPES = [torch.float32, torch.float64]
OPERATIONS = ["pilot_update", "rewind", "adamw", "row_axpy", "row_rewind"]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
both = pytest.mark.parametrize("operations", [native, native_reference], ids=["native", "reference"])
shadowed = pytest.mark.parametrize("shadowed", [True, False], ids=["shadow", "plain"])


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])])
def device(request, compiled):
    if request.param not in native.backend().devices:
        pytest.skip(f"compiled without CUDA: {native.backend().why}")
    return torch.device(request.param)


def random(*shape, dtype, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=dtype, generator=generator).to(device)


def any_bits(*shape, dtype, device="cpu", seed=0):
    """Every kind of number: signed zeros, subnormals, infinities, NaNs with all sorts of bits."""
    generator = torch.Generator().manual_seed(seed)
    width = {torch.float32: torch.int32, torch.float64: torch.int64}[dtype]
    limits = torch.iinfo(width)
    return torch.randint(limits.min, limits.max, shape, dtype=width, generator=generator).view(dtype).to(device)


def bits(x):
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def same(a, b):
    """The same numbers with the same bits, NaN where the other is NaN: which NaN arithmetic makes is left open."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(bits(a)[~a.isnan()], bits(b)[~b.isnan()])


def shadow_of(x, wanted=True):
    return torch.full_like(x, 3, dtype=torch.bfloat16) if wanted else None


def copies(arguments):
    return [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]


def tensors(arguments):
    return [bits(x) for x in arguments if isinstance(x, torch.Tensor)]


def scalar(value, dtype, device="cpu"):
    return torch.tensor(value, dtype=dtype, device=device)


def flat_arguments(op, n, dtype, device="cpu", with_shadow=True):
    w, g, m, v = (random(n, dtype=dtype, device=device, seed=seed) for seed in range(4))
    if op == "pilot_update":
        return [w, g, torch.empty_like(w), scalar(-0.05, dtype, device), shadow_of(w, with_shadow)]
    if op == "rewind":
        return [w, any_bits(n, dtype=dtype, device=device), shadow_of(w, with_shadow)]
    step, lr, clip, found = (scalar(x, torch.float32, device) for x in (3, 1e-3, 0.7, 0))
    return [w, g, m, v.square(), step, lr, 0.9, 0.999, 1e-8, 0.01, clip, found, shadow_of(w, with_shadow)]


def row_arguments(op, shape, dtype, device="cpu", with_shadow=True):
    length, width, n = shape
    rows = torch.randperm(length, generator=torch.Generator().manual_seed(9))[:n].to(device)
    table, values = random(length, width, dtype=dtype, device=device), random(n, width, dtype=dtype, seed=1).to(device)
    if op == "row_rewind":
        return [table, rows, any_bits(n, width, dtype=dtype, device=device), shadow_of(table, with_shadow)]
    alpha, snapshot = scalar(0.3, dtype, device), torch.empty_like(values) if with_shadow else None
    return [table, rows, values, alpha, snapshot, shadow_of(table, with_shadow)]


def some_arguments(op, dtype=torch.float32, size=1001, shape=(101, 13, 50), device="cpu"):
    return row_arguments(op, shape, dtype, device) if op.startswith("row") else flat_arguments(op, size, dtype, device)


# Numbers


@dtypes
@shadowed
@pytest.mark.parametrize("n", SIZES)
@both
def test_pilot_update_and_rewind(n, dtype, shadowed, operations, device):
    weights, gradient, snapshot, alpha, shadow = flat_arguments("pilot_update", n, dtype, device, shadowed)
    weights[::2] = any_bits(n, dtype=dtype, device=device)[::2]
    gradient[5::1000], gradient[7::1000] = torch.inf, torch.nan
    before, expected = weights.clone(), weights + gradient * alpha
    operations.pilot_update(weights, gradient, snapshot, alpha, shadow)
    assert torch.equal(bits(snapshot), bits(before))
    assert same(weights, expected)
    assert shadow is None or same(shadow, weights.to(torch.bfloat16))
    operations.rewind(weights, snapshot, shadow)
    assert torch.equal(bits(weights), bits(before))
    assert shadow is None or same(shadow, before.to(torch.bfloat16))


def test_shadow_rounds_as_torch_does(device):
    """Every upper half of a float32 with the lower halves around the ties."""
    halves = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    numbers = (torch.arange(-(2**15), 2**15, dtype=torch.int32)[:, None] * 2**16 + halves).flatten().view(torch.float32)
    for snapshot in (
        numbers.to(device),
        numbers.to(device).double(),
        any_bits(300_007, dtype=torch.float64, device=device),
    ):
        weights, shadow = torch.zeros_like(snapshot), shadow_of(snapshot)
        native.rewind(weights, snapshot, shadow)
        assert same(shadow, snapshot.to(torch.bfloat16))


# torch.optim.AdamW takes the same formula in another order, with fused products: a few roundings in each of 4 steps.
AGAINST_TORCH = {torch.float32: 2e-6, torch.float64: 1e-12}


def close(a, b, tolerance):
    """Where numbers are finite; the others stand in the same places."""
    finite = b.isfinite()
    near = not finite.any() or (a - b)[finite].abs().max() <= tolerance * b[finite].abs().max()
    return near and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.isinf(), b.isinf())


@dtypes
@shadowed
@pytest.mark.parametrize("n", SIZES)
@both
def test_adamw_is_torch_optim(n, dtype, shadowed, operations, device):
    settings = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    weights = random(n, dtype=dtype, device=device)
    theirs, shadow = weights.clone().requires_grad_(), shadow_of(weights, shadowed)
    optimizer = torch.optim.AdamW([theirs], **settings)
    exp_avg, exp_avg_sq = torch.zeros_like(weights), torch.zeros_like(weights)
    step, lr, clip, found = (scalar(x, torch.float64, device) for x in (0, settings["lr"], 0.37, 0))
    for seed in range(4):
        gradient = random(n, dtype=dtype, seed=seed).to(device)
        gradient[5:6], gradient[700:701] = torch.nan, torch.inf  # which reach the shadow
        theirs.grad = gradient * clip.to(dtype)
        optimizer.step()
        step += 1
        operations.adamw(
            weights, gradient, exp_avg, exp_avg_sq, step, lr, *settings["betas"], settings["eps"],
            settings["weight_decay"], clip, found if seed % 2 else None, shadow,
        )  # fmt: skip
        state = optimizer.state[theirs]
        for got, wanted in [(weights, theirs.detach()), (exp_avg, state["exp_avg"]), (exp_avg_sq, state["exp_avg_sq"])]:
            assert close(got, wanted, AGAINST_TORCH[dtype])
        assert shadow is None or same(shadow, weights.to(torch.bfloat16))


@dtypes
@pytest.mark.parametrize("found", [1.0, -2.0, torch.inf, torch.nan])
@both
def test_adamw_writes_nothing_where_inf_was_found(found, dtype, operations, device):
    arguments = flat_arguments("adamw", 5003, dtype, device)
    arguments[1][::7], arguments[-2] = torch.nan, scalar(found, dtype, device)
    before = copies(arguments)
    operations.adamw(*arguments)
    assert all(map(torch.equal, tensors(arguments), tensors(before)))


@dtypes
@shadowed
@pytest.mark.parametrize("shape", SHAPES)
@both
def test_rows(shape, dtype, shadowed, operations, device):
    table, rows, values, alpha, snapshot, shadow = row_arguments("row_axpy", shape, dtype, device, shadowed)
    table[:, ::2] = any_bits(*table.shape, dtype=dtype, device=device)[:, ::2]
    if values.numel() > 1:
        values[0, 0] = torch.nan
    before, shadow_before, expected = table.clone(), shadow_of(table), table[rows] + values * alpha
    operations.row_axpy(table, rows, values, alpha, snapshot, shadow)
    assert same(table[rows], expected)
    untouched = torch.ones(len(table), dtype=torch.bool, device=device).index_fill_(0, rows, False)
    assert torch.equal(bits(table[untouched]), bits(before[untouched]))
    if shadowed:
        assert torch.equal(bits(snapshot), bits(before[rows]))
        assert same(shadow[rows], table[rows].to(torch.bfloat16))
        assert torch.equal(shadow[untouched], shadow_before[untouched])
    operations.row_rewind(table, rows, before[rows], shadow)
    assert torch.equal(bits(table), bits(before))
    assert not shadowed or same(shadow[rows], before[rows].to(torch.bfloat16))


@dtypes
@pytest.mark.parametrize("op", OPERATIONS)
def test_same_bits_with_any_number_of_threads(op, dtype, compiled):
    many = some_arguments(op, dtype, 300_007, (9001, 64, 7003))
    runs, threads = [], torch.get_num_threads()
    try:
        for number in (1, 2, 3, 1):
            torch.set_num_threads(number)
            runs.append(copies(many))
            getattr(native, op)(*runs[-1])
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(map(torch.equal, tensors(other), tensors(runs[0])))


# The dispatcher


@dtypes
@pytest.mark.parametrize("op", OPERATIONS)
def test_opcheck(op, dtype, compiled, device):
    """Schema, fake tensors, static and symbolic sizes; with and without what is optional."""
    arguments = tuple(some_arguments(op, dtype, device=device))
    operation = getattr(compiled, op).default
    required = sum(not argument.has_default_value() for argument in operation._schema.arguments)
    for given in (arguments, arguments[:required]):
        assert set(opcheck(operation, given).values()) == {"SUCCESS"}


@both
@pytest.mark.parametrize("op", OPERATIONS)
def test_compiles_without_a_graph_break(op, operations, device):
    expected = some_arguments(op, device=device)
    arguments = copies(expected)
    function = getattr(operations, op)
    function(*expected)
    torch._dynamo.reset()  # one function for all of them would soon be compiled too often
    torch.compile(lambda *given: function(*given), fullgraph=True, backend="aot_eager")(*arguments)
    assert all(map(torch.equal, tensors(arguments), tensors(expected)))


@both
def test_graph_recorded_before_stays_valid(operations, compiled):
    weights = random(100, dtype=torch.float32).requires_grad_()
    loss = weights.square().sum()
    snapshot, shadow = torch.empty(100), torch.empty(100, dtype=torch.bfloat16)
    with torch.no_grad():
        operations.pilot_update(weights, torch.ones(100), snapshot, torch.tensor(1.0), shadow)
        operations.rewind(weights, snapshot, shadow)
    loss.backward()
    assert torch.equal(weights.grad, 2 * weights.detach())


ones, three = torch.ones(7), torch.ones(8, 3)
FLAT = "it must be float32 or float64, contiguous, with"
BAD = [  # operation, which of its arguments, what it is instead, what is said of it
    ("pilot_update", 0, ones.half(), rf"weights is float16 \[7\] on cpu; {FLAT} 1 dimension\."),
    ("pilot_update", 0, ones[:, None], rf"weights is float32 \[7, 1\] on cpu; {FLAT} 1 dimension\."),
    ("pilot_update", 0, ones.clone().requires_grad_(), r"weights requires grad, .* no derivative; call it under torch.no_grad\(\)"),
    ("pilot_update", 1, ones.double(), r"gradient is float64 \[7\] on cpu; it must be float32 \[7\], contiguous, on cpu, to fit weights"),
    ("pilot_update", 2, ones[:3], r"snapshot is float32 \[3\] on cpu; it must be float32 \[7\]"),
    ("pilot_update", 3, ones[:1], r"alpha is float32 \[1\] on cpu; it must be float32 \[\] on cpu"),
    ("pilot_update", 3, ones.double().sum(), r"alpha is float64 \[\] on cpu; it must be float32 \[\] on cpu"),
    ("pilot_update", 4, ones, r"shadow is float32 \[7\] on cpu; it must be bfloat16 \[7\]"),
    ("rewind", 1, torch.ones(14)[::2], r"snapshot is float32 \[7\] \(not contiguous\) on cpu"),
    ("adamw", 3, ones[:2], r"exp_avg_sq is float32 \[2\] on cpu"),
    ("adamw", 4, torch.tensor(1), r"step is int64 \[\] on cpu; it must be float32 or float64 \[\] on cpu"),
    ("adamw", 10, ones, r"clip is float32 \[7\] on cpu; it must be"),
    ("adamw", 11, torch.tensor(True), r"found_inf is bool \[\] on cpu; it must be"),
    ("row_axpy", 0, ones, rf"table is float32 \[7\] on cpu; {FLAT} 2 dimensions\."),
    ("row_axpy", 1, torch.tensor([1, 3]).int(), r"rows is int32 \[2\] on cpu; it must be int64, contiguous, with 1 dimension, on cpu"),
    ("row_axpy", 2, three[:3], r"values is float32 \[3, 3\] on cpu; it must be float32 \[2, 3\], contiguous, on cpu, to fit table"),
    ("row_axpy", 5, three[:2].bfloat16(), r"shadow is bfloat16 \[2, 3\] on cpu; it must be bfloat16 \[8, 3\]"),
    ("row_rewind", 2, three, r"snapshot is float32 \[8, 3\] on cpu; it must be float32 \[2, 3\]"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "place", "bad", "message"), BAD, ids=[f"{op}-{message}" for op, *_, message in BAD])
@both
def test_bad_arguments(op, place, bad, message, operations, compiled):
    arguments = some_arguments(op, size=7, shape=(8, 3, 2))
    arguments[place] = bad
    with pytest.raises(ValueError, match=f"metadistil::{op}: {message}"):
        getattr(operations, op)(*arguments)


@pytest.mark.parametrize("bad", [-1, 8])
@both
def test_rows_outside_the_table(bad, operations, compiled):
    table, outside = random(8, 3, dtype=torch.float32), torch.tensor([2, bad])
    before = table.clone()
    for call in (
        lambda: operations.row_axpy(table, outside, three[:2], ones.sum()),
        lambda: operations.row_rewind(table, outside, three[:2]),
    ):
        with pytest.raises(IndexError, match=rf"rows\[1\] is {bad}; the table has rows 0 to 7\."):
            call()
        assert torch.equal(table, before)


def test_shared_memory_is_refused(compiled):
    memory = torch.zeros(20)
    for call in (
        lambda: native.rewind(memory[:10], memory[5:15]),
        lambda: native.pilot_update(memory[:10], torch.ones(10), memory[:10], torch.tensor(1.0)),
        lambda: native.pilot_update(memory[:10], memory[10:], torch.zeros(10), memory[3]),
    ):
        with pytest.raises(ValueError, match="share memory"):
            call()
    native.rewind(memory[:10], memory[10:])  # side by side is fine
