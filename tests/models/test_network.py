"""How networks read batches: masks, attention, precision, features; and a learner's schedule."""

from types import SimpleNamespace

import pytest
import torch
from small_models import CPU, CUDA, TOLERANCE, batch, close, encoder, families, plain, tiny
from torch import nn

from engine.embedded import build
from engine.models.features import InnerStates
from engine.models.learner import Learner
from engine.models.network import Encoder, Network, Outputs, attention, attention_mask, describe_attention
from engine.params.optim import FlatAdamW

# Attention


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@families
def test_a_ready_mask_gives_the_same_logits(family, kind, dtype):
    """What is passed instead of the 2-D mask."""
    module, given = tiny(family, kind).to(dtype), batch(family)
    mask = given.inputs["own"]["attention_mask"]
    assert not mask.all()
    with torch.no_grad():
        expected = plain(module, given, family).logits
        given.inputs["own"]["attention_mask"] = attention_mask(mask, kind, dtype)
        got = plain(module, given, family).logits
        given.inputs["own"]["attention_mask"] = attention_mask(torch.ones_like(mask), kind, dtype)
        unmasked = plain(module, given, family).logits
    close(got, expected, dtype)
    assert (unmasked - expected).abs().max() > TOLERANCE[dtype] or dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("device", "length", "low_precision", "dropout", "higher", "expected"),
    [
        (CPU, 128, False, False, False, "sdpa"),
        (CPU, 64, False, False, False, "sdpa"),
        (CPU, 63, False, False, False, "eager"),
        (CPU, 128, True, False, False, "eager"),
        (CPU, 128, False, True, False, "eager"),
        (CPU, 128, False, False, True, "eager"),
        (CUDA, 128, False, False, True, "eager"),
        (CUDA, 16, False, False, False, "sdpa"),
        (CUDA, 16, True, True, False, "sdpa"),
        (CUDA, 16, True, True, True, "eager"),
    ],
)
def test_which_attention(device, length, low_precision, dropout, higher, expected):
    assert attention(device, length, low_precision, dropout, higher) == expected


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("low_precision", [False, True])
def test_what_is_said_of_the_attention_is_so(device, low_precision):
    said = describe_attention(device, low_precision)
    chosen = {length: attention(device, length, low_precision, False, False) for length in (16, 64)}
    assert ("plain in every pass" in said) == (set(chosen.values()) == {"eager"})
    assert ("64 tokens and more" in said) == (chosen == {16: "eager", 64: "sdpa"})
    assert ("in every other pass" in said) == (set(chosen.values()) == {"sdpa"})


@families
@pytest.mark.parametrize("length", [9, 70])
def test_logits_are_those_of_the_plain_model(family, length):
    network, given = encoder(family, kind="sdpa"), batch(family, length)
    with torch.no_grad():
        expected = plain(network.module, given, family).logits
        for higher in (False, True):
            close(network(given, higher=higher).logits, expected, torch.float32)
        parameters = {n: p.detach() * 1.1 for n, p in network.trainable().items()}
        got = network(given, parameters).logits
        for n, p in network.trainable().items():
            p.copy_(parameters[n])
        assert not torch.allclose(got, expected, atol=1e-3)
        close(got, plain(network.module, given, family).logits, torch.float32)


class Broken(nn.Module):
    def forward(self, *args, **kwargs):
        raise ZeroDivisionError


@families
@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_the_configuration_is_put_back(family, kind):
    """Also after an error. In between the model's layers saw what `attention` chose."""
    network, seen = encoder(family, kind=kind), []
    config = network.module.config
    last = [m for m in network.module.modules() if isinstance(m, nn.Linear)][-1]
    last.register_forward_pre_hook(lambda *_: seen.append(config._attn_implementation))
    for length, train, higher, expected in ((9, False, False, "eager"), (70, False, False, "sdpa"),
                                            (70, True, False, "eager"), (70, False, True, "eager")):  # fmt: skip
        network.module.train(train)
        network(batch(family, length), higher=higher)
        assert seen.pop() == expected and not seen
        assert config._attn_implementation == kind
    network.module.classifier = Broken()
    for length in (9, 70):
        with pytest.raises(ZeroDivisionError):
            network(batch(family, length))
        assert config._attn_implementation == kind


def test_without_attention_dropout_training_is_fused_too():
    network = encoder("bert", attention_dropout=0.0)
    assert not network._drops_attention() and encoder("distilbert")._drops_attention()


@families
def test_a_pass_that_is_repeated_sees_the_same_masks(family):
    network, given = encoder(family), batch(family, 70)
    network.module.train()
    outputs = []
    for parameters in (None, {n: p.detach() for n, p in network.trainable().items()}):
        torch.manual_seed(3)
        outputs.append((network(given, parameters, higher=True).logits, torch.get_rng_state()))
    assert torch.equal(outputs[0][1], outputs[1][1])
    close(outputs[0][0], outputs[1][0], torch.float32)
    assert (network(given, higher=True).logits - outputs[0][0]).abs().max() > 1e-2


# Precision


@families
def test_bf16_comes_near_float32(family):
    network, given = encoder(family, "bf16"), batch(family)
    got = network(given).logits
    assert got.dtype == torch.float32
    expected = network(given, precision="fp32").logits
    close(got, expected, torch.bfloat16)
    assert not torch.equal(got, expected)
    with torch.no_grad():
        close(expected, plain(network.module, given, family).logits, torch.float32)
    assert all(p.dtype == torch.float32 for p in network.module.parameters())


@families
def test_bf16_gradients_come_near_float32(family):
    """Taken against the shadow's views, given in float32."""
    gradients = []
    for precision in ("fp32", "bf16"):
        network = encoder(family, precision)
        with network.flat.lookups() as lookups:
            out = network(batch(family)).logits
        gradients.append(network.flat.gradients_of([out.square().sum()], None, network.leaves(), lookups).dense)
    assert gradients[1].dtype == torch.float32
    # 8 bits, and a few operations deeper than the logits
    assert (gradients[0] - gradients[1]).norm() < 0.1 * gradients[0].norm()


def test_the_shadow_follows_in_the_next_forward():
    network, given = encoder("bert", "bf16"), batch("bert")
    before = network(given).logits
    for optimizer in (FlatAdamW(network.flat, lr=0.1), torch.optim.AdamW(network.module.parameters(), lr=0.1)):
        network(given, precision="fp32").logits.square().sum().backward()
        network.flat.gradients  # noqa: B018  (takes in what autograd left)
        optimizer.step()
        after = network(given).logits
        fresh = encoder("bert", "bf16")
        fresh.module.load_state_dict(network.module.state_dict())
        assert torch.equal(after, fresh(given).logits) and not torch.equal(after, before)
        before = after


@families
def test_frozen_weights_in_bf16(family):
    """Also those that were written to since; and other ones frozen later."""
    network, given = encoder(family, "bf16"), batch(family)
    base = next(network.module.children())
    base.embeddings.requires_grad_(False)
    close(network(given).logits, network(given, precision="fp32").logits, torch.bfloat16)
    with torch.no_grad():
        base.embeddings.word_embeddings.weight.copy_(base.embeddings.word_embeddings.weight.flip(0))
    moved = network(given)
    fresh = encoder(family, "bf16")
    fresh.module.load_state_dict(network.module.state_dict())
    next(fresh.module.children()).embeddings.requires_grad_(False)
    assert torch.equal(moved.logits, fresh(given).logits)
    network.module.requires_grad_(True)
    assert torch.equal(network(given).logits, moved.logits)
    layer = [m for m in network.module.modules() if isinstance(m, nn.Linear)][0]
    for p in (layer.bias, layer.weight):  # one after the other, the one as often written to as the other
        network.module.requires_grad_(True)
        p.requires_grad_(False)
        assert torch.equal(network(given).logits, moved.logits)


def test_weights_that_stand_in_are_rounded_like_the_others():
    network, given = encoder("bert", "bf16"), batch("bert")
    weights = {n: p.detach().clone().requires_grad_() for n, p in network.trainable().items()}
    got = network(given, weights, higher=True).logits
    assert torch.equal(got, network(given, higher=True).logits)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(got.sum(), list(weights.values())))


# Features


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@families
def test_features(family, precision):
    network, given = encoder(family, precision), batch(family)
    assert network(given).features is None
    network.inner = InnerStates(first=(2, 1))
    got = network(given)
    assert got.features.shape == (4, 2, 8) and got.features.dtype == got.logits.dtype == torch.float32
    network.module.config.output_hidden_states = True
    states = plain(network.module, given, family).hidden_states
    expected = torch.stack([states[2][:, 0], states[1][:, 0]], 1)
    close(got.features, expected, torch.float32 if precision == "fp32" else torch.bfloat16)
    with network.flat.lookups() as lookups:
        got = network(given)
    found = network.flat.gradients_of([got.features.sum()], None, network.leaves(), lookups)
    assert found.dense.any()


# Any module


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.dropout, self.out = nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4)
        self.out.weight = self.hidden.weight
        self.fused = []

    def forward(self, x):
        self.fused.append(torch.backends.cuda.flash_sdp_enabled())
        return self.out(self.dropout(self.hidden(x)))


def test_a_module_by_itself():
    x, module = torch.randn(3, 4), Toy().eval()
    network = Network(module, name="toy")
    given = SimpleNamespace(inputs=x, labels=None)
    assert torch.equal(network(given).logits, module(x)) and network(given).features is None
    assert network.size() == 16 + 4 + 4 and list(network.trainable()) == ["hidden.weight", "hidden.bias", "out.bias"]
    weights = {n: p * 2 for n, p in network.trainable().items()}
    got = network(given, weights).logits
    hidden = x @ weights["hidden.weight"].T + weights["hidden.bias"]
    torch.testing.assert_close(got, hidden @ weights["hidden.weight"].T + weights["out.bias"])
    doubled = Network(module, lambda module, batch: (module(batch["x"]), module(batch["y"])))
    got = doubled({"x": x, "y": -x})
    assert torch.equal(got.logits, module(x)) and torch.equal(got.features, module(-x))


@pytest.mark.parametrize("parameters", [False, True])
def test_no_fused_attention_in_a_higher_pass(parameters):
    """A stranger's module may call it; a pass and its repetition must draw the same masks."""
    module = Toy()
    network = Network(module)
    for higher in (True, False):
        weights = dict(network.trainable()) if parameters else None
        network(SimpleNamespace(inputs=torch.randn(3, 4)), weights, higher=higher)
        assert module.fused.pop() == (not higher)


def test_outputs():
    z, h = torch.randn(2, 3, requires_grad=True), torch.randn(2, 1, 4, requires_grad=True)
    rest = (None, None)
    assert Outputs.of(z) == (z, None, *rest) and Outputs.of((z, h)) == (z, h, *rest) and Outputs.of([z]) == Outputs(z)
    assert Outputs.of(SimpleNamespace(logits=z, hidden_states=h)) == Outputs(z)
    both = Outputs(z, h)
    assert Outputs.of(both) is both and both.given() == [z, h] and Outputs(z).given() == [z]
    for wanted in (False, True):
        held = both.detached(wanted)
        assert all(t.is_leaf and t.requires_grad == wanted for t in held.given()) and torch.equal(held.logits, z)
    assert Outputs(z).detached(True).features is None


def test_modes_come_back_one_by_one():
    network = Network(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5))))
    network.module[1].eval()
    before = [m.training for m in network.module.modules()]
    for train in (True, False):
        with pytest.raises(ZeroDivisionError), network.in_mode(train):
            assert all(m.training == train for m in network.module.modules())
            raise ZeroDivisionError
        assert [m.training for m in network.module.modules()] == before


def test_other_weights_to_train_are_flattened_anew():
    network = Network(Toy())
    flat = network.flat
    assert network.flat is flat and network.leaves() is flat.parameters
    network.module.out.bias.requires_grad_(False)
    assert network.flat is not flat and network.leaves().keys() == {"hidden.weight", "hidden.bias"}
    network.flat.check()


# Learners

TEXTS = ["the plot was superb", "the soup is awful and the rice was late", "a camera"]


def test_schedule_rises_from_above_zero_and_falls_to_zero():
    module, _ = build("tinybert", TEXTS, 2, 0)
    learner = Learner.adamw(
        Encoder("t", module, "e"), lr=1.0, steps=20, warmup_ratio=0.25, weight_decay=0.01, max_grad_norm=1.0
    )
    rates = []
    for _ in range(20):
        rates.append(learner.schedule.get_last_lr()[0])
        learner.update()
        learner.advance()
    assert rates[0] > 0 and rates.index(max(rates)) == 5 and max(rates) == 1.0
    assert rates[:6] == sorted(rates[:6]) and rates[5:] == sorted(rates[5:], reverse=True) and rates[-1] > 0
    assert learner.schedule.get_last_lr()[0] == 0.0


def test_decay_is_for_matrices_alone():
    module, _ = build("bert", TEXTS, 2, 0)
    learner = Learner.adamw(
        Encoder("t", module, "e"), lr=1.0, steps=2, warmup_ratio=0.0, weight_decay=0.1, max_grad_norm=1.0
    )
    decay = {id(p): group["weight_decay"] for group in learner.optimizer.param_groups for p in group["params"]}
    for name, p in module.named_parameters():
        assert decay[id(p)] == (0.0 if "LayerNorm" in name or name.endswith("bias") else 0.1), name
