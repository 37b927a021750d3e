"""Modules of a user's own: shared parts, statistics that a forward moves and reads, numbers drawn in eval mode, frozen parts."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

from engine import MetaStep, Objective
from engine.params.flat import TABLE_ROWS
from engine.params.optim import FlatAdamW

INPUTS, WIDTH, CLASSES, RATE = 6, 5, 3, 0.3


class Shared(nn.Module):
    """One layer under two names, one three times in a list, one weight in two layers."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(INPUTS, INPUTS)
        self.b = self.a
        self.layers = nn.ModuleList([nn.Linear(INPUTS, INPUTS)] * 3)
        self.there, self.back = (nn.Linear(INPUTS, INPUTS, bias=False) for _ in range(2))
        self.back.weight = self.there.weight
        self.out = nn.Linear(INPUTS, CLASSES)

    def forward(self, x):
        x = torch.tanh(self.b(self.a(x)))
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.out(self.back(torch.tanh(self.there(x))))


class Running(nn.Module):
    """A statistic that a forward in train mode moves: before it is read or after, in place or by another tensor."""

    def __init__(self, first, in_place):
        super().__init__()
        self.first, self.in_place = first, in_place
        self.hidden, self.out = nn.Linear(INPUTS, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x):
        h = self.hidden(x)
        if self.first:
            self.move(h)
        y = h - self.mean
        if not self.first:
            self.move(h)
        return self.out(torch.tanh(y))

    def move(self, h):
        if not self.training:
            return
        if self.in_place:
            with torch.no_grad():
                self.mean.mul_(0.5).add_(0.5 * h.mean(0))
        else:
            self.mean = 0.5 * self.mean + 0.5 * h.detach().mean(0)


class Drawing(nn.Module):
    """Dropout in eval mode, too, as Monte Carlo dropout has it."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(INPUTS, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        return self.out(F.dropout(torch.tanh(self.hidden(x)), 0.4, True))


class Embedded(nn.Module):
    """Words looked up by a number of each input; their rows have norms of 2 on the average."""

    def __init__(self, kind=nn.Embedding, **settings):
        super().__init__()
        self.words, self.out = kind(12, WIDTH, **settings), nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        h = self.words((4 * x).long().remainder(12))
        return self.out(torch.tanh(h if h.ndim == 2 else h.mean(1)))


class Table(nn.Module):
    """So many words that they are looked up by rows: with a hook of the user's, written over, and once without a gradient."""

    def __init__(self):
        super().__init__()
        self.words, self.out = nn.Embedding(TABLE_ROWS, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.words.register_forward_hook(lambda module, args, out: 2 * out)

    def forward(self, x):
        ids = (400 * x).long().remainder(TABLE_ROWS)
        h = self.words(ids)
        h *= 0.5
        with torch.no_grad():
            constant = self.words(ids.flip(0))
        return self.out(torch.tanh((h + constant).mean(1)))


class Counting(nn.Module):
    """A statistic that a forward writes before its graph needs it, in eval mode, too."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(INPUTS, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.register_buffer("scale", torch.ones(WIDTH))

    def forward(self, x):
        self.scale.mul_(0.8)
        return self.out(torch.tanh(self.hidden(x)) * self.scale)


def frozen():
    module = nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.Tanh(), nn.Dropout(0.3), nn.Linear(WIDTH, CLASSES))
    module[0].requires_grad_(False)
    return module


def activations():
    """Functions without a derivative of their backward in forward mode."""
    return nn.Sequential(
        nn.Linear(INPUTS, 8),
        nn.SiLU(),
        nn.GroupNorm(2, 8),
        nn.Linear(8, 8),
        nn.Mish(),
        nn.Linear(8, 8),
        nn.SiLU(inplace=True),
        nn.Linear(8, 8),
        nn.Mish(inplace=True),
        nn.Linear(8, CLASSES),
    )


RENORMED = ["renormed", "sparse and renormed"]
MODULES = {
    "shared": Shared,
    "drawing": Drawing,
    "frozen": frozen,
    "activations": activations,
    "table": Table,
    "counting": Counting,
    "sparse": lambda: Embedded(sparse=True),
    **{name: (lambda name=name: Embedded(max_norm=1.0, sparse=name != RENORMED[0])) for name in RENORMED},
    **{
        f"running, {'first' if first else 'later'}, {'in place' if in_place else 'anew'}": (
            lambda first=first, in_place=in_place: Running(first, in_place)
        )
        for first in (True, False)
        for in_place in (True, False)
    },
}


# autograd cannot go back through a statistic that a later pass has written over
DIFFERENTIABLE = sorted(MODULES.keys() - {"counting"})


def made(name, seed):
    torch.manual_seed(seed)
    return MODULES[name]().double()


def batch(seed, size=8):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, INPUTS, generator=generator, dtype=torch.float64), torch.randint(
        CLASSES, (size,), generator=generator
    )


def held(module):
    return [t.clone() for t in [*module.parameters(), *module.buffers()]]


def meta_gradient(student, teachers, strategy, pilots, **more):
    """[N] of all teachers, by a step of the engine on new copies."""
    student, teachers = copy.deepcopy(student), copy.deepcopy(teachers)
    before, names = held(student), list(student.state_dict())
    step = MetaStep(student, teachers, Objective(temperature=2.0), strategy=strategy, pilot_lr=RATE, **more)
    torch.manual_seed(5)
    step.meta_gradient([batch(j) for j in range(pilots)], [batch(9)])
    assert all(map(torch.equal, held(student), before)), "the student is as it was"
    assert list(student.state_dict()) == names and all(isinstance(p, nn.Parameter) for p in student.parameters())
    return torch.cat([p.grad.flatten() for t in teachers for p in t.parameters() if p.requires_grad])


@settings(max_examples=15, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(
    student=st.sampled_from(DIFFERENTIABLE),
    teachers=st.lists(st.sampled_from(DIFFERENTIABLE), min_size=1, max_size=2),
    pilots=st.integers(1, 3),
    micro_batch=st.sampled_from([None, 3]),
)
@example("shared", ["shared", "drawing"], 2, None)
@example("running, first, in place", ["drawing"], 1, None)
@example("running, first, in place", ["frozen"], 2, 3)
@example("running, later, anew", ["shared"], 2, None)
@example("drawing", ["drawing", "drawing"], 1, 3)
@example("activations", ["activations"], 3, None)
@example("table", ["table"], 2, None)
@example("renormed", ["sparse and renormed"], 2, None)
@example("sparse and renormed", ["sparse"], 1, 3)
def test_exact_equals_double_backward(student, teachers, pilots, micro_batch):
    modules = made(student, 0), [made(name, 1 + k) for k, name in enumerate(teachers)]
    got, expected = (
        meta_gradient(*modules, strategy, pilots, micro_batch_size=micro_batch)
        for strategy in ("exact", "double_backward")
    )
    assert (got - expected).norm() < 1e-12 * expected.norm()


def quiz_loss(student, teachers, pilots):
    """What a plain program of a user computes."""
    torch.manual_seed(5)
    student, teachers, objective = copy.deepcopy(student).train(), copy.deepcopy(teachers), Objective(temperature=2.0)
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=RATE)
    for j in range(pilots):
        x, y = batch(j)
        with torch.no_grad():
            mean = sum(t.eval()(x) for t in teachers) / len(teachers)
        z = student(x)
        soft = F.kl_div(F.log_softmax(z / 2, -1), F.softmax(mean / 2, -1), reduction="batchmean") * 4
        loss = objective.alpha * soft + (1 - objective.alpha) * F.cross_entropy(z, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, y = batch(9)
    with torch.no_grad():
        return F.cross_entropy(student.eval()(x), y)


@pytest.mark.parametrize(
    "name", [name for name in MODULES if name not in (*RENORMED, "table")]
)  # whose scaling, and whose rows without a gradient, have no derivative in torch
def test_exact_equals_differences_of_a_plain_program(name):
    """From the second pilot step on differences also go through a statistic that the first one has moved."""
    pilots = 1 if name.startswith("running") else 2
    student, teachers = made(name, 0), [made(name, 1), made("drawing", 2)]
    gradient, step = meta_gradient(student, teachers, "exact", pilots), 1e-5
    weights = [p for t in teachers for p in t.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(1)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in weights]
    ends = []
    for sign in (1, -2):
        with torch.no_grad():
            torch._foreach_add_(weights, direction, alpha=sign * step)
        ends.append(quiz_loss(student, teachers, pilots))
    slope = (ends[0] - ends[1]) / (2 * step)
    assert (slope - gradient @ torch.cat([d.flatten() for d in direction])).abs() < 1e-7 * gradient.norm()


@pytest.mark.parametrize("name", ["renormed", "sparse", "table", "counting"])
def test_whole_steps(name):
    """The real step begins where the pilot's forward left rows and statistics, whether that forward is kept or made again."""
    found = []
    for strategy in ("exact", "finite_difference" if name == "counting" else "double_backward"):
        torch.manual_seed(2)
        student, teacher = made(name, 0), Embedded(nn.EmbeddingBag, max_norm=1.0, sparse=True).double()
        optimizers = [torch.optim.SGD(module.parameters(), lr=RATE) for module in (student, teacher)]
        step = MetaStep(student, [teacher], strategy=strategy, pilot_lr=RATE, student_optimizer=optimizers[0],
                        teacher_optimizers=optimizers[1:])  # fmt: skip
        before = held(student)
        for j in range(2):
            step([batch(j)], [batch(9)])
        assert not torch.equal(before[0], next(student.parameters()))
        found.append(torch.cat([t.flatten() for t in (*student.parameters(), *teacher.parameters())]))
    assert (found[0] - found[1]).abs().max() < (1e-4 if name == "counting" else 1e-12)


def test_a_checkpointed_teacher_that_draws_in_eval_mode():
    teacher = Layered(Drawing(), Drawing()).double()
    found = [
        meta_gradient(made("frozen", 0), [teacher], "exact", 1, checkpointing=choice) for choice in ("none", "teachers")
    ]
    assert (found[0] - found[1]).norm() < 1e-14 * found[0].norm()


def test_frozen_statistics_in_student_and_teacher():
    """The student's forward moves them; the teacher's graph needs them as they were. Against a plain program."""
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.BatchNorm1d(WIDTH)).double().requires_grad_(False)
    trunk(batch(7)[0])
    modules = [nn.Sequential(trunk, nn.Tanh(), nn.Linear(WIDTH, CLASSES)).double() for _ in range(2)]
    lower = [nn.Sequential(nn.Linear(INPUTS, INPUTS), m).double() for m in modules]
    student, teacher = copy.deepcopy(lower)
    step = MetaStep(student, [teacher], Objective(temperature=2.0), pilot_lr=RATE)
    step.meta_gradient([batch(0)], [batch(9)])
    gradient, (student, teacher) = torch.cat([p.grad.flatten() for p in teacher[0].parameters()]), copy.deepcopy(lower)
    weights, ends, size = list(teacher[0].parameters()), [], 1e-5
    direction = [torch.ones_like(p) for p in weights]
    for sign in (1, -2):
        with torch.no_grad():
            torch._foreach_add_(weights, direction, alpha=sign * size)
        ends.append(quiz_loss(student, [teacher], 1))
    assert ((ends[0] - ends[1]) / (2 * size) - gradient.sum()).abs() < 1e-7 * gradient.norm()


@pytest.mark.parametrize("strategy", ["exact", "double_backward"])
def test_a_step_inside_autocast_sees_the_weights_of_now(strategy):
    """Autocast keeps casts of weights until it ends."""
    found = []
    for kept in (True, False):
        student, teacher = (
            nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES)) for _ in range(2)
        )
        for seed, module in enumerate((student, teacher)):
            torch.manual_seed(seed)
            for p in module.parameters():
                nn.init.normal_(p)
        optimizers = [torch.optim.SGD(m.parameters(), lr=1.0) for m in (student, teacher)]
        step = MetaStep(student, [teacher], pilot_lr=1.0, strategy=strategy, max_grad_norm=None,
                        student_optimizer=optimizers[0], teacher_optimizers=optimizers[1:])  # fmt: skip
        (x, y), (quiz_x, quiz_y) = batch(0), batch(9)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=kept):
            found.append([*step([(x.float(), y)], [(quiz_x.float(), quiz_y)]).values(), *student.parameters()])
    assert all(map(torch.equal, *found))


class Layered(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers, self.between = nn.ModuleList(layers), nn.Linear(CLASSES, INPUTS)

    def forward(self, x):
        return self.layers[1](self.between(self.layers[0](x)))


@pytest.mark.parametrize("whose", ["student", "teacher"])
@pytest.mark.parametrize("later", [True, False])
def test_what_is_frozen_or_unfrozen_between_two_steps_is_told(whose, later):
    """Where it would be moved on, or never."""
    student, teacher = made("frozen", 0), made("frozen", 1)
    step = MetaStep(student, [teacher])
    step.meta_gradient([batch(0)], [batch(1)])
    {"student": student, "teacher": teacher}[whose][3 if later else 0].requires_grad_(not later)
    called = "the student" if whose == "student" else "the teacher 0"
    what = r"3\.weight was frozen after" if later else r"0\.weight was unfrozen after"
    with pytest.raises(RuntimeError, match=f"{called}: {what}"):
        step.meta_gradient([batch(0)], [batch(1)])
    MetaStep(student.requires_grad_(), [teacher.requires_grad_()]).meta_gradient([batch(0)], [batch(1)])


def test_what_an_optimizer_would_still_move_is_told_or_let_go():
    student, teacher = made("frozen", 0).requires_grad_(), made("frozen", 1)
    step = MetaStep(student, [teacher], pilot_lr=RATE)
    old = FlatAdamW(step.problem.student.flat)
    student(batch(0)[0]).sum().backward()
    student[0].requires_grad_(False)
    with pytest.raises(ValueError, match="optimizer of the student was made before its module was moved or frozen"):
        MetaStep(student, [teacher], student_optimizer=old)
    optimizers = [
        torch.optim.SGD(module.parameters(), lr=RATE, momentum=0.9, weight_decay=0.1) for module in (student, teacher)
    ]
    step = MetaStep(student, [teacher], student_optimizer=optimizers[0], teacher_optimizers=optimizers[1:])
    before = student[0].weight.clone()
    step([batch(0)], [batch(9)])
    assert torch.equal(student[0].weight, before) and student[0].weight.grad is None, "it has a gradient from before"
    student.append(nn.Linear(CLASSES, CLASSES).double())
    with pytest.raises(RuntimeError, match="the student: weights came or went"):
        step([batch(0)], [batch(9)])
