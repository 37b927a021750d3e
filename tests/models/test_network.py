"""How networks read batches: masks, attention, precision; and a learner's updates and schedule."""

from types import SimpleNamespace

import pytest
import torch
from small_models import CPU, CUDA, batch, close, encoder, families, forward_and_backward, plain
from torch import nn

from engine.models.learner import Learner
from engine.models.network import Network, Outputs, attention, describe_attention

FP32 = torch.float32

# Attention


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
        (CUDA, 16, True, True, False, "sdpa"),
        (CUDA, 16, True, True, True, "eager"),
    ],
)
def test_which_attention(device, length, low_precision, dropout, higher, expected):
    assert attention(device, length, low_precision, dropout, higher) == expected


@pytest.mark.parametrize(("device", "low_precision", "said"), [
    (CPU, False, "64 tokens and more"), (CPU, True, "plain in every pass"), (CUDA, False, "in every other"), (CUDA, True, "in every other"),
])  # fmt: skip
def test_what_is_said_of_the_attention_is_so(device, low_precision, said):
    kinds = {
        "plain in every pass": ["eager"] * 2,
        "64 tokens and more": ["eager", "sdpa"],
        "in every other": ["sdpa"] * 2,
    }
    assert [attention(device, length, low_precision, False, False) for length in (16, 64)] == kinds[said]
    assert [text for text in kinds if text in describe_attention(device, low_precision)] == [said]


@pytest.mark.parametrize(("length", "activation"), [(9, "gelu"), (70, "gelu"), (9, "relu")])
@families
def test_logits_are_those_of_the_plain_model(family, length, activation):
    """Which have masks of rows of any length. With graphs, where layers keep less; fused attention from 64 tokens on."""
    network, given = encoder(family, activation=activation), batch(family, length)
    expected = plain(network.module, given, family).logits
    for higher in (False, True):
        close(network(given, higher=higher).logits, expected, FP32)
    with torch.no_grad():
        parameters = {n: p.detach() * 1.1 for n, p in network.trainable().items()}
        got = network(given, parameters).logits
        for n, p in network.trainable().items():
            p.copy_(parameters[n])
        assert not torch.allclose(got, expected, atol=1e-3)
        close(got, plain(network.module, given, family).logits, FP32)


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@families
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
    last.register_forward_pre_hook(lambda *_: 1 / 0)
    for length in (9, 70):
        with pytest.raises(ZeroDivisionError):
            network(batch(family, length))
        assert config._attn_implementation == kind


def test_without_attention_dropout_training_is_fused_too():
    assert not encoder(attention_dropout=0.0)._drops_attention() and encoder("distilbert")._drops_attention()


# Precision


@families
def test_bf16_comes_near_float32(family):
    """Gradients, too, which are taken against the shadow's views and given in float32."""
    network, given = encoder(family, "bf16"), batch(family)
    exact, found = (forward_and_backward(each, given) for each in (encoder(family), network))
    assert {t.dtype for t in (*found[:2], *network.module.parameters())} == {FP32}
    close(found[0], exact[0], torch.bfloat16)
    assert not torch.equal(found[0], exact[0]) and torch.equal(network(given, precision="fp32").logits, exact[0])
    assert (found[1] - exact[1]).norm() < 0.1 * exact[1].norm()  # 8 bits, and a few operations deeper than the logits


@families
def test_frozen_weights_in_bf16(family):
    """Also those that were written to since; and other ones frozen later."""
    network, given = encoder(family, "bf16"), batch(family)
    embeddings = next(network.module.children()).embeddings.requires_grad_(False)
    close(network(given).logits, network(given, precision="fp32").logits, torch.bfloat16)
    with torch.no_grad():
        embeddings.word_embeddings.weight.copy_(embeddings.word_embeddings.weight.flip(0))
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
    assert all(g.dtype == FP32 for g in torch.autograd.grad(got.sum(), list(weights.values())))


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
    hidden = x @ weights["hidden.weight"].T + weights["hidden.bias"]
    expected = hidden @ weights["hidden.weight"].T + weights["out.bias"]
    torch.testing.assert_close(network(given, weights).logits, expected)
    doubled = Network(module, lambda module, batch: (module(batch["x"]), module(batch["y"])))
    got = doubled({"x": x, "y": -x})
    assert torch.equal(got.logits, module(x)) and torch.equal(got.features, module(-x))
    for weights in (None, dict(network.trainable())):  # a stranger's module may use fused attention
        for higher in (True, False):
            network(given, weights, higher=higher)
            assert module.fused.pop() == (not higher)


def test_outputs():
    z, h = torch.randn(2, 3, requires_grad=True), torch.randn(2, 1, 4, requires_grad=True)
    both = Outputs(z, h)
    assert Outputs.of(z) == Outputs.of([z]) == Outputs(z) == (z, None, None, None) and Outputs.of((z, h)) == both
    assert Outputs.of(SimpleNamespace(logits=z, hidden_states=h)) == Outputs(z)
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
    with pytest.raises(RuntimeError, match=r"not flat yet; call flatten\(\)"):
        network.flat  # noqa: B018
    flat = network.flatten()
    assert network.flatten() is network.flat is flat and network.leaves() is flat.parameters
    network.module.out.bias.requires_grad_(False)
    assert network.flat is flat, "whoever holds it is told by its check"
    assert network.flatten() is not flat and network.leaves().keys() == {"hidden.weight", "hidden.bias"}
    network.flat.check()


# Learners


def learner(network, **settings):
    given = {"lr": 1.0, "steps": 20, "warmup_ratio": 0.25, "weight_decay": 0.1, "max_grad_norm": 1.0}
    return Learner.adamw(network, **given | settings)


def test_schedule_rises_from_above_zero_and_falls_to_zero():
    trained, rates = learner(encoder()), []
    for _ in range(20):
        rates.append(trained.rate())
        trained.update()
        trained.advance()
    assert rates[0] > 0 and rates.index(max(rates)) == 5 and max(rates) == 1.0
    assert rates[:6] == sorted(rates[:6]) and rates[5:] == sorted(rates[5:], reverse=True) and rates[-1] > 0
    assert trained.rate() == 0.0


def test_decay_is_for_matrices_alone():
    trained = learner(encoder())
    decay = {id(p): group["weight_decay"] for group in trained.optimizer.param_groups for p in group["params"]}
    for name, p in trained.network.module.named_parameters():
        assert decay[id(p)] == (0.0 if "LayerNorm" in name or name.endswith("bias") else 0.1), name


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_clipping_shortens_long_gradients_alone(scale):
    """To a norm of 1; a step of plain descent shows what was left of the gradient."""
    network = Network(Toy())
    trained = Learner(network, torch.optim.SGD(network.flatten().parameters.values(), lr=1.0), max_grad_norm=1.0)
    before = network.flat.weights.clone()
    (sum(p.sum() for p in network.trainable().values()) * scale / network.size() ** 0.5).backward()
    trained.update()
    assert (before - network.flat.weights).norm().item() == pytest.approx(min(scale, 1.0), rel=1e-4)
    assert trained.skipped == 0 and not network.flat.gradients.any()
