"""Which of a teacher's parameters train, that the gradient of those is what it was, and that exports are plain models."""

import copy
import re
import sys
from functools import partial

import pytest
import torch
from safetensors import safe_open
from scenes import Scene, batch, encoding, network
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AlbertConfig, AlbertForSequenceClassification, AutoModelForSequenceClassification

from engine.errors import UserError
from engine.meta.strategies.double_backward import double_backward
from engine.meta.strategies.exact import exact
from engine.models.checkpointing import checkpointed
from engine.models.teacher_params import Choice, describe, merged, parse, restrict

TOLERANCE = 1e-12  # float64, the same operations but for what is left out
FLOAT32 = {"rtol": 2e-6, "atol": 1e-6}  # x W + (x A) B beside x (W + A B), logits of about 1
FAMILIES = ("bert", "distilbert", "roberta")
LAYERS = {
    "bert": "bert.encoder.layer",
    "distilbert": "distilbert.transformer.layer",
    "roberta": "roberta.encoder.layer",
}
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


@pytest.fixture(autouse=True)
def peft_where_it_is_needed(request):
    if "lora" in str(getattr(request.node, "callspec", None) and request.node.callspec.params):
        pytest.importorskip("peft")


def teacher(family, layers=3):
    net = network(family, 3, 0, layers=layers)
    net.module.eval()
    return net


def logits(module, family, seed=3):
    inputs = dict(batch(seed, 3).inputs[encoding(family)])
    if family != "bert":
        inputs.pop("token_type_ids", None)
    return module(**inputs).logits


def trainable(module):
    return [n for n, p in module.named_parameters() if p.requires_grad]


def train_adapters(module, seed=0):
    """B away from zero, so that the adapters count."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if ".lora_B." in name:
                p += 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)


# The flag


@pytest.mark.parametrize(
    ("given", "expected"),
    [("all", Choice("all")), ("head", Choice("head")), ("last-1", Choice("last", 1)), ("last-12", Choice("last", 12)),
     ("lora:8", Choice("lora", 8))],
)  # fmt: skip
def test_parse(given, expected):
    assert parse(given) == expected


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


@pytest.mark.parametrize(
    ("choice", "message"),
    [("last-4", r"--teacher-params is last-4, but the bert teacher has 3 layers; choose last-3 or fewer"),
     ("lora:9", r"--teacher-params is lora:9, but .* the bert teacher have rank 8 at the most")],
)  # fmt: skip
def test_more_than_the_teacher_has(choice, message):
    module = teacher("bert").module
    with pytest.raises(UserError, match=message):
        restrict(module, choice)
    assert all(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("choice", CHOICES[1:])
def test_a_teacher_whose_layers_are_not_known(choice):
    """ALBERT runs one layer over and over."""
    config = AlbertConfig(hidden_size=8, embedding_size=8, intermediate_size=16, num_attention_heads=2, vocab_size=20)
    module = AlbertForSequenceClassification(config)
    with pytest.raises(UserError, match=f"--teacher-params {choice} does not know the layers of the albert teacher"):
        restrict(module, choice)
    assert restrict(module, "all") is module


def test_a_teacher_without_head_or_projections():
    plain = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    with pytest.raises(
        UserError, match="--teacher-params head leaves nothing to train in a teacher of the class Sequential"
    ):
        restrict(plain, "head")
    with pytest.raises(UserError, match="--teacher-params lora:1 (finds no query and value|leaves nothing)"):
        restrict(nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2)]), "head": nn.Linear(2, 2)}), "lora:1")


# What trains


@pytest.mark.parametrize("family", FAMILIES)
def test_what_trains(family):
    names = trainable(teacher(family).module)
    assert len(names) > 55
    for choice, count in {"head": 0, "last-1": 1, "last-2": 2, "last-3": 3}.items():
        module = teacher(family).module
        assert restrict(module, choice) is module
        layers = [f"{LAYERS[family]}.{i}." for i in range(3 - count, 3)]
        expected = [n for n in names if n.rpartition(".")[0] in HEADS[family] or any(map(n.startswith, layers))]
        assert trainable(module) == expected
        assert len(expected) == 4 + 16 * count
    assert trainable(restrict(teacher(family).module, "all")) == names


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("choice", ["lora:2"])
def test_what_trains_with_adapters(family, choice):
    module = restrict(teacher(family).module, choice)
    projections = (
        ["attention.q_lin", "attention.v_lin"]
        if family == "distilbert"
        else ["attention.self.query", "attention.self.value"]
    )
    adapters = {f"{LAYERS[family]}.{i}.{p}.lora_{ab}.default" for i in range(3) for p in projections for ab in "AB"}
    assert {name.rpartition(".")[0] for name in trainable(module)} == adapters | HEADS[family]
    assert {p.shape for n, p in module.named_parameters() if "lora" in n} == {(2, 8), (8, 2)}
    assert {p.dtype for p in module.parameters()} == {torch.float64}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_random_state_stay(family, choice):
    module = teacher(family).module
    before, config = logits(module, family), module.config.to_dict()
    torch.manual_seed(4)
    state = torch.get_rng_state()
    restrict(module, choice, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits(module, family), before)
    assert module.config.to_dict() == config
    assert not any(m.training for m in module.modules())


@pytest.mark.parametrize("choice", ["lora:2"])
def test_the_seed_fixes_the_adapters(choice):
    weights = [restrict(teacher("bert").module, choice, seed=s).state_dict() for s in (0, 0, 1)]
    same = [all(torch.equal(weights[0][k], other[k]) for k in other) for other in weights[1:]]
    assert same == [True, False]


def test_what_was_frozen_stays_frozen():
    module = teacher("bert").module
    module.classifier.requires_grad_(False)
    restrict(module, "head")
    assert {n for n, p in module.named_parameters() if p.requires_grad} == {
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
    }
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


@pytest.mark.parametrize("strategy", [exact, double_backward], ids=["exact", "double_backward"])
@pytest.mark.parametrize("choice", CHOICES[1:])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_meta_gradient_is_that_of_the_whole(family, choice, strategy):
    scene = Scene("distilbert", [family, "bert"], pilots=2)
    scene.teachers[0] = teacher(family)
    _, (whole, other), _ = scene.run(strategy)
    restrict(scene.teachers[0].module, choice)
    _, (got, other_after), _ = scene.run(strategy)
    scale = max(g.abs().max() for g in whole.values())

    def close(a, b):
        return (a - b).abs().max() < TOLERANCE * scale

    assert all(close(other[n], other_after[n]) for n in other)
    assert list(got) == trainable(scene.teachers[0].module) and set(got) != set(whole)
    frozen = [p for p in scene.teachers[0].module.parameters() if not p.requires_grad]
    assert frozen and all(p.grad is None for p in frozen)
    checked = 0
    for name, gradient in got.items():
        projection, adapter, _ = name.partition(".lora_")
        if not adapter:
            assert close(gradient, whole[name])
        elif ".lora_B." in name:  # d/dB of W + B A, at scale 1
            a = scene.teachers[0].module.get_submodule(projection).lora_A["default"].weight
            assert close(gradient, whole[f"{projection}.weight"] @ a.T)
        else:
            assert not gradient.any()  # B is zero
        checked += gradient.abs().max() > 1e-6 * scale
    assert checked >= 4


@pytest.mark.parametrize("choice", ["last-1", "lora:2"])
def test_together_with_checkpointing(choice):
    scene = Scene("bert", ["roberta"], pilots=1)
    scene.teachers[0] = teacher("roberta")
    train_adapters(restrict(scene.teachers[0].module, choice))
    _, (expected,), _ = scene.run(double_backward)
    with checkpointed(scene.student.module), checkpointed(scene.teachers[0].module):
        _, (got,), _ = scene.run(double_backward)
    scale = max(g.abs().max() for g in expected.values())
    assert all((got[n] - expected[n]).abs().max() < TOLERANCE * scale for n in expected)


@pytest.mark.parametrize("choice", ["last-1", "lora:2"])
def test_in_bf16(choice):
    """8 bits, as in test_strategies; frozen weights are in bf16 too."""
    found = []
    for precision in ("fp32", "bf16"):
        scene = Scene("bert", ["roberta"], dtype=torch.float32, pilot_lr=0.05)
        train_adapters(restrict(scene.teachers[0].module, choice))
        for each in (scene.student, *scene.teachers):
            each.precision = precision
        found.append(scene.run(exact)[1][0])
    expected, got = found
    scale = max(g.abs().max() for g in expected.values())
    assert max((got[n] - expected[n]).abs().max() for n in expected) < 0.1 * scale


@pytest.mark.parametrize("choice", CHOICES)
def test_training_moves_what_trains_and_nothing_else(choice):
    module = restrict(teacher("bert").module, choice)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):  # the first step moves B, which is what lets A have a gradient
        logits(module, "bert").square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = [n for n, p in module.named_parameters() if not torch.equal(p, before[n])]
    # softmax leaves a key's bias without gradient, but for rounding
    assert set(moved) | {n for n in trainable(module) if "key.bias" in n} == set(trainable(module))


# Export


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("choice", CHOICES)
def test_export_is_a_plain_model(family, choice, tmp_path):
    plain = teacher(family).module.float()
    module = restrict(copy.deepcopy(plain), choice)
    train_adapters(module)
    with torch.no_grad():
        expected = logits(module, family)
    state, names = copy.deepcopy(module.state_dict()), trainable(module)
    with merged(module) as to_save, torch.no_grad():
        assert to_save is module and list(module.state_dict()) == list(plain.state_dict())
        torch.testing.assert_close(logits(module, family), expected, **FLOAT32)
        module.save_pretrained(tmp_path)
    assert list(module.state_dict()) == list(state)
    assert all(torch.equal(module.state_dict()[n], state[n]) for n in state), "adapters and weights are as they were"
    assert trainable(module) == names and torch.equal(logits(module, family), expected)

    assert {f.name for f in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(plain.state_dict())
    loaded, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
    )
    assert type(loaded) is type(plain) and not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(logits(loaded.eval(), family), expected, **FLOAT32)
        assert ("lora" in choice) is not torch.equal(logits(plain, family), expected), "the adapters count"


@pytest.mark.parametrize("choice", ["lora:2"])
def test_adapters_come_back_when_the_body_raises(choice):
    module = restrict(teacher("roberta").module, choice)
    train_adapters(module)
    expected = logits(module, "roberta")
    with pytest.raises(ZeroDivisionError), merged(module):
        raise ZeroDivisionError
    assert torch.equal(logits(module, "roberta"), expected)
    logits(module, "roberta").sum().backward()
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)
