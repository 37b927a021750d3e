"""Students, teachers, batches and quizzes in float64, and the meta-gradients that strategies find for them."""

import torch
from small_models import transformer
from torch import nn

from engine.batch import Batch
from engine.losses.objectives import Objective
from engine.losses.teacher_weights import TeacherWeights
from engine.meta.pilots.adamw import AdamW
from engine.meta.pilots.sgd import SGD
from engine.meta.problem import Problem
from engine.meta.strategies import STRATEGIES
from engine.meta.time_machine import TimeMachine
from engine.models.features import InnerStates, all_layers, attach, projection
from engine.models.network import Encoder, Network
from engine.params.optim import FlatAdamW

# Largest difference of a parameter's gradient over the largest entry of that teacher's whole gradient, since some
# gradients (an attention key's bias) are zero but for rounding. Rounding grows with the depth of the walk back.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}
ENCODERS = ("bert", "distilbert", "roberta")
FAMILIES = (*ENCODERS, "cnn", "mlp")
PIXELS = 6
PADDING = {"wordpiece": 0, "bpe": 1}
WORDS, LENGTH = 20, {"wordpiece": 8, "bpe": 11}  # the tokenizers differ, so the batches do


def network(family, classes, seed, layers=1, dropout=0.1, dtype=torch.float64):
    """A real model, tiny, with weights large enough that curvature matters; the word tables are looked up by rows."""
    torch.manual_seed(seed)
    if family in ("cnn", "mlp"):
        network = Network(small(family, classes, dropout).to(dtype), lambda m, b: m(b.inputs["image"]), family)
        network.flatten()
        return network
    module = transformer(
        family, seed, layers=layers, classes=classes, words=WORDS, positions=16, dropout=dropout, spread=0.4
    )
    network = Encoder(family, module.to(dtype), encoding(family))
    network.table_rows = WORDS
    network.flatten()
    return network


def small(family, classes, dropout):
    """Ordinary modules: convolutions with a batch norm, whose statistics every forward moves; and a perceptron."""
    if family == "mlp":
        return nn.Sequential(
            nn.Flatten(), nn.Linear(PIXELS**2, 9), nn.GELU(), nn.Dropout(dropout), nn.Linear(9, 7), nn.LayerNorm(7),
            nn.Tanh(), nn.Linear(7, classes),
        )  # fmt: skip
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.GELU(), nn.AvgPool2d(2), nn.Dropout(dropout), nn.Conv2d(3, 4, 2),
        nn.Tanh(), nn.Flatten(), nn.Linear(4, classes),
    )  # fmt: skip


def encoding(family):
    return "bpe" if family == "roberta" else "wordpiece"


def words(family, seed, size=3):
    """What a classifier of transformers is called with, of a `batch`."""
    inputs = batch(seed, 3, size).inputs[encoding(family)]
    return {name: t for name, t in inputs.items() if family == "bert" or name != "token_type_ids"}


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
    inputs["image"] = torch.randn(size, 1, PIXELS, PIXELS, generator=generator, dtype=torch.float64)
    inputs["wordpiece"]["token_type_ids"] = torch.randint(2, (size, LENGTH["wordpiece"]), generator=generator)
    return Batch(labels, inputs)


class Scene:
    """A student in train mode, teachers in eval mode, pilot and quiz batches. `features` are True (patient) or "tinybert"."""

    def __init__(self, student="bert", teachers=("bert",), soft_loss="kl", pilots=1, quizzes=1, classes=3, seed=0,
                 pilot_lr=0.3, dropout=0.1, dtype=torch.float64, optimizer="sgd", weights=None, features=False, **problem):  # fmt: skip
        depth = 2 if features else 1
        self.student = network(student, classes, seed, depth, dropout, dtype)
        self.teachers = [network(t, classes, seed + 1 + k, depth + k % 2, dtype=dtype) for k, t in enumerate(teachers)]  # fmt: skip
        if features == "tinybert":
            width = self.student.module.config.hidden_size
            attach(self.student.module, "hidden", projection(width, width, seed).to(dtype))
            self.student.flatten()
            with torch.no_grad():  # away from the identity
                self.student.module.extras["hidden"].weight.add_(0.1 * torch.randn(width, width, dtype=dtype))
            for teacher in self.teachers:
                layers = [each.module.config.num_hidden_layers for each in (self.student, teacher)]
                self.student.inner, teacher.inner = all_layers(*layers, "skip")
        elif features:
            for each in (self.student, *self.teachers):
                each.inner = InnerStates(token=(1,))
        self.student.module.train()
        for teacher in self.teachers:
            teacher.module.eval()
        self.pilots = [self.typed(batch(seed + 10 + j, classes), dtype) for j in range(pilots)]
        self.quizzes = [self.typed(batch(seed + 20 + j, classes, size=4), dtype) for j in range(quizzes)]
        loss = {False: "none", True: "patient"}.get(features, features)
        beta = 3.0 if loss == "tinybert" else 20.0
        self.objective = Objective(soft_loss, 2.0, 0.6, classes == 1, loss, beta)
        self.pilot_lr, self.seed, self.optimizer = pilot_lr, seed, optimizer
        given = TeacherWeights.of(weights, len(teachers), self.student.flat.weights)
        self.weights = None if given is None else Network(given)
        self.problem = problem

    @staticmethod
    def typed(batch, dtype):
        batch.inputs["image"] = batch.inputs["image"].to(dtype)
        return batch

    def pilot(self):
        """An AdamW pilot begins in the middle of the student's training."""
        flat = self.student.flat
        if self.optimizer == "sgd":
            return SGD(self.pilot_lr)
        optimizer = FlatAdamW(flat, weight_decay=0.1)
        state = optimizer.state_dict()
        generator = torch.Generator().manual_seed(self.seed)
        state["state"] = {
            i: {"step": torch.tensor(3.0), "exp_avg": 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype),
                "exp_avg_sq": 0.1 + torch.rand(p.shape, generator=generator, dtype=p.dtype)}
            for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])
        }  # fmt: skip
        optimizer.load_state_dict(state)
        return AdamW(self.pilot_lr, flat, optimizer)

    def learners(self):
        """The teachers, and the weights where they are learned."""
        return [*self.teachers, *([self.weights] if self.weights is not None and self.weights.trainable() else [])]

    def run(self, strategy, keep=False):
        """Losses, a gradient per learner and name, and the random state after."""
        for each in (self.student, *self.learners()):
            each.flatten()  # a test may have frozen something
        if not keep:
            for learner in self.learners():
                learner.flat.clear_gradients()
        torch.manual_seed(self.seed)
        problem = Problem(
            self.student, self.teachers, self.objective, self.pilot(), TimeMachine(self.student.flat), self.weights,
            **self.problem,
        )  # fmt: skip
        meta = strategy(problem, self.pilots, self.quizzes)
        gradients = [{n: p.grad.clone() for n, p in each.flat.parameters.items()} for each in self.learners()]
        return (meta.pilot_loss, meta.quiz_loss), gradients, torch.get_rng_state()


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
