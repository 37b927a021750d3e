"""A meta-teacher's domain head, and the heads of a teacher of several domains."""

import math

import pytest
import torch
import torch.nn.functional as F
from small_models import FAMILIES, batch, encoder, plain, tiny
from transformers import AutoModelForSequenceClassification

from engine.losses.domain_head import DomainHead, widen
from engine.models.features import InnerStates, attach

WIDTH, DOMAINS = 6, 4


def head(reversal, **settings):
    return DomainHead(WIDTH, DOMAINS, reversal, seed=0, **settings).double()


def states(n=DOMAINS, seed=0):
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def written(h, domains, module):
    """f and d of the module's text, with its weights."""
    f = torch.stack([x + module.embedding[k] for x, k in zip(h, domains.tolist(), strict=True)])
    inner = torch.tanh(f @ module.hidden.weight.T + module.hidden.bias)
    return f, inner @ module.out.weight.T + module.out.bias


def gradients(module, h, domains, chosen=None):
    """Of the summed cross-entropy of the examples `chosen`: to h, and to the module's weights by name."""
    h = h.clone().requires_grad_()
    loss = F.cross_entropy(module.logits(h, domains), domains, reduction="none")
    found = torch.autograd.grad(loss[slice(None) if chosen is None else chosen].sum(), [h, *module.parameters()])
    return loss.detach(), found[0], dict(zip([n for n, _ in module.named_parameters()], found[1:], strict=True))


def test_reversal_turns_the_sign_and_stops_at_chance():
    """The classifier learns from every example; encoder and embeddings against it, from those that it tells."""
    domains = torch.arange(DOMAINS)
    turned, straight, h = head(True), head(False), 4 * states()
    with torch.no_grad():
        for module in (turned, straight):
            module.out.weight.mul_(6)
    loss, to_h, weights = gradients(turned, h, domains)
    _, plain_h, plain_weights = gradients(straight, h, domains)
    told = loss < math.log(DOMAINS)
    assert told.any() and not told.all()
    for k in range(DOMAINS):
        torch.testing.assert_close(
            to_h[k], -plain_h[k] if told[k] else torch.zeros_like(to_h[k]), rtol=1e-12, atol=1e-15
        )
        assert plain_h[k].any()
    torch.testing.assert_close(weights["embedding"], to_h, rtol=1e-12, atol=0)  # domain k is example k's alone
    for name in ("hidden.weight", "hidden.bias", "out.weight", "out.bias"):
        torch.testing.assert_close(weights[name], plain_weights[name], rtol=1e-12, atol=1e-15)


def test_chance_is_that_of_the_domains_seen():
    """A teacher of two of four domains: a guess between them has cross-entropy log 2, not log 4."""
    for seen, expected in ((2, False), (None, True)):
        module = head(True, seen=seen)
        with torch.no_grad():  # a classifier that says 0.45 and 0.45 for the first two, whatever it sees
            module.out.weight.mul_(1e-3)
            module.out.bias.copy_(torch.tensor([0.45, 0.45, 0.05, 0.05]).log())
        loss, to_h, _ = gradients(module, states(2), torch.tensor([0, 1]))
        assert (loss > math.log(2)).all() and (loss < math.log(4)).all()
        assert bool(to_h.any()) is expected


def test_the_seed_alone_fixes_it_and_the_random_state_stays():
    before = torch.get_rng_state()
    one, same, other = (DomainHead(WIDTH, DOMAINS, True, seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    for name, t in one.state_dict().items():
        assert torch.equal(t, same.state_dict()[name]) and not torch.equal(t, other.state_dict()[name])


def test_domains_that_were_not_seen_get_the_mean_of_the_others():
    module = head(True)
    before = module.embedding.detach().clone()
    module.average_into([1, 3], [0, 2])
    assert torch.equal(module.embedding[[0, 2]], before[[0, 2]])
    for k in (1, 3):
        torch.testing.assert_close(module.embedding[k].detach(), (before[0] + before[2]) / 2)
    assert module.embedding.requires_grad and module.embedding.is_leaf


# In an encoder


def with_domains(given, domains):
    given.columns["domain"] = torch.tensor(domains)
    return given


@pytest.mark.parametrize("family", FAMILIES)
def test_what_an_encoder_gives_of_it(family):
    network, given = encoder(family), with_domains(batch(family), [1, 0, 2, 1])
    attach(network.module, "domain", DomainHead(8, 3, False, 0))
    module = network.module.extras["domain"]
    with torch.no_grad():
        with network.giving(InnerStates(domain="feature")):
            f = network(given)
        with network.giving(InnerStates(domain="logits")):
            d = network(given)
        own = tiny(family, "eager")
        own.config.output_hidden_states = True
        out, mask = plain(own, given, family), given.inputs["own"]["attention_mask"][..., None]
        h = (out.hidden_states[-1] * mask).sum(1) / mask.sum(1)
        expected = written(h, given.columns["domain"], module)
    for got, wanted in zip((f.domain, d.domain), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5)
    assert f.given()[1:] == [f.domain] and torch.equal(f.logits, d.logits)


# Heads for every domain


@pytest.mark.parametrize("family", FAMILIES)
def test_an_example_gets_its_own_domains_logits(family, tmp_path):
    """Of all that plain transformers gives for it; and the file loads there with labels that name domain and class."""
    network, names = encoder(family), ["books", "dvd"]
    network.module.config.id2label = {0: "bad", 1: "fair", 2: "good"}
    widen(network.module, 3, names, seed=0)
    network.heads = 2
    given = with_domains(batch(family), [1, 0, 0, 1])
    with torch.no_grad():
        every = plain(network.module, given, family).logits
        got = network(given).logits
    assert every.shape == (4, 6) and got.shape == (4, 3)
    for b, k in enumerate([1, 0, 0, 1]):
        torch.testing.assert_close(got[b], every[b, 3 * k : 3 * k + 3], rtol=0, atol=1e-5)
    network.module.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert loaded.config.num_labels == loaded.num_labels == network.module.num_labels == 6
    assert loaded.config.id2label[4] == "dvd: fair" and loaded.config.label2id["books: good"] == 2
    with torch.no_grad():
        torch.testing.assert_close(plain(loaded, given, family).logits, every, rtol=0, atol=1e-5)


def test_widen_draws_by_its_seed_and_leaves_the_rest():
    one, same, other = (tiny("bert") for _ in range(3))
    before = {n: t.clone() for n, t in one.state_dict().items()}
    for module, seed in ((one, 0), (same, 0), (other, 1)):
        widen(module, 3, ["a", "b"], seed)
    assert torch.equal(one.classifier.weight, same.classifier.weight)
    assert not torch.equal(one.classifier.weight, other.classifier.weight)
    rest = {n for n in before if not n.startswith("classifier")}
    assert all(torch.equal(one.state_dict()[n], before[n]) for n in rest)
    with pytest.raises(ValueError, match="BertForSequenceClassification has no linear layer of 5 outputs"):
        widen(one, 5, ["a", "b"], 0)
    double = tiny("bert").double()
    widen(double, 3, ["a", "b"], 0)
    assert double.classifier.weight.dtype == torch.float64
