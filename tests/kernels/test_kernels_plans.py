"""How the Triton kernels are cut into programs, which plan is taken, and where they find a number."""

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kernel_helpers import F32, F64, TOLERANCE, Case, Problem, near, plain

pytest.importorskip("triton")

from engine.kernels.ops.common import triton_launch, tuning
from engine.kernels.ops.common.layout import Rows
from engine.kernels.ops.common.tuning import Plan

# Of rows of 11 classes. Interpreted, a program takes some 10 ms, whatever it has to do.
PLANS = {
    "whole, several rows a program, the last one ragged": Plan(False, 2, 16, 4),
    "whole, wider than it has to be": Plan(False, 1, 32, 4),
    "one tile": Plan(True, 1, 16, 4),
    "two tiles, the last one ragged": Plan(True, 1, 8, 4),
    "three tiles": Plan(True, 1, 4, 4),
    "a tile for each class": Plan(True, 1, 1, 4),
}
slow = dict.fromkeys(["two tiles, the last one ragged", "a tile for each class"], pytest.mark.slow)
every_plan = pytest.mark.parametrize(
    "plan", [pytest.param(plan, id=name, marks=slow.get(name, ())) for name, plan in PLANS.items()], indirect=True
)
WHOLE, TILES = PLANS["whole, wider than it has to be"], PLANS["three tiles"]
FIRST, LAST = [0, 1, 2, 3], [8, 9, 10]  # the classes of these two tiles
both_kinds, tiles = (pytest.mark.parametrize("plan", p, indirect=True) for p in ([WHOLE, TILES], [TILES]))


@pytest.fixture
def plan(request, interpreted, monkeypatch):
    monkeypatch.setattr(triton_launch, "plans", lambda *_: [request.param])
    return request.param


@pytest.mark.parametrize("factor", [1.0, 0.5, torch.nan])
@pytest.mark.parametrize("dtype", [F32, F64, torch.bfloat16, torch.float16], ids=str)
def test_a_gradient_is_scaled_in_place(dtype, factor, interpreted):
    """By more blocks than programs, the last one ragged; a half is exact in every dtype."""
    tensors = [torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (50_001, 3, 0)]
    expected = [t * factor for t in tensors]
    triton_launch.scale_(tensors, torch.tensor(factor, dtype=F64 if dtype == F64 else F32))
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(tensors, expected, strict=True))


@every_plan
def test_every_plan(plan):
    rows, (reduction, weights) = (3, ("mean", None)) if plan.block_r > 1 else (2, ("none", "tensor"))
    Problem(Case(C=11, leading=(rows,), reduction=reduction, weights=weights, dtypes=(F64, F32))).agree()


@tiles
@pytest.mark.parametrize("student, teacher", [(LAST, [*FIRST, *LAST]), ([*FIRST, 4, 5, 6, 7, 9],) * 2])
def test_masked_classes(plan, student, teacher):
    """Tiles without a class: of the student the last, of the teacher the first too; of both all but the last."""

    def mask(dead):
        return lambda z: z.index_fill(-1, torch.tensor(dead), -torch.inf)

    problem = Problem(Case(C=11, leading=(2,), K=1, dtypes=(F64,)), mask(student), mask(teacher))
    problem.labels = torch.tensor([5 if 10 in student else 10, -100])
    found = problem.agree()
    assert all(x.isfinite().all() for x in found.values())
    for name in ("gradient 1", "first 1", "second 2", "meta 0"):
        assert (found[name][:, teacher] == 0).all(), name


@both_kinds
def test_cotangents_on_some_gradients(plan):
    """On one alone too, where a tile is masked: sums that nobody needs must not become NaN."""
    case = Case(C=11, leading=(2,), K=1, dtypes=(F64,), reduction="none")
    problem = Problem(case, lambda z: z.index_fill(-1, torch.arange(4, 8), -torch.inf))
    problem.labels = torch.tensor([0, -100])
    inputs, leaves = [problem.upstream, *problem.logits], problem.logits
    wide = [z.detach().requires_grad_() for z in inputs]
    loss = plain(wide[1], wide[2:], problem.labels, **problem.settings, **problem.reduced)
    first = torch.autograd.grad(problem.loss(), leaves, problem.upstream, create_graph=True)
    correct = torch.autograd.grad(loss, wide[1:], wide[0], create_graph=True)
    for some in ([0], [1], [0, 1]):
        cotangents = [problem.cotangents[i] for i in some]
        again = {"retain_graph": True, "materialize_grads": True}
        found = torch.autograd.grad([first[i] for i in some], inputs, cotangents, **again)
        wanted = torch.autograd.grad([correct[i] for i in some], wide, cotangents, **again)
        for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
            near(a, b, F64, TOLERANCE[F64], f"{i} of {some}")


@pytest.mark.parametrize("resident", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 10_000))])
def test_statistics_ahead_of_gradients(resident, interpreted, monkeypatch):
    """By one row, by some, by all of them."""
    monkeypatch.setattr(triton_launch, "resident", lambda *_: resident)
    monkeypatch.setattr(triton_launch, "plans", lambda *_: [Plan(True, 1, 4, 4)])
    Problem(Case(C=7, leading=(3,), labels="all", K=1)).agree()


@tiles
def test_a_tile_whose_teacher_probability_is_too_small_for_a_number(plan):
    """Adds nothing, though the student masks a class of it, and is infinitely far away there."""
    problem = Problem(Case(C=11, leading=(2,), K=1, reduction="none"))
    with torch.no_grad():
        problem.logits[1][:, 1] = 1e4
        problem.logits[0][0, 5] = -torch.inf
    problem.labels = torch.tensor([1, -100])
    assert all(x.isfinite().all() for x in problem.found().values())


@tiles
def test_a_bad_number_stays_in_its_row(plan):
    """In any tile, of student or teacher; the first row is as it is alone."""

    def run(some):
        problem = Problem(Case(C=11, K=1, reduction="none", labels="all"), lambda z: z[some], labels=lambda y: y[some])
        for who, row, column, value in ((0, 1, 0, torch.nan), (1, 2, 10, torch.inf)):
            problem.logits[who].detach()[row:, column] = value
        loss = problem.loss()
        return loss.detach(), *torch.autograd.grad(loss.sum(), problem.logits)

    together, alone = run(slice(3)), run(slice(1))
    assert together[0].isnan().tolist() == [False, True, True]
    assert all(torch.equal(a[:1], b) for a, b in zip(together, alone, strict=True))


# Which plans there are, and which one is taken


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 2**23) | st.builds(lambda n, less: 2**n - less, st.integers(1, 23), st.integers(0, 1)))
def test_plans_cover_the_classes(classes):
    found = tuning.plans(classes, triton_launch.ON_CHIP, triton_launch.TILES)
    assert found and len(found) == len(set(found))
    for plan in found:
        assert all(n.bit_count() == 1 for n in plan[1:]), "Triton wants powers of two"
        assert plan.block_r == 1 or not plan.tiled
        tiles = -(-classes // plan.block_c)
        assert tiles <= (triton_launch.TILES if plan.tiled else 1)
        if classes > 1024:  # smaller tiles and wider threads are not worth trying
            assert plan.block_c >= 2048 if plan.tiled else plan.block_c <= 64 * 32 * plan.warps
    assert classes > 1024 or len(found) == 1


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A device that nobody has, and a timer: the seconds that a plan takes."""
    monkeypatch.setenv("METADISTIL_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    calls = []

    def timed(launch, **_):
        launch()
        return -calls[-1].block_c

    monkeypatch.setattr(tuning.triton.testing, "do_bench", timed)
    tuning._known.cache_clear()
    yield calls
    tuning._known.cache_clear()


CHOICES = [Plan(True, 1, width, 4) for width in (8, 32, 16)]
DEVICE = torch.device("cuda")


def chosen(gpu, op="first", classes=50, choices=CHOICES, device=DEVICE):
    return tuning.choose((op, classes), choices, gpu.append, device)


def test_the_quickest_plan_is_remembered(gpu, tmp_path):
    assert chosen(gpu) == CHOICES[1] and gpu == CHOICES
    assert chosen(gpu) == CHOICES[1]
    tuning._known.cache_clear()  # as in the next process
    assert chosen(gpu, choices=CHOICES[::-1]) == CHOICES[1]
    assert len(gpu) == 3, "tried once"
    assert chosen(gpu, "first", 51) == CHOICES[1]
    assert len(gpu) == 6, "another shape is tried"
    (file,) = tmp_path.rglob("*.json")
    assert set(json.loads(file.read_text())) == {"first 50", "first 51"}
    file.write_text(file.read_text()[:-9])
    tuning._known.cache_clear()
    assert chosen(gpu) == CHOICES[1]
    assert len(gpu) == 9, "a damaged file is written again"
    assert list(json.loads(file.read_text())) == ["first 50"]
    assert list(tmp_path.rglob("*")) == [file.parent, file], "nothing is left beside it"


def test_plans_are_of_these_kernels():
    """A file with a Triton kernel that is not part of the cache's key would keep the plans of another one."""
    ops = Path(tuning.__file__).parents[1]
    kernels = {file for file in ops.rglob("*.py") if "@triton.jit" in file.read_text()}
    assert len(kernels) >= 4 and kernels <= set(tuning.sources())


def test_a_cache_that_cannot_be_written_is_no_error(gpu, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("METADISTIL_CACHE", str(tmp_path / "file"))
    with caplog.at_level("WARNING", "engine.kernels"):
        assert chosen(gpu) == CHOICES[1]
    assert "not kept for the next run" in caplog.text


def test_what_another_process_found_is_kept(gpu, tmp_path):
    chosen(gpu)
    (file,) = tmp_path.rglob("*.json")
    file.write_text(json.dumps({"second 50": list(CHOICES[0]), "first 51": list(CHOICES[2])}))
    chosen(gpu, "first", 51)
    assert set(json.loads(file.read_text())) == {"first 50", "first 51", "second 50"}
    tuning._known.cache_clear()
    assert chosen(gpu, "second") == CHOICES[0]
    assert chosen(gpu, "first", 51) == CHOICES[2], "of two, the one that came first"


def test_a_plan_that_does_not_fit_is_not_taken(gpu):
    def launch(plan):
        gpu.append(plan)
        if plan == CHOICES[1]:
            raise torch.OutOfMemoryError("too large")

    assert tuning.choose(("first", 50), CHOICES, launch, DEVICE) == CHOICES[2]


def test_nothing_is_tried_where_it_must_not_be(gpu, monkeypatch):
    assert chosen(gpu, choices=CHOICES[:1]) == chosen(gpu, device=torch.device("cpu")) == CHOICES[0]
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert chosen(gpu) == CHOICES[0]
    assert gpu == []
    assert chosen(gpu) == CHOICES[1], "after the capture it is tried"


# Where a row lies


@st.composite
def views(draw):
    """A few tensors of one shape, each a view of its own; every number is another."""
    shape = draw(st.lists(st.integers(0, 4), min_size=0, max_size=4)) + [draw(st.integers(1, 4))]
    made = []
    for _ in range(draw(st.integers(1, 3))):
        order = draw(st.permutations(range(len(shape))))
        memory, cuts = [], []
        for d in order:
            steps, before, expanded = draw(st.integers(1, 2)), draw(st.integers(0, 2)), draw(st.integers(0, 4)) == 0
            memory.append(1 if expanded else shape[d] * steps + before)
            cuts.append(slice(None) if expanded else slice(before, None, steps))
        count = int(torch.tensor(memory).prod())
        x = torch.arange(count, dtype=F64).reshape(memory)[tuple(cuts)]
        made.append(x.permute([order.index(d) for d in range(len(shape))]).expand(shape))
    return made


def read(x: torch.Tensor, offset: int) -> float:
    return torch.as_strided(x, (), (), x.storage_offset() + offset).item()


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(views())
def test_rows_are_found_by_their_strides(tensors):
    lie, C = Rows(tensors), tensors[0].shape[-1]
    assert (lie.shape, lie.classes) == (tensors[0].shape, C)
    assert lie.rows * C == tensors[0].numel() and lie.inner >= 1
    assert not lie.rows or len(lie.strides) == 3 * len(tensors)
    for k, (x, kept) in enumerate(zip(tensors, lie.tensors, strict=True)):
        assert torch.equal(kept, x)
        if not lie.rows:
            return
        outer, step, across = lie.strides[3 * k : 3 * k + 3]
        numbers = x.reshape(-1, C)
        for r, c in product(range(lie.rows), range(C)):
            assert read(kept, (r // lie.inner) * outer + (r % lie.inner) * step + c * across) == numbers[r][c]


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(views())
def test_what_two_strides_describe_is_not_copied(tensors):
    assume(tensors[0].dim() <= 3)
    assert all(a is b for a, b in zip(Rows(tensors).tensors, tensors, strict=True))
