"""The exact meta-gradient against autograd through the pilot, and that against differences of the whole procedure."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from engine import metagrad
from engine.batch import Batch
from engine.metagrad import STRATEGIES, double_backward, exact
from engine.network import Network
from engine.objectives import Objective
from engine.time_machine import TimeMachine

# Largest difference of a parameter's gradient over the largest entry of that teacher's whole gradient, since some
# gradients (an attention key's bias) are zero but for rounding. Rounding grows with the depth of the walk back. bf16 is
# float32 weights under autocast: 8 bits, where both strategies are 1e-2 to 6e-2 from float32 and up to 1.4e-2 apart.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}
FAMILIES = ("bert", "distilbert", "roberta")
PADDING = {"wordpiece": 0, "bpe": 1}
WORDS, LENGTH = 20, {"wordpiece": 8, "bpe": 11}  # the tokenizers differ, so the batches do


@pytest.fixture(autouse=True)
def math_attention():
    with sdpa_kernel(SDPBackend.MATH):
        yield


def network(family, classes, seed, layers=1, dropout=0.1, dtype=torch.float64):
    """A real model, tiny, with weights large enough that curvature matters."""
    torch.manual_seed(seed)
    common = {"vocab_size": WORDS, "num_labels": classes, "initializer_range": 0.4, "attn_implementation": "sdpa"}
    if family == "distilbert":
        module = DistilBertForSequenceClassification(
            DistilBertConfig(
                dim=8, hidden_dim=16, n_layers=layers, n_heads=2, max_position_embeddings=16, dropout=dropout,
                attention_dropout=dropout, seq_classif_dropout=dropout, pad_token_id=0, **common,
            )
        )  # fmt: skip
    else:
        config, kind = {
            "bert": (BertConfig, BertForSequenceClassification),
            "roberta": (RobertaConfig, RobertaForSequenceClassification),
        }[family]
        module = kind(
            config(
                hidden_size=8, intermediate_size=16, num_hidden_layers=layers, num_attention_heads=2,
                max_position_embeddings=16, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
                pad_token_id=PADDING[encoding(family)], **common,
            )
        )  # fmt: skip
    assert module.config._attn_implementation == "sdpa"
    return Network(family, module.to(dtype), encoding(family))


def encoding(family):
    return "bpe" if family == "roberta" else "wordpiece"


def batch(seed, classes, size=3):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (size,), generator=generator)
    if classes == 1:
        labels = torch.randn(size, generator=generator)
    inputs = {}
    for name, length in LENGTH.items():
        lengths = torch.randint(2, length, (size,), generator=generator)
        lengths[0] = length
        mask = (torch.arange(length) < lengths[:, None]).long()  # [B, L]
        ids = torch.randint(2, WORDS, (size, length), generator=generator)
        inputs[name] = {"input_ids": torch.where(mask == 1, ids, PADDING[name]), "attention_mask": mask}
    inputs["wordpiece"]["token_type_ids"] = torch.randint(2, (size, LENGTH["wordpiece"]), generator=generator)
    return Batch(labels, inputs)


class Scene:
    """A student in train mode, teachers in eval mode, pilot and quiz batches."""

    def __init__(self, student="bert", teachers=("bert",), soft_loss="kl", pilots=1, quizzes=1, classes=3, seed=0,
                 pilot_lr=0.3, dropout=0.1, dtype=torch.float64):  # fmt: skip
        self.student = network(student, classes, seed, dropout=dropout, dtype=dtype)
        self.teachers = [network(t, classes, seed + 1 + k, layers=1 + k % 2, dtype=dtype) for k, t in enumerate(teachers)]  # fmt: skip
        self.student.module.train()
        for teacher in self.teachers:
            teacher.module.eval()
        self.pilots = [batch(seed + 10 + j, classes) for j in range(pilots)]
        self.quizzes = [batch(seed + 20 + j, classes, size=4) for j in range(quizzes)]
        self.objective = Objective(soft_loss, temperature=2.0, alpha=0.6, regression=classes == 1)
        self.pilot_lr, self.seed = pilot_lr, seed

    def run(self, strategy, keep=False):
        """Losses, a gradient per teacher and name, and the random state after."""
        if not keep:
            for teacher in self.teachers:
                teacher.module.zero_grad(set_to_none=True)
        torch.manual_seed(self.seed)
        losses = strategy(
            self.student, self.teachers, TimeMachine(self.student.module), self.pilots, self.quizzes, self.objective,
            self.pilot_lr,
        )  # fmt: skip
        gradients = [
            {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in t.trainable().items()}
            for t in self.teachers
        ]
        return losses, gradients, torch.get_rng_state()


def tensors(module):
    return [t.detach().clone() for t in [*module.parameters(), *module.buffers()]]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def difference(got, expected):
    """The worst over teachers and parameters, relative to each teacher's largest entry."""
    worst = 0.0
    for a, b in zip(got, expected, strict=True):
        scale = max(g.abs().max() for g in b.values())
        assert scale > 1e-6, "a teacher without a gradient compares nothing"
        worst = max(worst, *(((a[n] - b[n]).abs().max() / scale).item() for n in b))
    return worst


def compare(scene, tolerance):
    student = scene.student.module
    before, teachers_before = tensors(student), [tensors(t.module) for t in scene.teachers]
    torch.manual_seed(scene.seed)
    start = torch.get_rng_state()
    results = {}
    for name, strategy in STRATEGIES.items():
        results[name] = scene.run(strategy)
        assert same(tensors(student), before), "the student is rewound bit for bit"
        assert student.training and all(m.training for m in student.modules())
        assert all(p.grad is None for p in student.parameters())
        assert not any(t.module.training for t in scene.teachers)
        assert all(same(tensors(t.module), b) for t, b in zip(scene.teachers, teachers_before, strict=True))
    (losses, gradients, after), (losses_2, gradients_2, after_2) = results["exact"], results["double_backward"]
    assert torch.equal(after, after_2) and not torch.equal(after, start)
    for value, expected in zip(losses, losses_2, strict=True):
        assert not value.requires_grad and value.ndim == 0
        torch.testing.assert_close(value, expected, rtol=tolerance, atol=0)
    assert difference(gradients, gradients_2) < tolerance


@settings(max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(
    student=st.sampled_from(FAMILIES),
    teachers=st.lists(st.sampled_from(FAMILIES), min_size=1, max_size=3),
    # regression has one output, for which only mse_logits says anything
    loss=st.sampled_from([("kl", 3), ("kl", 2), ("mse_prob", 3), ("mse_logits", 2), ("mse_logits", 1)]),
    pilots=st.integers(1, 3),
    quizzes=st.integers(1, 2),
    pilot_lr=st.sampled_from([0.01, 0.3]),
    seed=st.integers(0, 50),
)
@example("bert", ["bert", "roberta", "distilbert"], ("kl", 3), 3, 2, 0.3, 0)
@example("distilbert", ["roberta", "bert"], ("mse_prob", 2), 2, 1, 0.3, 1)
@example("roberta", ["distilbert", "distilbert"], ("mse_logits", 1), 3, 2, 0.3, 2)
@example("distilbert", ["bert"], ("kl", 2), 1, 1, 0.3, 3)
def test_exact_equals_double_backward(student, teachers, loss, pilots, quizzes, pilot_lr, seed):
    soft_loss, classes = loss
    scene = Scene(student, teachers, soft_loss, pilots, quizzes, classes, seed, pilot_lr)
    compare(scene, TOLERANCE[torch.float64])


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pilots", [1, 2])
@pytest.mark.parametrize("student", FAMILIES)
def test_exact_in_the_precisions_of_training(student, pilots, precision):
    scene = Scene(student, ["bert", "roberta"], pilots=pilots, quizzes=2, pilot_lr=0.05, dtype=torch.float32)
    if precision == torch.bfloat16:
        for each in [scene.student, *scene.teachers]:
            each.precision = "bf16"
    compare(scene, TOLERANCE[precision])


def whole(scene, teachers):
    """The quiz loss as a plain program of a user: backward, SGD in place, next batch, then the quiz in eval mode."""
    torch.manual_seed(scene.seed)
    student = copy.deepcopy(scene.student.module)
    o = scene.objective
    reads = {"bert": ("input_ids", "attention_mask", "token_type_ids")}

    def logits(module, name, b):
        inputs = b.inputs[encoding(name)]
        names = reads.get(name, ("input_ids", "attention_mask"))
        return module(**{k: inputs[k] for k in names if k in inputs}).logits

    for b in scene.pilots:
        with torch.no_grad():
            mean = sum(logits(t, n.name, b) for t, n in zip(teachers, scene.teachers, strict=True)) / len(teachers)
        out = logits(student, scene.student.name, b)
        if o.soft_loss == "kl":
            log_q = F.log_softmax(out / o.temperature, -1)
            soft = o.temperature**2 * F.kl_div(log_q, F.softmax(mean / o.temperature, -1), reduction="batchmean")
        else:
            soft = ((out - mean) ** 2).mean()
        hard = ((out[:, 0] - b.labels) ** 2).mean() if o.regression else F.cross_entropy(out, b.labels)
        student.zero_grad()
        (o.alpha * soft + (1 - o.alpha) * hard).backward()
        with torch.no_grad():
            for p in student.parameters():
                if p.grad is not None:
                    p -= scene.pilot_lr * p.grad
    student.eval()
    total = 0.0
    with torch.no_grad():
        for b in scene.quizzes:
            out = logits(student, scene.student.name, b)
            total += ((out[:, 0] - b.labels) ** 2).mean() if o.regression else F.cross_entropy(out, b.labels)
    return total / len(scene.quizzes)


@pytest.mark.parametrize(
    ("student", "teachers", "soft_loss", "pilots", "classes"),
    [("distilbert", ["bert", "roberta"], "kl", 1, 3), ("bert", ["distilbert"], "kl", 3, 2),
     ("roberta", ["bert", "bert"], "mse_logits", 2, 1)],
)  # fmt: skip
def test_double_backward_equals_differences_of_the_whole(student, teachers, soft_loss, pilots, classes):
    """Central differences along random directions in each teacher, dropout on; error of order step^2."""
    scene = Scene(student, teachers, soft_loss, pilots, quizzes=2, classes=classes, pilot_lr=0.1)
    losses, gradients, _ = scene.run(double_backward)
    modules = [t.module for t in scene.teachers]
    torch.testing.assert_close(losses.quiz, whole(scene, modules), rtol=1e-12, atol=0)
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


def test_the_walk_back_needs_the_curvature(monkeypatch):
    """Without v <- v - eta H v the first of two batches would be credited wrongly, by far more than the tolerance."""
    scene = Scene("bert", ["bert", "roberta"], pilots=2)
    _, expected, _ = scene.run(double_backward)
    _, got, _ = scene.run(exact)
    assert difference(got, expected) < TOLERANCE[torch.float64]
    directional = metagrad._forward_mode

    def flat(*args, **kwargs):
        logits, u, hv = directional(*args, **kwargs)
        return logits, u, hv and [torch.zeros_like(h) for h in hv]

    monkeypatch.setattr(metagrad, "_forward_mode", flat)
    _, without, _ = scene.run(exact)
    assert difference(without, expected) > 0.05


def test_the_walk_back_needs_the_masks(monkeypatch):
    """The same for dropout: a second forward with other masks is another student."""
    scene = Scene("bert", ["bert"], pilots=2)
    _, expected, _ = scene.run(double_backward)
    monkeypatch.setattr(metagrad.RandomState, "restore", lambda self: None)
    _, without, _ = scene.run(exact)
    assert difference(without, expected) > 0.05


def test_every_pilot_batch_and_every_quiz_batch_counts():
    scene = Scene("distilbert", ["bert"], pilots=3, quizzes=2)
    _, whole_gradient, _ = scene.run(exact)
    for name in ("pilots", "quizzes"):
        batches = getattr(scene, name)
        for i in range(len(batches)):
            setattr(scene, name, [*batches[:i], batch(99, 3), *batches[i + 1 :]])
            _, other, _ = scene.run(exact)
            assert difference(other, whole_gradient) > 1e-3, (name, i)
        setattr(scene, name, batches)


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_gradients_accumulate(strategy):
    scene = Scene("distilbert", ["bert", "roberta"])
    _, once, _ = scene.run(strategy)
    _, twice, _ = scene.run(strategy, keep=True)
    for a, b in zip(once, twice, strict=True):
        assert all(torch.equal(2 * a[n], b[n]) for n in a)


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


@pytest.mark.parametrize("pilots", [1, 2, 3])
@pytest.mark.parametrize(
    ("student", "soft_loss", "classes"),
    [("distilbert", "kl", 3), ("bert", "mse_prob", 2), ("roberta", "mse_logits", 1)],
)
def test_finite_difference_comes_near(student, soft_loss, classes, pilots):
    """Its error is of order eps^2 (1.5e-3 at worst here), far below what leaving the curvature out would cost."""
    scene = Scene(student, ["bert", "roberta"], soft_loss, pilots, quizzes=2, classes=classes, pilot_lr=0.05)
    losses, gradients, after = scene.run(exact)
    losses_2, gradients_2, after_2 = scene.run(STRATEGIES["finite_difference"])
    assert torch.equal(after, after_2) and torch.equal(losses.quiz, losses_2.quiz)
    assert 0 < difference(gradients_2, gradients) < 5e-3
