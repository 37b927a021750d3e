"""The meta-step for any modules: one step is the same whichever strategy takes it, and what does not fit is said."""

import copy

import pytest
import torch
from torch import nn

import engine
from engine import MetaStep, Network, Objective, Outputs
from engine.meta.strategies import STRATEGIES

# Two steps of Adam, which divides by the gradient's own size, on weights of size 1
TOLERANCE = 1e-9


def cnn(seed, width=4, dropout=0.2):
    torch.manual_seed(seed)
    module = nn.Sequential(
        nn.Conv2d(1, width, 3, bias=False), nn.BatchNorm2d(width), nn.Tanh(), nn.Flatten(), nn.Dropout(dropout),
        nn.Linear(4 * width, 3),
    )  # fmt: skip
    return module.double()


def data(seed, size=8):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(size, 1, 4, 4, generator=generator, dtype=torch.float64),
            torch.randint(3, (size,), generator=generator))  # fmt: skip


def meta_step(teachers=2, **settings):
    student, models = cnn(0), [cnn(k + 1, width=5) for k in range(teachers)]
    return MetaStep(
        student, models, Objective(temperature=2.0), pilot_lr=0.2,
        student_optimizer=torch.optim.AdamW(student.parameters(), lr=1e-2),
        teacher_optimizers=[torch.optim.AdamW(m.parameters(), lr=1e-2) for m in models], **settings,
    )  # fmt: skip


def weights(step):
    networks = [step.problem.student, *step.problem.teachers]
    return [t.detach().clone() for n in networks for t in [*n.module.parameters(), *n.module.buffers()]]


def run(step, pilots=1, steps=2):
    torch.manual_seed(9)
    values = [step([data(10 * i + j) for j in range(pilots)], [data(100 + i), data(200 + i)]) for i in range(steps)]
    return values, weights(step), torch.get_rng_state()


@pytest.mark.parametrize("pilots", [1, 2])
@pytest.mark.parametrize("settings", [
    {}, {"independent_masks": True}, {"pilot_optimizer": "adamw"}, {"teacher_weights": "learned"},
    {"teacher_weights": [1, 3], "checkpointing": "both"}, {"store": "pinned", "max_grad_norm": None},
], ids=str)  # fmt: skip
def test_a_step_is_the_same_by_either_exact_strategy(settings, pilots):
    """Losses, weights, buffers and random numbers: `exact` reuses the pilot's forward, `double_backward` repeats it."""
    first, second = (run(meta_step(strategy=s, **settings), pilots) for s in ("exact", "double_backward"))
    assert torch.equal(first[2], second[2])
    for a, b in zip(first[0], second[0], strict=True):
        assert a.keys() == b.keys() == {"loss", "pilot_loss", "quiz_loss"}
        assert all(abs(a[n] - b[n]) < TOLERANCE and not a[n].requires_grad for n in a)
    assert max((a - b).abs().max() for a, b in zip(first[1], second[1], strict=True)) < TOLERANCE


OWN_STRATEGY = """
from engine.meta.strategies import STRATEGIES, Strategy

STRATEGY = Strategy(gradient=STRATEGIES["exact"].gradient, help="the exact one by another name")
"""
OWN_PILOT = """
from engine.meta.pilots import PilotRule
from engine.meta.pilots.sgd import SGD

PILOT = PilotRule(make=lambda lr, student, learner: SGD(lr / 2), help="half a step")
"""


def test_strategies_and_pilots_from_files(tmp_path):
    """What a file of a user's gives is taken where a name is."""
    (tmp_path / "strategy.py").write_text(OWN_STRATEGY)
    (tmp_path / "pilot.py").write_text(OWN_PILOT)
    expected = run(meta_step())
    found = run(meta_step(strategy=str(tmp_path / "strategy.py")))
    assert all(torch.equal(a, b) for a, b in zip(expected[1], found[1], strict=True))
    halved = run(meta_step(pilot_optimizer=str(tmp_path / "pilot.py")))
    assert halved[0][0]["pilot_loss"] == expected[0][0]["pilot_loss"]
    assert halved[0][0]["quiz_loss"] != expected[0][0]["quiz_loss"]


def test_a_learner_brings_its_own_optimizer():
    step = meta_step(teachers=1)
    again = MetaStep(step.learner, step.learners, Objective(temperature=2.0), pilot_lr=0.2)
    assert again.learner is step.learner and again.learners == step.learners
    with pytest.raises(ValueError, match="is a Learner, which has its optimizer already"):
        MetaStep(step.learner, step.learners, student_optimizer=step.learner.optimizer)


def test_masks_are_the_pilots_unless_independent():
    shared, independent = run(meta_step()), run(meta_step(independent_masks=True))
    assert not torch.equal(shared[2], independent[2])
    assert shared[0][0]["pilot_loss"] == independent[0][0]["pilot_loss"]
    assert shared[0][0]["loss"] != independent[0][0]["loss"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_meta_gradient_alone(strategy):
    """Needs no optimizers, adds to `.grad`, and leaves the student as it was."""
    student, teacher = cnn(0), cnn(1)
    step = MetaStep(student, [teacher], pilot_lr=0.2, strategy=strategy)
    before, found = weights(step), []
    for _ in range(2):
        torch.manual_seed(3)
        values = step.meta_gradient([data(0)], [data(1)])
        found.append([p.grad.clone() for p in teacher.parameters()])
    assert all(torch.equal(2 * a, b) for a, b in zip(*found, strict=True))
    assert any(g.abs().max() > 1e-6 for g in found[0])
    assert all(torch.equal(a, b) for a, b in zip(before, weights(step), strict=True))
    assert values.keys() == {"pilot_loss", "quiz_loss"} and all(p.grad is None for p in student.parameters())


def test_learned_weights_move_and_stay_a_mean():
    step = meta_step(teacher_weights="learned", weights_lr=0.1)
    assert torch.allclose(step.weights, torch.full((2,), 0.5, dtype=torch.float64))
    run(step, steps=3)
    assert (step.weights - 0.5).abs().max() > 0.01
    assert step.weights.sum() == pytest.approx(1.0) and not step.weights.requires_grad
    assert meta_step().weights is None
    assert torch.allclose(meta_step(teacher_weights=[1, 3]).weights, torch.tensor([0.25, 0.75], dtype=torch.float64))


def assert_strategies_agree(make, network, pilot, quiz, seed=0, **settings):
    """Of a student and a teacher, `network(make())` both."""
    found = []
    for strategy in ("exact", "double_backward"):
        student, teacher = make(0), make(1)
        step = MetaStep(network(student), [network(teacher)], strategy=strategy, pilot_lr=0.1, **settings)
        torch.manual_seed(seed)
        step.meta_gradient([pilot], [quiz])
        found.append(torch.cat([p.grad.flatten() for p in teacher.parameters()]))
    assert found[0].norm() > 0
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-8)


def test_networks_say_how_a_batch_is_read():
    """A batch of any kind, features for a feature loss, an object with `.logits`."""

    class Reading(nn.Module):
        def __init__(self, seed):
            super().__init__()
            torch.manual_seed(seed)
            self.inner, self.out = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            state = torch.tanh(self.inner(x))
            return self.out(state), state.unsqueeze(1)

    class Batch:
        def __init__(self, seed):
            generator = torch.Generator().manual_seed(seed)
            self.rows, self.labels = torch.randn(5, 4, generator=generator), torch.randint(3, (5,), generator=generator)

    def call(module, batch):
        return Outputs(*module(batch.rows))

    objective = Objective(feature_loss="patient", beta=10.0)
    assert_strategies_agree(Reading, lambda module: Network(module, call), Batch(0), Batch(1), objective=objective)


def test_a_users_own_steps_go_between():
    """Plain backward and optimizer steps on the flattened modules, and a scheduler: nothing of it is disturbed."""
    step = meta_step(teachers=1)
    student, (teacher,) = step.problem.student.module, (t.module for t in step.problem.teachers)
    plain = copy.deepcopy(student)
    run(step, steps=1)
    teacher_before = copy.deepcopy(teacher.state_dict())
    x, y = data(5)
    student.load_state_dict(plain.state_dict())
    for module in (student, plain):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        torch.manual_seed(4)
        for _ in range(2):
            optimizer.zero_grad()
            nn.functional.cross_entropy(module.train()(x), y).backward()
            optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), plain.parameters(), strict=True))
    run(step, steps=1)  # goes on
    assert any(not torch.equal(a, teacher_before[n]) for n, a in teacher.state_dict().items())


def build(*models, student_adam=None, teacher_adams=(), **settings):
    """A meta-step whose student is the first of `models`; its optimizers step the modules that are named."""
    if student_adam is not None:
        settings["student_optimizer"] = torch.optim.AdamW(student_adam.parameters())
    others = [torch.optim.AdamW(m.parameters()) for m in teacher_adams]
    return MetaStep(models[0], models[1:], teacher_optimizers=others, **settings)


def half_frozen():
    """It has a frozen weight, so that by their number a stranger's could be one of its own."""
    HALF[0].requires_grad_(False)
    return HALF


HALF = cnn(3)
A, B, D, BATCH = cnn(0), cnn(1), cnn(2), [data(0)]
REFUSED = [
    ("at least one teacher", lambda: build(A)),
    ("strategy is 'implicit'; it must be one of", lambda: build(A, B, strategy="implicit")),
    ("pilot_optimizer is 'lion'; it must be one of adamw, sgd", lambda: build(A, B, pilot_optimizer="lion")),
    ("'selective' is refused", lambda: build(A, B, checkpointing="selective")),
    ("checkpointing is 'all'", lambda: build(A, B, checkpointing="all")),
    ("store is 'disk'", lambda: build(A, B, store="disk")),
    ("give 2 positive numbers", lambda: build(A, B, D, teacher_weights=[1.0])),
    ("give 2 positive numbers", lambda: build(A, B, D, teacher_weights=[1.0, -1.0])),
    ("micro_batch_size is 0; it must be at least 1", lambda: build(A, B, micro_batch_size=0)),
    (r"the student has no weight.*requires_grad_\(\)", lambda: build(cnn(0).requires_grad_(False), B)),
    ("teacher 1 has no weight that requires gradient", lambda: build(A, B, cnn(0).requires_grad_(False))),
    ("teacher 0 has no weight that requires gradient", lambda: build(A, Network(cnn(0).requires_grad_(False)), B)),
    (r"teacher 1 \(mine\) has no weight", lambda: build(A, B, Network(cnn(0).requires_grad_(False), name="mine"))),
    ("teacher 1 needs trainable weights of one dtype.*float32 on cpu, torch.float64 on cpu", lambda: build(A, B, nn.Sequential(cnn(0), nn.Linear(1, 1)))),
    ("optimizer of the student also steps weights of another module, as one of \\[2, 2\\]",
     lambda: build(half_frozen(), B, student_optimizer=torch.optim.SGD([*HALF[1:].parameters(), nn.Linear(2, 2).weight]))),
    ("give student_optimizer", lambda: build(A, B, pilot_optimizer="adamw")),
    ("SGD's update is not known.*--pilot-optimizer sgd",
     lambda: build(A, B, pilot_optimizer="adamw", student_optimizer=torch.optim.SGD(A.parameters()))),
    ("2 optimizers for 1 teachers", lambda: build(A, B, teacher_adams=[B, B])),
    ("optimizer of the teacher 0 does not step", lambda: build(A, B, D, teacher_adams=[D, B])),
    ("optimizer of the student does not step", lambda: build(A, B, student_adam=B)),
    ("share the weight", lambda: build(A, B, B)),
    ("student and the teacher 0 share", lambda: build(A, A)),
    ("bfloat16; keep weights in float32", lambda: build(cnn(0).bfloat16(), B)),
    ("student_optimizer and teacher_optimizers", lambda: build(A, B)(BATCH, BATCH)),
    ("teacher_optimizers", lambda: build(A, B, student_adam=A, teacher_weights="learned")(BATCH, BATCH)),
    ("soft_loss", lambda: Objective("kl_div")), ("feature_loss", lambda: Objective(feature_loss="pkd")),
    ("temperature", lambda: Objective(temperature=0.0)), ("alpha", lambda: Objective(alpha=7.0)),
    ("alpha", lambda: Objective(alpha=float("nan"))), ("beta", lambda: Objective(beta=-1.0)),
    *(("must agree", lambda kind=kind: Objective(kind).distil(Outputs(torch.randn(4, 3)), [Outputs(torch.randn(4, 1))], data(0, 4)[1]))
      for kind in ("kl", "mse_prob", "mse_logits")),
]  # fmt: skip


@pytest.mark.parametrize(("message", "make"), REFUSED, ids=[message for message, _ in REFUSED])
def test_what_does_not_fit_is_refused(message, make):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(("batches", "message"), [
    ([], "of nothing"), (data(0)[0], "got Tensor"), ({"x": 1}, "got dict"), ([data(0)[0]], "got Tensor"), ([{"x": 1}], "got dict"),
    (data(0), "got Tensor"),
], ids=["empty", "tensor", "dict", "list of tensors", "list of dicts", "a pair"])  # fmt: skip
def test_batches_are_lists_of_pairs(batches, message):
    step = meta_step()
    for pair in ((batches, BATCH), (BATCH, batches)):
        with pytest.raises(ValueError, match=message):
            step(*pair)


def test_the_package_offers_its_classes():
    assert engine.MetaStep is MetaStep
    with pytest.raises(AttributeError, match="Metastep"):
        engine.Metastep  # noqa: B018


def test_what_a_training_before_left_in_grad_is_not_stepped():
    """The last `backward()` of a teacher's own training is no part of the meta-gradient; nor is half of one."""
    clean, dirty = meta_step(), meta_step()
    for module in (dirty.problem.student.module, *(t.module for t in dirty.problem.teachers)):
        for p in module.parameters():
            p.grad = torch.full_like(p, 7.0)
    expected, got = run(clean, steps=1), run(dirty, steps=1)
    assert all(torch.equal(a, b) for a, b in zip(expected[1], got[1], strict=True))
    (x, y), quiz = data(0), [data(1)]
    before = weights(clean)
    with pytest.raises(IndexError):
        clean([(x, y)], [*quiz, (x, y + 7)])  # no such class
    assert all(torch.equal(a, b) for a, b in zip(before, weights(clean), strict=True))
    assert all(p.grad.abs().max() == 0 for t in clean.problem.teachers for p in t.module.parameters())


def test_labels_of_a_regression_may_stand_in_a_column():
    regression, one, labels = Objective("mse_logits", regression=True), torch.randn(4, 1), torch.randn(4)
    assert torch.equal(regression.hard(one, labels), regression.hard(one, labels[:, None]))


@pytest.mark.parametrize(("strategy", "settings"), [
    ("exact", {}), ("exact", {"micro_batch_size": 3, "independent_masks": True}), ("double_backward", {}),
    ("finite_difference", {}),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("pilots", [1, 2])
def test_a_frozen_trunk_in_student_and_teacher_is_as_two(strategy, settings, pilots):
    """The student's dropout in it is on, also behind the teacher's answers, for which it is off."""
    found = []
    for apart in (False, True):
        torch.manual_seed(5)
        trunk = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Tanh(), nn.Dropout(0.5)).requires_grad_(False)
        heads = [nn.Sequential(nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 3)) for _ in range(2)]
        trunks = [trunk, copy.deepcopy(trunk) if apart else trunk]
        models = [nn.Sequential(t, head).double() for t, head in zip(trunks, heads, strict=True)]
        optimizers = [torch.optim.SGD(head.parameters(), lr=0.5) for head in heads]
        step = MetaStep(models[0], [models[1]], Objective(temperature=2.0), pilot_lr=0.5, student_optimizer=optimizers[0],
                        teacher_optimizers=optimizers[1:], strategy=strategy, **settings)  # fmt: skip
        found.append(run(step, pilots))
    assert torch.equal(found[0][2], found[1][2])
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


class SometimesDeeper(nn.Module):
    """A layer that every forward takes or leaves, as LayerDrop does."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.inner, self.extra, self.out = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = nn.functional.dropout(torch.tanh(self.inner(x)), 0.3, self.training)
        if not self.training or torch.rand([]) < 0.5:
            x = torch.tanh(self.extra(x))
        return self.out(x)


@pytest.mark.parametrize("seed", range(8))
def test_a_student_that_drops_layers_by_chance(seed):
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.randn(5, 4, generator=generator), torch.randint(3, (5,), generator=generator)) for _ in range(2)]
    assert_strategies_agree(SometimesDeeper, Network, *batches, seed=seed)
