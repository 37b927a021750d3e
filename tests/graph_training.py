"""Small trainings whose steps are captured, and the same ones eager, on any device."""

from functools import partial

import torch
from small_models import transformer

from engine.batch import Batch
from engine.losses.layer_map import freeze_unmapped, layer_map
from engine.losses.objectives import Objective
from engine.losses.teacher_weights import TeacherWeights
from engine.meta.meta_step import MetaStep
from engine.meta.reptile import Reptile
from engine.methods import METHODS, State
from engine.models.cuda_graph import StepGraphs
from engine.models.learner import Learner
from engine.models.network import Encoder, Network

STEPS, WORDS, CLASSES = 10, 50, 3
small = partial(transformer, width=16, classes=CLASSES, words=WORDS, spread=0.02)


def batch(seed, length):
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, WORDS, (4, length), generator=random)
    lengths = torch.randint(1, length + 1, (4, 1), generator=random)
    inputs = {"input_ids": ids, "attention_mask": (torch.arange(length) < lengths).long()}
    return Batch(torch.randint(CLASSES, (4,), generator=random), {"words": inputs})


def draws(pilots=1):
    """Batches of two lengths and quiz batches of one, in turns: four shapes would be too many for so few steps."""
    return [
        ([batch(100 * i + j, 5 if i % 3 else 7) for j in range(pilots)], [batch(1000 + i, 6)]) for i in range(STEPS)
    ]


class Training:
    """A student, its teachers and a method, from the same start every time."""

    def __init__(
        self, method, capture=None, mode="auto", precision="fp32", pilots=1, weights=None, device="cpu", compiled=None,
        soft_loss="kl", **settings,
    ):  # fmt: skip
        self.device, self.pilots, self.said = torch.device(device), pilots, []

        def rate(value):  # a device scalar, as on a GPU: a Python number would be captured
            return torch.tensor(value, device=device)

        network, *teachers = (
            Encoder(f"model {k}", small("bert" if k else "distilbert", k).to(device), "words", precision, compiled)
            for k in range(3)
        )
        common = {"warmup_ratio": 0.3, "weight_decay": 0.1, "max_grad_norm": 0.05}
        student = Learner.adamw(network, lr=rate(1e-2), steps=STEPS * pilots, **common)
        self.state = State(student, Objective(soft_loss, 3.0, 0.6))
        if method == "kd":
            self.state.teachers = teachers
            for teacher in teachers:
                teacher.flatten()
        if METHODS[method].teachers == "learning":
            if method == "reptile":
                maps = [layer_map(network.module, t.module, "skip") for t in teachers]
                for teacher, found in zip(teachers, maps, strict=True):
                    freeze_unmapped(teacher.module, found)
                settings["strategy"] = Reptile([found.sources for found in maps])
            learners = [Learner.adamw(t, lr=rate(1e-2), steps=STEPS, **common) for t in teachers]
            module = TeacherWeights.of(weights, 2, network.flat.weights)
            wrapped = None if module is None else Network(module)
            if weights == "learned":
                wrapped = Learner.constant(wrapped, rate(0.05))
            self.state.meta_step = MetaStep(
                student, learners, self.state.objective, teacher_weights=wrapped, pilot_lr=0.3, **settings
            )
        step = METHODS[method].step
        self.graphs = StepGraphs(
            lambda batches, quizzes: step(self.state, batches, quizzes), self.device, mode, capture=capture,
            say=self.said.append, forget=self.state.forget,
        )  # fmt: skip

    def run(self, steps=STEPS):
        torch.manual_seed(7)
        values = []
        for batches, quizzes in draws(self.pilots)[:steps]:
            values.append(self.graphs(*([b.to(self.device) for b in each] for each in (batches, quizzes))))
            self.state.advance(len(batches))
        return values

    def tensors(self):
        """Everything that a step may change."""
        found = [torch.cuda.get_rng_state() if self.device.type == "cuda" else torch.get_rng_state()]
        for learner in self.state.learners():
            flat = learner.network.flat
            found += [flat.weights, flat.gradients, *learner.network.module.buffers(), learner.skipped]
            found += [] if flat.shadow is None else [flat.shadow]
            found += [v for entries in learner.optimizer.state.values() for v in entries.values()]
        return [t for t in found if t is not None]


METHODS_AND_SETTINGS = {
    "finetune": ("finetune", {}),
    "kd": ("kd", {}),
    "kd bf16": ("kd", {"precision": "bf16"}),
    "metadistil": ("metadistil", {}),
    "metadistil bf16": ("metadistil", {"precision": "bf16"}),
    "metadistil learned weights": ("metadistil", {"weights": "learned"}),
    "metadistil adamw pilot": ("metadistil", {"pilot_optimizer": "adamw"}),
    "metadistil independent masks": ("metadistil", {"independent_masks": True}),
    "metadistil first order": ("metadistil", {"strategy": "first_order"}),
    "metadistil double backward": ("metadistil", {"strategy": "double_backward", "independent_masks": True}),
    "metadistil checkpointing": ("metadistil", {"checkpointing": "teachers"}),
    "lgtm": ("lgtm", {"teacher_alpha": 0.4, "pilot_optimizer": "adamw"}),
    "reptile": ("reptile", {}),
    "reptile bf16": ("reptile", {"precision": "bf16"}),
}


DRAWN_AGAIN = {
    "two pilot steps": {"pilots": 2},
    "double backward": {"strategy": "double_backward"},
    "finite difference": {"strategy": "finite_difference"},
    "checkpointing of the student": {"checkpointing": "student"},
}


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.tensors(), other.tensors(), strict=True))


def as_eager(method, settings, capture=None, steps=STEPS, **more):
    """A training whose steps may be captured, after it has given bit for bit what eager steps give."""
    graphed, eager = Training(method, capture, **settings, **more), Training(method, mode="off", **settings, **more)
    for ours, theirs in zip(graphed.run(steps), eager.run(steps), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[n], theirs[n].to(ours[n].dtype)) for n in ours), (ours, theirs)
    assert same(graphed, eager)
    return graphed


def skip_what_is_not_finite(training):
    """One step of which every loss is NaN, by a logit of the teacher's, and one more after it."""
    training.run(8)
    student, teacher = training.state.student, training.state.meta_step.problem.teachers[0].module
    weights, moments = student.network.flat.weights, student.optimizer._moments[0]
    before, bias = [weights.clone(), moments.clone()], teacher.classifier.bias.data
    kept, inputs = bias[0].item(), [[b.to(training.device) for b in each] for each in draws()[1]]
    bias[0] = float("nan")
    values = training.graphs(*inputs)
    assert values["loss"].isnan() and not values["quiz_loss"].isfinite()
    assert torch.equal(weights, before[0]) and torch.equal(moments, before[1])
    bias[0] = kept
    training.graphs(*inputs)
    assert not torch.equal(weights, before[0]) and weights.isfinite().all()
    assert [learner.skipped.item() for learner in training.state.learners()] == [1, 1, 1]
