"""The closed derivative of a pilot's steps against autograd through them, on a loss whose Hessian is written down."""

import pytest
import torch
from device_helpers import NoReading
from fake_apex import FusedAdam
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from engine.meta.first_adamw import FirstAdamW
from engine.meta.pilots.adamw import AdamW
from engine.meta.pilots.sgd import SGD
from engine.meta.time_machine import TimeMachine
from engine.params.flat import FlatParameters
from engine.params.native import Backend
from engine.params.optim import FlatAdamW
from engine.params.vectors import Rows, Vector

# Over the largest entry, in float64. AdamW's slopes in its second moment are differences of large terms.
TOLERANCE = 1e-9
LR = 0.1
SETTINGS = {"betas": (0.8, 0.9), "eps": 1e-4}


class Model(nn.Module):
    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.layer = nn.Embedding(6, 3), nn.Linear(3, 2)
        self.to(dtype)


def set_rate(optimizer, rate):
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(rate, dtype=torch.float64) if torch.is_tensor(group["lr"]) else rate
    return optimizer


# At a rate that is not the pilot's. Counts of the fused one are tensors, as a CUDA graph wants them, those of FusedAdam stand
# in the groups: a number, or where it is capturable an int32 tensor [1].
OPTIMIZERS = {
    "FlatAdamW": lambda flat, groups: FlatAdamW(flat, weight_decay=0.2, **SETTINGS),
    "AdamW": lambda flat, groups: torch.optim.AdamW(groups, **SETTINGS),
    "Adam": lambda flat, groups: torch.optim.Adam(flat.parameters.values(), **SETTINGS),
    "fused AdamW": lambda flat, groups: torch.optim.AdamW(groups, fused=True, **SETTINGS),
    "FusedAdam": lambda flat, groups: FusedAdam(groups, **SETTINGS),
    "capturable FusedAdam": lambda flat, groups: FusedAdam(groups, capturable=True, **SETTINGS),
}


def optimizer_of(flat, kind):
    matrices, vectors = ([p for p in flat.parameters.values() if (p.ndim > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.2}, {"params": vectors, "weight_decay": 0.0}]
    return set_rate(OPTIMIZERS[kind](flat, groups), 9.0)


class Problem:
    """Steps j with loss 1/2 phi'A_j phi - b_j'phi on some rows of the table, quiz loss w'phi + 1/2 phi'phi.

    All in flat coordinates [N], in which A_j [N, N] and b_j are zero where the step's batch has no weight.
    """

    def __init__(self, kind, steps, seed, before=2, row_wise=True, table_rows=1):
        self.generator = torch.Generator().manual_seed(seed)
        self.flat = FlatParameters(Model(), table_rows)
        self.flat.weights[:] = self.random()
        N = len(self.flat.weights)
        self.row_wise, self.rows, self.A, self.b = row_wise, [], [], []
        for _ in range(steps):
            self.rows.append(torch.randperm(6, generator=self.generator)[:3].sort().values)
            within = torch.zeros(N, dtype=torch.float64)
            views = self.flat.views(within)
            views["layer.weight"][:], views["layer.bias"][:], views["words.weight"][self.rows[-1]] = 1, 1, 1
            A = torch.randn(N, N, generator=self.generator, dtype=torch.float64) / N**0.5
            self.A.append(within[:, None] * (A + A.T) * within)
            self.b.append(within * self.random())
        self.w = self.random()
        optimizer = None if kind == "sgd" else optimizer_of(self.flat, kind)
        for _ in range(before if optimizer else 0):
            self.train(optimizer)
        self.pilots = [SGD(LR) if kind == "sgd" else AdamW(LR, self.flat, optimizer) for _ in range(2)]

    def random(self):
        """[N], 0 in the gaps between the weights."""
        found = torch.zeros_like(self.flat.weights)
        for view in self.flat.views(found).values():
            view.copy_(torch.randn(view.shape, generator=self.generator, dtype=torch.float64))
        return found

    def train(self, optimizer):
        """A step of the student, which leaves moments of all sizes."""
        kept = self.flat.weights.clone()
        self.flat.gradients.copy_(self.random() ** 3)
        optimizer.step()
        self.flat.weights.copy_(kept)

    def vector(self, flat, j):
        if not self.flat.tables:
            return Vector(flat, [])
        words = self.flat.views(flat, ["words.weight"])["words.weight"]
        part = Rows(self.rows[j], words[self.rows[j]]) if self.row_wise else words
        return Vector(flat[: self.flat.dense], [part])

    def whole(self, vector):
        """[N]"""
        found = torch.zeros_like(self.flat.weights)
        found[: self.flat.dense] = vector.dense
        if not self.flat.tables:
            return found
        (part,) = vector.tables
        words = self.flat.views(found, ["words.weight"])["words.weight"]
        words.copy_(part.dense(words) if isinstance(part, Rows) else part)
        return found

    def by_closed_form(self):
        """Weights after the steps; dq/dphi_0, and dq/db_j = -d_j, of the quiz loss there."""
        pilot, flat, machine = self.pilots[0], self.flat, TimeMachine(self.flat)
        before = flat.weights.clone()
        with machine.excursion():
            pilot.begin()
            for j, (A, b) in enumerate(zip(self.A, self.b, strict=True)):
                pilot.advance(j, self.vector(A @ flat.weights - b, j), machine)
            after = flat.weights.clone()
            v, slopes = self.split(self.w + after), []
            for j in range(len(self.A) - 1, -1, -1):
                d, carried = pilot.pull_back(j, v)
                assert all(t.isfinite().all() for t in (self.whole(d), self.whole(carried)))
                within = (self.A[j] != 0).any(0)
                slopes.insert(0, -self.whole(d) * within)
                v = carried.plus(self.vector(self.A[j] @ self.whole(d), j))
        assert torch.equal(flat.weights, before)
        return after, self.whole(v), slopes

    def split(self, flat):
        tables = [self.flat.views(flat, [table.name])[table.name] for table in self.flat.tables]
        return Vector(flat[: self.flat.dense], tables)

    def by_autograd(self):
        pilot, flat = self.pilots[1], self.flat
        start = {n: p.detach().clone().requires_grad_() for n, p in flat.parameters.items()}
        bs = [b.clone().requires_grad_() for b in self.b]
        pilot.begin()
        weights = start
        for j, (A, b) in enumerate(zip(self.A, bs, strict=True)):
            weights = pilot.update(j, weights, flat.views(A @ self.joined(weights) - b))
        phi = self.joined(weights)
        quiz = self.w @ phi + phi @ phi / 2
        found = torch.autograd.grad(quiz, [*start.values(), *bs], materialize_grads=True)
        gradient = self.joined(dict(zip(start, found, strict=False)))
        slopes = [g * (A != 0).any(0) for g, A in zip(found[len(start) :], self.A, strict=True)]
        return phi.detach(), gradient, slopes

    def joined(self, named):
        """[N] with graph, gaps filled with 0."""
        parts, end = [], 0
        for name, offset in self.flat.offsets.items():
            parts += [self.w.new_zeros(offset - end), named[name].reshape(-1)]
            end = offset + named[name].numel()
        return torch.cat([*parts, self.w.new_zeros(len(self.w) - end)])


def error(got, expected):
    return ((got - expected).abs().max() / expected.abs().max()).item()


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    kind=st.sampled_from(["sgd", *OPTIMIZERS]),
    steps=st.integers(1, 3),
    before=st.integers(0, 3),
    rows=st.sampled_from(["rows", "whole table", "no table"]),
    seed=st.integers(0, 10**6),
)
@example("sgd", 3, 0, "rows", 0)
@example("FlatAdamW", 3, 2, "rows", 0)
@example("AdamW", 3, 0, "rows", 0)
@example("Adam", 3, 1, "whole table", 0)
@example("capturable FusedAdam", 2, 1, "no table", 0)
def test_pull_back_is_autograd_through_the_steps(kind, steps, before, rows, seed):
    problem = Problem(kind, steps, seed, before, rows == "rows", None if rows == "no table" else 1)
    for _ in range(2):  # a round starts anew, from where the optimizer has come to
        (phi, gradient, slopes), (phi_2, gradient_2, slopes_2) = problem.by_closed_form(), problem.by_autograd()
        assert error(phi, phi_2) < 1e-13
        assert error(gradient, gradient_2) < TOLERANCE
        for a, b in zip(slopes, slopes_2, strict=True):
            assert b.abs().max() > 1e-4 and error(a, b) < TOLERANCE
        if kind != "sgd":
            problem.train(problem.pilots[0].optimizer)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_host_reads_nothing(kind, monkeypatch):
    """The count least of all: a graph that is captured once has to find the count of every later round."""
    monkeypatch.setattr("engine.params.native._chosen", Backend("torch", "for this test"))
    problem = Problem(kind, 2, 0, table_rows=None)
    pilot, machine, v = problem.pilots[0], TimeMachine(problem.flat), problem.vector(problem.w, 0)
    with NoReading(), machine.excursion():
        pilot.begin()
        assert pilot._count.dtype == torch.float64 and pilot._count.shape == ()
        for j in range(2):
            pilot.advance(j, v, machine)
        for j in (1, 0):
            pilot.pull_back(j, v)
        pilot.begin()
        pilot.update(0, problem.flat.parameters, problem.flat.views(problem.w))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_does_not_change_between_rounds_is_kept(kind):
    """The moments of FlatAdamW are flat as they are; what is gathered, and every weight's decay, has one place."""
    problem = Problem(kind, 1, 0)
    pilot, places = problem.pilots[0], []
    for _ in range(2):
        pilot.begin()
        places.append([t.data_ptr() for t in (*pilot._moments, pilot.decay)])
    assert places[0] == places[1]
    if kind == "FlatAdamW":
        assert places[0][:2] == [t.data_ptr() for t in pilot.optimizer.moments()[:2]]
    for group in pilot.optimizer.param_groups:
        group["weight_decay"] *= 3
    if kind != "Adam":
        pilot.begin()
        assert pilot.decay.max() == pytest.approx(0.6)
        group["eps"] = 1e-3
        with pytest.raises(ValueError, match="other betas or eps"):
            pilot.begin()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_state_that_was_taken_back_is_none(kind):
    """The buffers that moments lie in outlive the state that a time machine takes away."""
    problem = Problem(kind, 1, 0, before=0)
    pilot = problem.pilots[0]
    with TimeMachine(problem.flat, optimizer=pilot.optimizer).excursion():
        problem.train(pilot.optimizer)
        pilot.begin()
        assert pilot._count == 1 and pilot._moments[0].any()
    pilot.begin()
    assert pilot._count == 0 and not pilot._moments[0].any() and not pilot._moments[1].any()
    assert not pilot.optimizer.state


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("before", [0, 2])
def test_a_pilot_step_is_the_optimizers_own(kind, before):
    """At the pilot's learning rate; its moments are read, not written."""
    problem = Problem(kind, 3, 0, before, row_wise=False)
    pilot, flat, machine = problem.pilots[0], problem.flat, TimeMachine(problem.flat)
    optimizer, gradients = pilot.optimizer, [problem.random() for _ in range(3)]
    state = [t.clone() for entries in optimizer.state.values() for t in entries.values()]
    pilot.begin()
    with machine.excursion():
        for j, gradient in enumerate(gradients):
            pilot.advance(j, problem.vector(gradient, j), machine)
        got = flat.weights.clone()
    now = [t for entries in optimizer.state.values() for t in entries.values()]
    assert all(torch.equal(a, b) for a, b in zip(state, now, strict=True))
    set_rate(optimizer, LR)
    for gradient in gradients:
        flat.gradients.copy_(gradient)
        optimizer.step()
    assert error(got, flat.weights) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("steps", [1, 3])
def test_the_first_steps_from_no_state_are_finite(steps, dtype):
    """Also where gradients are 0, tiny (their square is 0) or huge: a root at 0 has an infinite slope."""
    flat = FlatParameters(Model(dtype), table_rows=1)
    pilot, machine = AdamW(1e-3, flat, FlatAdamW(flat)), TimeMachine(flat)
    before, gradient = flat.weights.clone(), torch.zeros_like(flat.weights)
    for view in flat.views(gradient).values():
        view.copy_(torch.tensor([0.0, 1e-30, -1e-8, 1.0, 1e15]).repeat(4)[: view.numel()].view(view.shape))
    vector = Vector(gradient[: flat.dense], [flat.views(gradient, ["words.weight"])["words.weight"]])
    with machine.excursion():
        pilot.begin()
        for j in range(steps):
            pilot.advance(j, vector, machine)
        assert flat.weights.isfinite().all()
        moved = ((flat.weights - before * (1 - 1e-5) ** steps) / (1e-3 * steps))[gradient == 1.0]
        torch.testing.assert_close(moved, -torch.ones_like(moved), rtol=0.02, atol=0)
        for j in range(steps - 1, -1, -1):
            direction, vector = pilot.pull_back(j, vector)
            for each in (direction, vector):
                assert each.dense.isfinite().all() and each.tables[0].isfinite().all()


def test_sgd_moves_the_rows_of_its_gradient_only():
    problem = Problem("sgd", 1, 0)
    v = problem.vector(problem.w, 0)
    direction, carried = problem.pilots[0].pull_back(0, v)
    assert carried is v and torch.equal(direction.tables[0].rows, problem.rows[0])
    assert torch.equal(direction.tables[0].values, v.tables[0].values * -LR)


class Lion(torch.optim.SGD):
    """Any optimizer that is not Adam."""


@pytest.mark.parametrize(("make", "says"), [
    (lambda ps: torch.optim.Adam(ps, weight_decay=0.1), "decay that is not decoupled"),
    (lambda ps: torch.optim.AdamW(ps, amsgrad=True), "amsgrad or maximize"),
    (lambda ps: torch.optim.AdamW(ps, maximize=True), "amsgrad or maximize"),
    (lambda ps: torch.optim.AdamW([{"params": ps[:1], "betas": (0.5, 0.6)}, {"params": ps[1:]}]), "other betas"),
    (lambda ps: torch.optim.AdamW(ps[1:]), "does not step words.weight"),
    (lambda ps: Lion(ps, lr=0.1), "Lion.*AdamW, Adam"),
])  # fmt: skip
def test_other_rules_are_refused(make, says):
    """They would be differentiated as if they were plain AdamW."""
    flat = FlatParameters(Model())
    with pytest.raises(ValueError, match=f"{says}.*--pilot-optimizer sgd"):
        AdamW(LR, flat, make(list(flat.parameters.values()))).begin()


def test_the_first_step_of_a_new_adamw_is_not_differentiated():
    """It would otherwise pull back through moments that it does not have."""
    module = nn.Linear(3, 2)
    flat = FlatParameters(module)
    first = FirstAdamW(0.1, flat, torch.optim.AdamW(module.parameters()), 1.0)
    with pytest.raises(TypeError, match="needs SGD or AdamW"):
        first.pull_back(0, None)
