"""Meta-KD (methods 6): its steps against the written formulas in plain torch, and whole runs."""

import copy
import math
import signal

import pytest
import torch
import torch.nn.functional as F
from method_oracle import CLIP, DECAY, LR, TOLERANCE, WARMUP, Adam, apart
from run_helpers import (
    assert_as_if_nothing_had_happened,
    assert_same_models,
    flags,
    metrics,
    run_signalled,
    sentences,
    succeed,
    summary,
    table,
    weights,
)
from small_models import PAD, WORDS
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from engine.batch import Batch
from engine.losses.domain_head import DomainHead
from engine.losses.objectives import Objective
from engine.methods import METHODS, State
from engine.methods.common import meta_teacher
from engine.models.features import InnerStates, all_layers, attach
from engine.models.learner import Learner
from engine.models.network import Encoder
from engine.run.matching import Matching
from engine.train import main

CLASSES, DOMAINS, T, LAMBDA = 3, 3, 2.0, 0.5


def model(width, layers, seed, dropout=0.0):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=WORDS, num_labels=CLASSES, initializer_range=0.4, hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=layers, num_attention_heads=2, max_position_embeddings=16, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout, attn_implementation="eager",
    )  # fmt: skip
    return BertForSequenceClassification(config).double().eval()


def make_batch(seed, size=6, length=7):
    """The class is told by the first word, the domain by the second."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, length + 1, (size,), generator=generator)
    mask = (torch.arange(length) < lengths[:, None]).long()
    ids = torch.where(mask == 1, torch.randint(2, WORDS, (size, length), generator=generator), PAD["bert"])
    columns = {"domain": ids[:, 1] % DOMAINS, "typicality": torch.rand(size, generator=generator, dtype=torch.float64)}
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    return Batch(ids[:, 0] % CLASSES, {"own": inputs}, columns=columns)


def learner(network, steps):
    return Learner.adamw(network, lr=LR, steps=steps, warmup_ratio=WARMUP, weight_decay=DECAY, max_grad_norm=CLIP)


def rounds(step, state, batches):
    values = []
    for batch in batches:
        values.append(step(state, [batch], ()))
        state.advance(1)
    return values


def read(module, batch):
    """Logits, hidden states, and each example's mean state over its own tokens, by plain transformers."""
    extras = module._modules.pop("extras", None)
    out = module(**batch.inputs["own"], output_hidden_states=True)
    if extras is not None:
        module.extras = extras
    h = [out.hidden_states[-1][b, :n].mean(0) for b, n in enumerate(batch.inputs["own"]["attention_mask"].sum(1))]
    return out.logits, out.hidden_states, torch.stack(h)


# The meta-teacher


def teacher_step(adam, batch, shuffled):
    """mean_i t_i [CE_i + lambda DA_i]; reversed, what is in front of the classifier gets minus the gradient of DA where it
    is below that of a guess."""
    module, head, t = adam.module, adam.module.extras["domain"], batch.columns["typicality"]
    logits, _, h = read(module, batch)
    f = h + head.embedding[batch.columns["domain"]]
    d = head.out(torch.tanh(head.hidden(f)))
    domains = batch.columns["domain"]
    if shuffled:
        domains = domains[torch.rand(len(domains)).argsort()]
    task = -logits.log_softmax(-1)[range(len(t)), batch.labels]
    domain = -d.log_softmax(-1)[range(len(t)), domains]
    parameters = list(module.parameters())
    gradients = torch.autograd.grad((t * task).mean(), parameters, retain_graph=True, materialize_grads=True)
    of_domain = torch.autograd.grad((t * domain).mean(), parameters, retain_graph=True, materialize_grads=True)
    told = (domain < math.log(DOMAINS)).double()
    turned = torch.autograd.grad((t * domain * told).mean(), parameters, materialize_grads=True)
    classifier = {id(p) for p in [*head.hidden.parameters(), *head.out.parameters()]}
    for p, g, straight, against in zip(parameters, gradients, of_domain, turned, strict=True):
        p.grad = g + LAMBDA * (straight if shuffled or id(p) in classifier else -against)
    adam.step()
    return (t * (task + LAMBDA * domain)).mean().detach(), told


@pytest.mark.parametrize("micro_batch", [None, 4])
@pytest.mark.parametrize("shuffled", [False, True], ids=["reversal", "shuffled"])
def test_the_meta_teachers_step(shuffled, micro_batch):
    if shuffled and micro_batch:
        micro_batch = 6  # domains are shuffled within what goes through at once
    network = Encoder("teacher", model(8, 2, 0), "own")
    attach(network.module, "domain", DomainHead(8, DOMAINS, not shuffled, 0).double())
    copied = Adam(copy.deepcopy(network.module), LR, 4)
    batches = [make_batch(k) for k in range(4)]
    state = State(learner(network, 4), Objective(), micro_batch=micro_batch)
    with network.giving(InnerStates(domain="logits")):
        torch.manual_seed(3)
        values = rounds(meta_teacher.step(LAMBDA, shuffled), state, batches)
    torch.manual_seed(3)
    seen = []
    for batch, value in zip(batches, values, strict=True):
        loss, told = teacher_step(copied, batch, shuffled)
        torch.testing.assert_close(value["loss"], loss, rtol=1e-9, atol=0)
        seen.append(told)
    assert apart(network.module, copied.module) < TOLERANCE
    assert 0 < torch.cat(seen).mean() < 1  # some are told and some are not


# The student


class Lesson:
    """A student of 8 numbers and 2 layers, teachers of 12 and 4 with dropout, left in train mode as their training does."""

    def __init__(self, teachers=1, rounds=3, weights=None):
        self.student = Encoder("student", model(8, 2, 0), "own")
        self.teachers = [Encoder(f"teacher {k}", model(12, 4, k + 1, dropout=0.4), "own") for k in range(teachers)]
        for k, teacher in enumerate(self.teachers):
            attach(teacher.module, "domain", DomainHead(12, DOMAINS, True, k).double())
            teacher.module.train()
        own, theirs = all_layers(2, 4, "skip")
        own, theirs = (InnerStates(hidden=i.hidden, attention=i.attention, domain="feature") for i in (own, theirs))
        self.matching = Matching(own, [theirs] * teachers, 0)
        self.batches = [make_batch(k) for k in range(rounds)]
        self.weights = weights
        for batch in self.batches:
            batch.columns["expertise"] = 0.5 + batch.columns["typicality"]

    def state(self, objective, micro_batch):
        weights = None if self.weights is None else torch.tensor(self.weights, dtype=torch.float64)
        return State(learner(self.student, len(self.batches)), objective, teachers=self.teachers, weights=weights,
                     by_example="expertise", micro_batch=micro_batch)  # fmt: skip


def scores(module, hidden, i):
    """q k / sqrt(d) of encoder layer i, [B, heads, L, L]."""
    attention, x = module.bert.encoder.layer[i].attention.self, hidden[i]
    q, k = (layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (attention.query, attention.key))
    return q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5


def feature_step(adam, lesson, batch, w):
    """mean_i w_i sum_k u_k [attention + hidden + domain], teacher by teacher and example by example."""
    student, extras = adam.module, adam.module.extras
    _, states, h = read(student, batch)
    u = lesson.weights or [1 / len(lesson.teachers)] * len(lesson.teachers)
    total = 0.0
    for share, teacher in zip(u, lesson.teachers, strict=True):
        module = copy.deepcopy(teacher.module).eval()
        with torch.no_grad():
            _, theirs, their_h = read(module, batch)
        for b, n in enumerate(batch.inputs["own"]["attention_mask"].sum(1).tolist()):
            found = 0.0
            for i, t in zip((0, 1, 2), (0, 2, 4), strict=True):
                projected = F.linear(states[i][b, :n], extras["hidden"].weight, extras["hidden"].bias)
                found = found + (projected - theirs[t][b, :n]).square().mean()
                if i:
                    ours, others = (
                        scores(m, s, j - 1)[b, :, :n, :n] for m, s, j in ((student, states, i), (module, theirs, t))
                    )
                    found = found + (ours - others.detach()).square().mean()
            layer = extras["domain"].layer
            f = their_h[b] + module.extras["domain"].embedding[batch.columns["domain"][b]].detach()
            found = found + (F.linear(h[b], layer.weight, layer.bias) - f).square().mean()
            total = total + share * w[b] * found / len(w)
    total.backward()
    for p in student.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # the head's, which AdamW decays all the same
    adam.step()
    return total.detach()


@pytest.mark.parametrize("micro_batch", [None, 4])
@pytest.mark.parametrize(("teachers", "weights"), [(1, None), (2, [0.3, 0.7])])
def test_the_students_step_on_features(teachers, weights, micro_batch):
    """Every example with its own weight, and teachers in eval mode although they were left training."""
    lesson = Lesson(teachers, weights=weights)
    objective = Objective("kl", T, 1.0, feature_loss="tinybert", beta=1.0, on_logits=False)
    with lesson.matching.between(lesson.student, lesson.teachers):
        lesson.student.module.double()
        copied = Adam(copy.deepcopy(lesson.student.module), LR, 3)
        before = [copy.deepcopy(t.module) for t in lesson.teachers]
        values = rounds(METHODS["metakd"].step, lesson.state(objective, micro_batch), lesson.batches)
        for batch, value in zip(lesson.batches, values, strict=True):
            w = batch.columns["expertise"].tolist()
            torch.testing.assert_close(value["loss"], feature_step(copied, lesson, batch, w), rtol=1e-9, atol=0)
        assert apart(lesson.student.module, copied.module) < TOLERANCE
        assert not torch.equal(lesson.student.module.extras["hidden"].weight, torch.eye(12, 8))
    for teacher, module in zip(lesson.teachers, before, strict=True):
        assert apart(teacher.module, module) == 0 and teacher.module.training
        assert all(p.grad is None for p in teacher.module.parameters())


# Whole runs

LETTERS = "abc"


@pytest.fixture(scope="module")
def domains(tmp_path_factory, cache):
    rows = [(LETTERS[i % 3], text, label) for i, (text, label) in enumerate(sentences(150))]
    return table(tmp_path_factory.mktemp("domains") / "d.tsv", rows, "kind\tsentence\tlabel")


def run(data, output, **changes):
    return succeed(data, output, **{"method": "metakd", "domain_column": "kind"} | changes)


@pytest.fixture(scope="module")
def weighed():
    """Of every loss of `whole`: whether it compares logits, and the weights of its examples."""
    return []


@pytest.fixture(scope="module")
def whole(domains, weighed, tmp_path_factory):
    slopes = Objective.slopes

    def recorded(self, student, teachers, labels, weights=None, by_example=None):
        weighed.append((self.on_logits, by_example))
        return slopes(self, student, teachers, labels, weights, by_example)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Objective, "slopes", recorded)
        return run(domains, tmp_path_factory.mktemp("runs") / "whole")


def test_a_run(whole):
    found = summary(whole)
    assert list(found["phases"]) == ["prepare bert", "features", "metakd"]
    assert all(phase["steps"] == 4 for phase in found["phases"].values())
    (teacher,) = found["teachers"]
    for entry in (teacher, found["student"]):
        for split in ("validation", "test"):
            each = entry["by_domain"][split]
            assert list(each) == list(LETTERS)
            mean = sum(each[d]["accuracy"] for d in LETTERS) / 3  # 4 of 12 examples each
            assert mean == pytest.approx(entry["metrics"][split]["accuracy"], abs=1e-5)
    for folder in (whole / "student", whole / "teachers" / "bert"):
        assert not any("extras" in name for name in weights(folder))
        assert AutoModelForSequenceClassification.from_pretrained(folder).config.num_labels == 2
    features = [line["loss"] for line in metrics(whole) if line["phase"] == "features" and "loss" in line]
    assert features and all(loss > 0 for loss in features)
    assert not any("validation/accuracy" in line for line in metrics(whole) if line["phase"] == "features")


RUNS = {  # flags -> examples of the student's training, teachers, steps of a teacher's preparation
    "others": ({"target_domain": "b", "teacher_domains": "others"}, 21, ["bert"], 3),
    "each": ({"target_domain": "b", "teacher_domains": "each", "method": "kd"}, 21, [f"bert-{d}" for d in LETTERS], 2),
    "multitask": ({"method": "kd", "prepare_method": "multitask"}, 64, ["bert"], 4),
    "a small part": ({"target_domain": "b", "target_fraction": 0.3, "domain_loss": "shuffled", "micro_batch_size": 5},
                     7, ["bert"], 4),
    "two teachers": ({"teachers": "bert,bert2", "teacher_weights": "1,3", "train_size": 30, "feature_epochs": 0}, 30,
                     ["bert", "bert2"], 2),
    "kept answers": ({"cache_teacher_logits": True, "domain_loss": "shuffled"}, 64, ["bert"], 4),
    "tinybert": ({"method": "kd", "teacher_domains": "target", "target_domain": "b", "feature_loss": "tinybert",
                  "feature_epochs": 2}, 21, ["bert"], 2),
    "metadistil": ({"method": "metadistil", "feature_loss": "tinybert", "prepare_method": "meta", "domain_weight": 0.1},
                   64, ["bert"], 4),
    "no features": ({"feature_loss": "none", "target_domain": "a", "prototype_own": 0.9}, 22, ["bert"], 4),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_settings(name, domains, whole, tmp_path):
    changes, examples, teachers, steps = RUNS[name]
    found = summary(run(domains, tmp_path / "run", **changes))
    assert found["sizes"]["train"] == examples and [t["name"] for t in found["teachers"]] == teachers
    shown = changes.get("target_domain", "all")
    assert list(found["student"]["by_domain"]["test"]) == (list(LETTERS) if shown == "all" else [shown])
    phases, method, batches = found["phases"], changes.get("method", "metakd"), -(-examples // 16)
    assert all(phases[f"prepare {t}"]["steps"] == steps for t in teachers)
    epochs = changes.get("feature_epochs", 1 if method == "metakd" and name != "no features" else 0)
    assert phases.get("features", {"steps": 0})["steps"] == epochs * batches and phases[method]["steps"] == batches
    if name == "multitask":
        config = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "teachers" / "bert").config
        assert config.num_labels == 6 and config.id2label[3] == "b: 1"
    if name in ("kept answers", "metadistil", "no features"):  # another way to prepare it is another teacher
        assert found["teachers"][0]["origin"] == "fine-tuned"
        one, two = (weights(each / "teachers" / "bert") for each in (whole, tmp_path / "run"))
        assert not all(torch.equal(one[n], two[n]) for n in one)
    if name == "metadistil":
        assert not any("extras" in n for f in ("student", "teachers/bert") for n in weights(tmp_path / "run" / f))


def test_the_teacher_is_taken_from_the_cache(domains, whole, tmp_path):
    """With the states that its prototypes are of."""
    again = run(domains, tmp_path / "again")
    assert summary(again)["teachers"][0]["origin"] == "reused" and "prepare bert" in summary(again)["phases"]
    assert_same_models(whole, again)


def test_every_example_of_a_batch_has_its_own_weight(whole, weighed):
    """In the phase on features, and no weights where there are none to compare."""
    on_features = [w for on_logits, w in weighed if not on_logits]
    assert len(on_features) == 4 and all(w.unique().numel() > 1 and (w > 0).all() for w in on_features)
    assert all(w is None for on_logits, w in weighed if on_logits)


@pytest.mark.slow
def test_kill_and_resume(domains, tmp_path, monkeypatch, capsys):
    settings = {"method": "metakd", "domain_column": "kind", "target_domain": "b", "feature_epochs": 8, "max_steps": 20,
                "prepare_epochs": 3, "log_steps": 1, "checkpoint_steps": 2}  # fmt: skip
    monkeypatch.setenv("METADISTIL_CACHE", str(tmp_path / "cache of the whole"))
    whole = succeed(domains, tmp_path / "whole", **settings)
    monkeypatch.setenv("METADISTIL_CACHE", str(tmp_path / "cache"))
    killed = run_signalled(flags(domains, tmp_path / "run", **settings), "features", 7, signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL
    capsys.readouterr()
    assert main(["--resume", "--output", str(tmp_path / "run")]) == 0
    assert "Resuming 'features' after step" in capsys.readouterr().out
    assert_as_if_nothing_had_happened(tmp_path / "run", whole)
