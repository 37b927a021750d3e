"""Which of a teacher's parameters train, that the gradient of those is what it was, and that exports are plain models."""

import copy
import re
import sys
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from safetensors import safe_open
from scenes import Scene, difference, network, words
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    AutoModelForSequenceClassification,
    XLMConfig,
    XLMForSequenceClassification,
)

from engine.errors import UserError
from engine.meta.strategies.double_backward import double_backward
from engine.meta.strategies.exact import exact
from engine.models.checkpointing import checkpointed
from engine.models.teacher_params import Choice, describe, merged, parse, restrict

TOLERANCE = 1e-12  # float64, the same operations but for what is left out
FLOAT32 = {"rtol": 2e-6, "atol": 1e-6}  # x W + (x A) B beside x (W + A B), logits of about 1
FAMILIES = ("bert", "distilbert", "roberta")
LAYERS = {f: f"{f}.{'transformer' if f == 'distilbert' else 'encoder'}.layer" for f in FAMILIES}
HEADS = {
    "bert": {"bert.pooler.dense", "classifier"},
    "distilbert": {"pre_classifier", "classifier"},
    "roberta": {"classifier.dense", "classifier.out_proj"},
}
CHOICES = ("all", "last-1", "last-2", "head", "lora:2")


@pytest.fixture(autouse=True)
def math_attention():
    with sdpa_kernel(SDPBackend.MATH):
        yield


def teacher(family, layers=3):
    net = network(family, 3, 0, layers=layers)
    net.module.eval()
    return net


def trainable(module):
    return [n for n, p in module.named_parameters() if p.requires_grad]


def train_adapters(module, seed=0):
    """B away from zero, so that the adapters count."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if ".lora_B." in name:
                p += 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)


def logits(module, family):
    return module(**words(family, 3)).logits


# The flag


def test_parse():
    assert [parse(given) for given in ("all", "head")] == [Choice("all"), Choice("head")]
    assert parse("last-12") == Choice("last", 12) and parse("lora:8") == Choice("lora", 8)


@pytest.mark.parametrize(
    "given", ["", "none", "ALL", "last", "last-0", "last--1", "last-1.5", "last-02", "lora", "lora:", "lora:0", "lora-8", "head "]
)  # fmt: skip
def test_parse_refuses(given):
    message = f"--teacher-params is {given!r}; it can be all, last-N (N layers, 1 or more), head, or lora:R"
    with pytest.raises(UserError, match=re.escape(message)):
        parse(given)


@pytest.mark.parametrize("use", [parse, partial(restrict, nn.Linear(2, 2))])
def test_peft_is_missing(monkeypatch, use):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        UserError, match=r"--teacher-params lora:8 needs .* peft.*pip install 'metadistil-engine\[lora\]'"
    ):
        use("lora:8")
    assert parse("last-2") == Choice("last", 2)


PLAIN = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
NO_PROJECTIONS = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2)]), "head": nn.Linear(2, 2)})
ALBERT = AlbertForSequenceClassification(  # which runs one layer over and over
    AlbertConfig(hidden_size=8, embedding_size=8, intermediate_size=16, num_attention_heads=2, vocab_size=20)
)
XLM = XLMForSequenceClassification(XLMConfig(vocab_size=20, emb_dim=8, n_layers=2, n_heads=2))
UNFIT = [
    ("last-4", "bert", r"is last-4, but the bert teacher has 3 layers; choose last-3 or fewer"),
    ("lora:9", "bert", r"is lora:9, but .* the bert teacher have rank 8 at the most"),
    ("last-2", ALBERT, "is last-2, but the albert teacher has 1 layers"),
    ("last-1", XLM, "last-1 does not fit the xlm teacher, whose layers are not modules of their own"),
    # no classifier, so that no record says where its layers stand
    *((choice, ALBERT.albert, f"{choice} does not know the layers of the albert teacher") for choice in CHOICES[1:]),
    ("head", PLAIN, "head leaves nothing to train in a teacher of the class Sequential"),
    ("lora:1", NO_PROJECTIONS, "lora:1 finds no query and value"),
]


@pytest.mark.parametrize(("choice", "module", "message"), UNFIT)
def test_what_does_not_fit_the_teacher(choice, module, message):
    module = teacher(module).module if module == "bert" else module
    with pytest.raises(UserError, match=f"^--teacher-params {message}"):
        restrict(module, choice)
    assert all(p.requires_grad for p in module.parameters())
    assert restrict(module, "all") is module


# What trains


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_trains(family, choice):
    """Logits, configuration, mode and random state stay."""
    module = teacher(family).module
    names, before, config = trainable(module), logits(module, family), module.config.to_dict()
    torch.manual_seed(4)
    state = torch.get_rng_state()
    assert restrict(module, choice, seed=7) is module
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(logits(module, family), before)
    assert module.config.to_dict() == config and not any(m.training for m in module.modules())
    assert {p.dtype for p in module.parameters()} == {torch.float64}
    found = [n for n in trainable(module) if ".lora_" not in n]
    layers = [f"{LAYERS[family]}.{i}." for i in range(3)][-int(choice[-1]) :] if choice.startswith("last") else []
    head = [n for n in names if n.rpartition(".")[0] in HEADS[family] or any(map(n.startswith, layers))]
    assert found == (names if choice == "all" else head) and len(head) == 4 + 16 * len(layers)
    adapters = {n.rpartition(".")[0]: p.shape for n, p in module.named_parameters() if ".lora_" in n}
    query, value = ("q_lin", "v_lin") if family == "distilbert" else ("self.query", "self.value")
    assert adapters == {
        f"{LAYERS[family]}.{i}.attention.{p}.lora_{ab}.default": shape
        for i in range(3 if "lora" in choice else 0)
        for p in (query, value)
        for ab, shape in (("A", (2, 8)), ("B", (8, 2)))
    }


def test_the_seed_fixes_the_adapters():
    weights = [restrict(teacher("bert").module, "lora:2", seed=s).state_dict() for s in (0, 0, 1)]
    same = [all(torch.equal(weights[0][k], other[k]) for k in other) for other in weights[1:]]
    assert same == [True, False]


def test_what_was_frozen_stays_frozen():
    module = teacher("bert").module
    module.classifier.requires_grad_(False)
    restrict(module, "head")
    assert trainable(module) == ["bert.pooler.dense.weight", "bert.pooler.dense.bias"]
    assert describe(module) == "trains 72 of 2,219 parameters (2 of 57 tensors)"


@pytest.mark.parametrize(
    ("choice", "expected"),
    [("all", "2,219 of 2,219 parameters (all)"), ("last-2", "1,299 of 2,219 parameters (last 2 layers and head)"),
     ("last-1", "699 of 2,219 parameters (last layer and head)"), ("head", "99 of 2,219 parameters (head)"),
     ("lora:2", "291 of 2,411 parameters (adapters of rank 2 and head)")],
)  # fmt: skip
def test_describe(choice, expected):
    assert describe(restrict(teacher("bert").module, choice)) == f"trains {expected}"


# The meta-gradient


@pytest.mark.parametrize("choice", CHOICES[1:])
@pytest.mark.parametrize(
    ("family", "strategy"), [("bert", exact), ("distilbert", double_backward), ("roberta", double_backward)]
)
def test_the_meta_gradient_is_that_of_the_whole(family, choice, strategy):
    """That of an adapter follows from its projection's, W + B A at scale 1; checkpoints change nothing."""
    scene, adapted = Scene("distilbert", [family, "bert"], pilots=2), teacher(family)
    train_adapters(restrict(adapted.module, choice))
    scene.teachers[0] = teacher(family)
    with merged(adapted.module) as module:
        scene.teachers[0].module.load_state_dict(module.state_dict())
    _, (whole, other), _ = scene.run(strategy)
    scale = max(g.abs().max() for g in whole.values())

    def close(a, b):
        return (a - b).abs().max() < TOLERANCE * scale

    scene.teachers[0] = adapted
    parameters = dict(adapted.module.named_parameters())
    frozen = [p for p in parameters.values() if not p.requires_grad]
    for context in (nullcontext, checkpointed):
        with context(adapted.module):
            _, (got, other_after), _ = scene.run(strategy)
        assert all(close(other[n], other_after[n]) for n in other)
        assert list(got) == trainable(adapted.module) and set(got) != set(whole)
        assert frozen and all(p.grad is None for p in frozen)
        for name, gradient in got.items():
            projection, adapter, _ = name.partition(".lora_")
            if not adapter:
                assert close(gradient, whole[name])
            elif ".lora_B." in name:
                a = parameters[name.replace(".lora_B.", ".lora_A.")]
                assert close(gradient, whole[f"{projection}.weight"] @ a.T)
            else:
                b = parameters[name.replace(".lora_A.", ".lora_B.")]
                assert close(gradient, b.T @ whole[f"{projection}.weight"])
        assert sum(g.abs().max() > 1e-6 * scale for g in got.values()) >= 4


@pytest.mark.parametrize("choice", ["last-1", "lora:2"])
def test_in_bf16(choice):
    """8 bits, as in test_strategies; frozen weights are in bf16 too."""
    found = []
    for precision in ("fp32", "bf16"):
        scene = Scene("bert", ["roberta"], dtype=torch.float32, pilot_lr=0.05)
        train_adapters(restrict(scene.teachers[0].module, choice))
        for each in (scene.student, *scene.teachers):
            each.precision = precision
        found.append(scene.run(exact)[1])
    assert difference(found[1], found[0]) < 0.1


# Export


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("choice", CHOICES)
def test_export_is_a_plain_model(family, choice, tmp_path):
    """Adapters and weights come back as they were, also after an error."""
    plain = teacher(family).module.float()
    module = restrict(copy.deepcopy(plain), choice)
    train_adapters(module)
    expected, state, names = logits(module, family), copy.deepcopy(module.state_dict()), trainable(module)
    with pytest.raises(ZeroDivisionError), merged(module) as to_save:
        assert to_save is module and list(module.state_dict()) == list(plain.state_dict())
        torch.testing.assert_close(logits(module, family), expected, **FLOAT32)
        module.save_pretrained(tmp_path)
        raise ZeroDivisionError
    assert list(module.state_dict()) == list(state)
    assert all(torch.equal(module.state_dict()[n], state[n]) for n in state)
    assert trainable(module) == names and torch.equal(logits(module, family), expected)
    logits(module, family).sum().backward()
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)

    assert {f.name for f in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(plain.state_dict())
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    assert type(loaded) is type(plain)
    torch.testing.assert_close(logits(loaded, family), expected, **FLOAT32)
    assert ("lora" in choice) is not torch.equal(logits(plain, family), expected), "the adapters count"
