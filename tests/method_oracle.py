"""The published updates written out with autograd, AdamW and clipping, and small states to hold them against."""

import copy
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from engine.batch import Batch
from engine.losses.objectives import Objective
from engine.losses.teacher_weights import TeacherWeights
from engine.meta.meta_step import MetaStep
from engine.meta.reptile import Reptile
from engine.methods import METHODS, State
from engine.models.learner import Learner
from engine.models.network import Encoder, Network

# Largest difference of a weight. Adam divides by the gradient's own size, so that rounding in a gradient near its
# epsilon (1e-8) is multiplied by lr / epsilon: 1e-16 becomes 1e-10.
TOLERANCE = 1e-10
LR, TEACHER_LR, PILOT_LR, WEIGHTS_LR, DECAY, CLIP, WARMUP = 0.02, 0.01, 0.3, 0.05, 0.1, 0.05, 0.4
T, ALPHA, WORDS, CLASSES = 3.0, 0.6, 12, 3
GIVEN = [0.7, 0.2, 0.1]
TEACHER_ALPHA, LGTM_PILOT_LR = 0.4, 0.03


class Toy(nn.Module):
    """A bag of words with everything a method could get wrong: dropout, a batch norm's buffers, biases, a frozen weight."""

    def __init__(self, width, seed, dropout=0.3, norm=True):
        super().__init__()
        torch.manual_seed(seed)
        self.words = nn.Embedding(WORDS, width)
        self.hidden = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(width, CLASSES)
        self.scale = nn.Parameter(torch.tensor(0.9), requires_grad=False)

    def forward(self, input_ids, attention_mask):
        mask = attention_mask[..., None]  # [B, L, 1]
        mean = (self.words(input_ids) * mask).sum(1) / mask.sum(1)
        hidden = self.norm(torch.tanh(self.hidden(mean)))
        return SimpleNamespace(logits=self.out(self.dropout(hidden)) * self.scale)


def make_batch(seed, size=6):
    """The label is a function of the first word."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(WORDS, (size, 3), generator=generator)
    lengths = torch.randint(1, 4, (size, 1), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": (torch.arange(3) < lengths).long(), "token_type_ids": ids * 0}
    return Batch(ids[:, 0] % CLASSES, {"words": inputs})


def quiz(number):
    return [make_batch(1000 + 2 * number + i) for i in range(2)]


class Setting:
    """A state, and copies of its models from before. `weights` of the teachers are None, "given" or "learned"."""

    def __init__(self, method, teachers=2, rounds=3, size=1, strategy="exact", weights=None, independent_masks=False,
                 norm=True):  # fmt: skip
        student = Encoder("student", Toy(5, seed=0, norm=norm).double(), "words")
        width = 5 if method == "reptile" else 6  # its models are of one width
        modules = [Toy(width, seed=k + 1, norm=False).double() for k in range(teachers)]
        networks = [Encoder(f"teacher{k}", module, "words") for k, module in enumerate(modules)]
        for network in (student, *networks):
            network.table_rows = 1  # as if there were thousands of words
        self.batches = [[make_batch(10 * r + j) for j in range(size)] for r in range(rounds)]
        common = {"warmup_ratio": WARMUP, "weight_decay": DECAY, "max_grad_norm": CLIP}
        self.student_steps, self.teacher_steps = rounds * size, rounds
        objective = Objective("kl", T, ALPHA)
        self.state = State(Learner.adamw(student, lr=LR, steps=self.student_steps, **common), objective)
        assert [t.name for t in student.flat.tables] == ["words.weight"]
        given = GIVEN[:teachers] if weights == "given" else weights
        module = TeacherWeights.of(given, teachers, student.flat.weights)
        self.quizzed = []
        if METHODS[method].teachers == "frozen":
            self.state.teachers, self.state.weights = networks, module and module().detach()
        if METHODS[method].teachers == "learning":
            learners = [Learner.adamw(n, lr=TEACHER_LR, steps=self.teacher_steps, **common) for n in networks]
            wrapped = module and Network(module)
            if weights == "learned":
                wrapped = Learner.constant(wrapped, WEIGHTS_LR)
            if method == "reptile":
                strategy = Reptile([{name: [name] for name in network.trainable()} for network in networks])
            more = {"teacher_alpha": TEACHER_ALPHA, "pilot_optimizer": "adamw"} if method == "lgtm" else {}
            self.state.meta_step = MetaStep(
                self.state.student, learners, objective, teacher_weights=wrapped, strategy=strategy,
                pilot_lr=LGTM_PILOT_LR if method == "lgtm" else PILOT_LR, independent_masks=independent_masks, **more,
            )  # fmt: skip
            if METHODS[method].learn_from == "quiz":
                self.state.quiz = lambda number: self.quizzed.append(number) or quiz(number)
        self.step = METHODS[method].step
        self.student, self.teachers = student.module, [n.module for n in networks]
        self.copies = copy.deepcopy([student.module, *self.teachers])
        self.weights = copy.deepcopy(module)

    def run(self):
        torch.manual_seed(7)
        values = []
        for batches in self.batches:
            values.append(self.step(self.state, batches, self.state.draw()))
            self.state.advance(len(batches))
        return values


class Adam:
    """torch's AdamW with its schedule written out: a round's rate, decay on matrices only, clipping before."""

    def __init__(self, module, lr, steps, a_round=1):
        self.module, self.lr, self.steps, self.a_round, self.taken = module, lr, steps, a_round, 0
        ps = [p for p in module.parameters() if p.requires_grad]
        groups = [{"params": [p for p in ps if p.ndim >= 2], "weight_decay": DECAY},
                  {"params": [p for p in ps if p.ndim < 2], "weight_decay": 0.0}]  # fmt: skip
        self.optimizer = torch.optim.AdamW(groups, lr=lr, foreach=False, fused=False)

    def step(self):
        warmup = int(WARMUP * self.steps)
        t = self.taken - self.taken % self.a_round
        rate = (t + 1) / (warmup + 1) if t < warmup else (self.steps - t) / (self.steps - warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * rate
        nn.utils.clip_grad_norm_(self.module.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.taken += 1


def read(module, batch, weights=None):
    inputs = {k: v for k, v in batch.inputs["words"].items() if k != "token_type_ids"}
    out = module(**inputs) if weights is None else functional_call(module, weights, (), inputs)
    return out.logits


def mean(logits, weights):
    """`weights` is None or gives what is normalised here: w = softmax of logarithms."""
    if weights is None:
        return sum(logits) / len(logits)
    w = weights.log.exp() / weights.log.exp().sum()
    return sum(w[k] * z for k, z in enumerate(logits))


def distillation(student, teachers, labels, weights=None):
    p = F.softmax(mean(teachers, weights) / T, -1)
    log_q = F.log_softmax(student / T, -1)
    kl = (p * (p.log() - log_q)).sum() / len(labels)
    return ALPHA * T**2 * kl + (1 - ALPHA) * F.cross_entropy(student, labels)


def real_step(adam, teachers, batch, weights=None, masks=None):
    """With the dropout masks drawn from the generator's state `masks`, and the generator left as it was, or with new ones."""
    adam.module.train()
    for teacher in teachers:
        teacher.eval()
    with torch.no_grad():
        taught = mean([read(t, batch) for t in teachers], weights)
    before = torch.get_rng_state()
    if masks is not None:
        torch.set_rng_state(masks)
    student = read(adam.module, batch)
    if masks is not None:
        torch.set_rng_state(before)
    loss = distillation(student, [taught], batch.labels)
    loss.backward()
    adam.step()
    return loss.detach()


def meta_gradient(student, teachers, batches, quizzes, weights=None):
    """dq/dtheta left in the teachers' grad, dq/dlog w in that of weights that learn, by autograd through the pilot.

    The student's buffers are taken back. Returns pilot loss, quiz loss and the generator's states before each pilot.
    """
    buffers = copy.deepcopy(dict(student.named_buffers()))
    student.train()
    for teacher in teachers:
        teacher.eval()
    phi = {n: p for n, p in student.named_parameters() if p.requires_grad}
    pilot_losses, masks = [], []
    for batch in batches:
        logits = [read(t, batch) for t in teachers]
        masks.append(torch.get_rng_state())
        loss = distillation(read(student, batch, phi), logits, batch.labels, weights)
        gradients = torch.autograd.grad(loss, list(phi.values()), create_graph=True)
        phi = {n: w - PILOT_LR * g for (n, w), g in zip(phi.items(), gradients, strict=True)}
        pilot_losses.append(loss.detach())
    student.eval()
    q = sum(F.cross_entropy(read(student, b, phi), b.labels) for b in quizzes) / len(quizzes)
    for learning in [*teachers, *([] if weights is None else [weights])]:
        ps = [p for p in learning.parameters() if p.requires_grad]
        for p, g in zip(ps, torch.autograd.grad(q, ps, retain_graph=True) if ps else (), strict=True):
            p.grad = g
    for name, buffer in student.named_buffers():
        buffer.copy_(buffers[name])
    return sum(pilot_losses) / len(pilot_losses), q.detach(), masks


def apart(module, other):
    """Largest difference over weights and buffers."""
    theirs = dict([*other.named_parameters(), *other.named_buffers()])
    mine = [*module.named_parameters(), *module.named_buffers()]
    return max((t - theirs[n]).abs().max().item() for n, t in mine)


def schedule_positions(state):
    return [learner.schedule.last_epoch for learner in state.learners()]
