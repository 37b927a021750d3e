"""The exact meta-gradient against autograd through the pilot, and that against differences of the whole procedure."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from scenes import ENCODERS, FAMILIES, TOLERANCE, Scene, batch, compare, difference, encoding, same, tensors
from torch import nn
from torch.profiler import ProfilerActivity, profile

from engine.batch import Batch
from engine.errors import UserError
from engine.meta.strategies import STRATEGIES
from engine.meta.strategies.double_backward import double_backward
from engine.meta.strategies.exact import exact
from engine.meta.strategies.first_order import first_order, last_layer
from engine.models.features import InnerStates
from engine.models.network import Encoder


@settings(max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(
    student=st.sampled_from(FAMILIES),
    teachers=st.lists(st.sampled_from(FAMILIES), min_size=1, max_size=3),
    # regression has one output, for which only mse_logits says anything
    loss=st.sampled_from([("kl", 3), ("kl", 2), ("mse_prob", 3), ("mse_logits", 2), ("mse_logits", 1)]),
    pilots=st.integers(1, 3),
    quizzes=st.integers(1, 2),
    pilot_lr=st.sampled_from([0.01, 0.3]),
    optimizer=st.sampled_from(["sgd", "adamw"]),
    weights=st.sampled_from([None, "learned", "given"]),
    features=st.booleans(),
    seed=st.integers(0, 50),
)
@example("bert", ["bert", "roberta", "distilbert"], ("kl", 3), 3, 2, 0.3, "adamw", "learned", True, 0)
@example("distilbert", ["roberta", "cnn"], ("mse_prob", 2), 2, 1, 0.3, "sgd", "given", False, 1)
@example("roberta", ["distilbert", "distilbert"], ("mse_logits", 1), 3, 2, 0.3, "sgd", None, True, 2)
@example("distilbert", ["bert"], ("kl", 2), 1, 1, 0.3, "sgd", None, False, 3)
@example("cnn", ["cnn", "mlp", "bert"], ("kl", 3), 3, 1, 0.3, "adamw", "learned", False, 4)
@example("cnn", ["cnn"], ("kl", 3), 1, 2, 0.3, "sgd", None, False, 5)
@example("mlp", ["mlp", "mlp"], ("mse_prob", 3), 2, 2, 0.3, "adamw", "given", False, 6)
@example("bert", ["bert"], ("kl", 3), 1, 1, 0.3, "sgd", None, True, 7)
def test_exact_equals_double_backward(
    student, teachers, loss, pilots, quizzes, pilot_lr, optimizer, weights, features, seed
):
    soft_loss, classes = loss
    features = features and {student, *teachers} <= set(ENCODERS)
    given = [1.0 + k for k in range(len(teachers))] if weights == "given" else weights
    if len(teachers) == 1 and weights == "learned":
        given = None  # its weight is 1 whatever it learns
    scene = Scene(student, teachers, soft_loss, pilots, quizzes, classes, seed, pilot_lr, optimizer=optimizer,
                  weights=given, features=features)  # fmt: skip
    compare(scene, TOLERANCE[torch.float64])


@pytest.mark.parametrize(
    ("student", "teachers", "pilots", "optimizer", "more"),
    [
        ("distilbert", ["distilbert", "bert"], 2, "adamw", {"weights": "learned"}),
        ("bert", ["bert", "distilbert"], 3, "sgd", {"quizzes": 2, "weights": [1.0, 3.0]}),
        ("roberta", ["roberta"], 2, "sgd", {"soft_loss": "mse_logits", "classes": 1}),
        ("distilbert", ["distilbert"], 1, "adamw", {"soft_loss": "mse_prob"}),
    ],
)
def test_exact_equals_double_backward_through_attention_scores(student, teachers, pilots, optimizer, more):
    """TinyBERT's loss: the projection takes its pilot steps with the student, and is rewound with it."""
    scene = Scene(student, teachers, pilots=pilots, optimizer=optimizer, features="tinybert", pilot_lr=0.1, **more)
    assert {"extras.hidden.weight", "extras.hidden.bias"} <= scene.student.flat.parameters.keys()
    compare(scene, 10 * TOLERANCE[torch.float64])  # its losses are sums over all tokens
    before = scene.run(exact)[1]
    with torch.no_grad():
        scene.student.module.extras["hidden"].weight.mul_(1.1)
    assert difference(scene.run(exact)[1], before) > 1e-4  # it is in the gradient


@pytest.mark.parametrize("pilots", [1, 2])
@pytest.mark.parametrize("student", ENCODERS)
def test_exact_in_float32_and_as_near_to_it_in_bf16_as_double_backward(student, pilots):
    """Eight bits a rounding: on models this small either may be 1e-2 to 0.7 off, and mostly both together."""
    found = {}
    for precision in ("fp32", "bf16"):
        scene = Scene(student, ["bert", "roberta"], pilots=pilots, quizzes=2, pilot_lr=0.05, dtype=torch.float32)
        for each in [scene.student, *scene.teachers]:
            each.precision = precision
        for strategy in (exact, double_backward):
            found[precision, strategy.__name__] = scene.run(strategy)[1]
    expected = found["fp32", "exact"]
    assert difference(expected, found["fp32", "double_backward"]) < TOLERANCE[torch.float32]
    errors = [difference(found["bf16", name], expected) for name in ("exact", "double_backward")]
    assert 0 < errors[0] < errors[1] + TOLERANCE[torch.bfloat16]


def whole(scene, modules):
    """The quiz loss as a plain program of a user: backward, the optimizer's step, next batch, then the quiz in eval mode.

    `modules` are the teachers, and the weights' module where there is one.
    """
    torch.manual_seed(scene.seed)
    student, o = copy.deepcopy(scene.student.module), scene.objective
    teachers = modules[: len(scene.teachers)]

    def outputs(module, name, b):
        if name in ("cnn", "mlp"):
            return module(b.inputs["image"]), None
        reader = Encoder(name, module, encoding(name))  # the last layer's dropout masks are those of one token
        reader.inner = InnerStates(token=(1,) if o.feature_loss == "patient" else ())
        logits, states, *_ = reader(b, higher=True)
        return logits, None if states is None else F.normalize(states[:, 0], dim=-1)

    optimizer = torch.optim.SGD(student.parameters(), lr=scene.pilot_lr)
    if scene.optimizer == "adamw":
        theirs = scene.pilot().optimizer
        copied = dict(zip((id(p) for p in scene.student.module.parameters()), student.parameters(), strict=True))
        groups = [{**g, "params": [copied[id(p)] for p in g["params"]]} for g in theirs.param_groups]
        optimizer = torch.optim.AdamW(groups, foreach=False)
        optimizer.load_state_dict(copy.deepcopy(theirs.state_dict()))
        for group in optimizer.param_groups:
            group["lr"] = scene.pilot_lr
    with torch.no_grad():
        w = [1 / len(teachers)] * len(teachers) if scene.weights is None else modules[-1]().tolist()
    for b in scene.pilots:
        with torch.no_grad():
            taught = [outputs(t, n.name, b) for t, n in zip(teachers, scene.teachers, strict=True)]
            mean = sum(wk * z for wk, (z, _) in zip(w, taught, strict=True))
        out, states = outputs(student, scene.student.name, b)
        if o.soft_loss == "kl":
            log_q = F.log_softmax(out / o.temperature, -1)
            soft = o.temperature**2 * F.kl_div(log_q, F.softmax(mean / o.temperature, -1), reduction="batchmean")
        else:
            soft = ((out - mean) ** 2).mean()
        hard = ((out[:, 0] - b.labels) ** 2).mean() if o.regression else F.cross_entropy(out, b.labels)
        loss = o.alpha * soft + (1 - o.alpha) * hard
        if o.feature_loss == "patient":
            loss = loss + o.beta * sum(wk * F.mse_loss(states, h) for wk, (_, h) in zip(w, taught, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    student.eval()
    total = 0.0
    with torch.no_grad():
        for b in scene.quizzes:
            out, _ = outputs(student, scene.student.name, b)
            total += ((out[:, 0] - b.labels) ** 2).mean() if o.regression else F.cross_entropy(out, b.labels)
    return total / len(scene.quizzes)


@pytest.mark.parametrize(
    ("student", "teachers", "soft_loss", "pilots", "classes", "more"),
    [("distilbert", ["bert", "roberta"], "kl", 1, 3, {}), ("bert", ["distilbert"], "kl", 3, 2, {}),
     ("roberta", ["bert", "bert"], "mse_logits", 2, 1, {}),
     ("bert", ["distilbert", "roberta"], "kl", 2, 3, {"optimizer": "adamw", "weights": "learned", "features": True}),
     # one pilot step: a batch norm's statistics count as constants, although the second step's depend on the first
     ("cnn", ["mlp", "cnn"], "kl", 1, 3, {"weights": [1.0, 3.0]})],
)  # fmt: skip
def test_double_backward_equals_differences_of_the_whole(student, teachers, soft_loss, pilots, classes, more):
    """Central differences along random directions in each learner, dropout on; error of order step^2."""
    scene = Scene(student, teachers, soft_loss, pilots, quizzes=2, classes=classes, pilot_lr=0.1, **more)
    losses, gradients, _ = scene.run(double_backward)
    modules = [t.module for t in scene.teachers] + ([] if scene.weights is None else [scene.weights.module])
    torch.testing.assert_close(losses[1], whole(scene, modules), rtol=1e-12, atol=0)
    generator, step = torch.Generator().manual_seed(1), 1e-5
    for k, gradient in enumerate(gradients):
        for _ in range(3):
            direction = {n: torch.randn(g.shape, generator=generator, dtype=g.dtype) for n, g in gradient.items()}
            ends = []
            for sign in (step, -step):
                moved = [copy.deepcopy(m) if i == k else m for i, m in enumerate(modules)]
                with torch.no_grad():
                    for n, p in moved[k].named_parameters():
                        p += sign * direction[n]
                ends.append(whole(scene, moved))
            slope = (ends[0] - ends[1]) / (2 * step)
            derivative = sum((gradient[n] * d).sum() for n, d in direction.items())
            size = torch.stack([g.norm() for g in gradient.values()]).norm()  # what such a derivative is typically
            assert (slope - derivative).abs() < 1e-7 * size


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_an_error_leaves_the_student_as_it_was(strategy):
    scene = Scene("distilbert", ["bert"], pilots=2)
    before = tensors(scene.student.module)
    scene.quizzes = [Batch(torch.tensor([7]), batch(0, 3, size=1).inputs)]  # no such class
    with pytest.raises(IndexError):
        scene.run(strategy)
    assert same(tensors(scene.student.module), before)
    assert scene.student.module.training


@pytest.mark.parametrize("pilots", [1, 2])
def test_a_frozen_layer_takes_no_pilot_step_and_gets_no_gradient(pilots):
    scene = Scene("bert", ["bert"], pilots=pilots)
    for module in (scene.student.module, scene.teachers[0].module):
        module.bert.embeddings.requires_grad_(False)
    compare(scene, TOLERANCE[torch.float64])
    assert all(p.grad is None for p in scene.teachers[0].module.bert.embeddings.parameters())


@pytest.mark.parametrize("pilots", [1, 3])
@pytest.mark.parametrize(
    ("student", "soft_loss", "classes"),
    [("distilbert", "kl", 3), ("bert", "mse_prob", 2), ("roberta", "mse_logits", 1), ("cnn", "kl", 3)],
)
def test_finite_difference_comes_near(student, soft_loss, classes, pilots):
    """Its error is of order eps^2 (1.5e-3 at worst here), far below what leaving the curvature out would cost."""
    scene = Scene(student, ["bert", "roberta"], soft_loss, pilots, quizzes=2, classes=classes, pilot_lr=0.05)
    losses, gradients, after = scene.run(exact)
    losses_2, gradients_2, after_2 = scene.run(STRATEGIES["finite_difference"])
    assert torch.equal(after, after_2) and torch.equal(losses[1], losses_2[1])
    assert 0 < difference(gradients_2, gradients) < 5e-3


@pytest.mark.parametrize("pilots", [1, 2])
@pytest.mark.parametrize("student", FAMILIES)
def test_first_order_is_exact_where_only_the_last_layer_learns(student, pilots):
    """What it leaves out are the other weights; a student that holds them constant has nothing to leave out."""
    scene = Scene(student, ["bert", "mlp"], pilots=pilots, quizzes=2)
    _, exactly, _ = scene.run(exact)
    _, got, _ = scene.run(first_order)
    assert difference(got, exactly) > 0.05
    names = last_layer(scene.student, scene.student(scene.pilots[0]))
    assert {n.rpartition(".")[2] for n in names} == {"weight", "bias"}
    for name, p in scene.student.module.named_parameters():
        p.requires_grad_(name in names)
    _, exactly, _ = scene.run(double_backward)
    _, got, _ = scene.run(first_order)
    assert difference(got, exactly) < TOLERANCE[torch.float64]


def test_first_order_needs_a_last_layer():
    scene = Scene("cnn", ["mlp"])
    scene.student.module[-1].requires_grad_(False)
    with pytest.raises(UserError, match="--meta-grad exact"):
        scene.run(first_order)


@pytest.mark.parametrize("strategy", ["exact", "double_backward"])
@pytest.mark.parametrize("student", ["bert", "cnn"])
def test_checkpointing_changes_nothing(student, strategy):
    found = [Scene(student, ["bert", "cnn"], pilots=2, quizzes=2, checkpointing=choice) for choice in ("none", "both")]
    (losses, gradients, after), (losses_2, gradients_2, after_2) = (each.run(STRATEGIES[strategy]) for each in found)
    assert torch.equal(after, after_2)
    torch.testing.assert_close(losses_2, losses, rtol=TOLERANCE[torch.float64], atol=0)
    assert difference(gradients_2, gradients) < TOLERANCE[torch.float64]


class NoForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    backward = forward


class Doubling(nn.Module):
    def forward(self, x):
        return NoForwardMode.apply(x)


@pytest.mark.parametrize("pilots", [1, 2])
def test_a_student_without_forward_mode_is_told_what_helps(pilots):
    scene = Scene("mlp", ["mlp"], pilots=pilots)
    scene.student.module.insert(3, Doubling())
    scene.student.flatten()  # the layers behind it have other names now
    before = tensors(scene.student.module)
    with pytest.raises(UserError, match="--meta-grad double_backward, or finite_difference"):
        scene.run(exact)
    assert same(tensors(scene.student.module), before)
    _, expected, _ = scene.run(double_backward)
    _, got, _ = scene.run(STRATEGIES["finite_difference"])
    assert difference(got, expected) < 5e-3


def test_memory_of_exact_does_not_grow_with_the_pilot_steps():
    """Beyond a snapshot and a generator's state a step; a batch of 64 makes activations what memory goes to."""
    most = {}
    for pilots in (3, 6):
        scene = Scene("bert", ["bert"], pilots=pilots)
        scene.pilots = [batch(10 + j, 3, size=64) for j in range(pilots)]
        scene.run(exact)  # allocates what is kept
        most[pilots] = allocated(lambda scene=scene: scene.run(exact))
    flat = scene.student.flat.weights
    kept = flat.numel() * flat.element_size() + torch.get_rng_state().numel()
    assert (most[6] - most[3]) / 3 < 2 * kept < 0.03 * most[3], (most, kept)


def allocated(function):
    """Bytes that torch's allocator hands out at once, at most, on top of what it had."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most
