"""Sums over all tokens in bf16 training on a CPU: as good as their terms."""

import pytest
import torch
import torch.nn.functional as F
from small_models import encoder

from engine.batch import Batch
from engine.models import encoder_layers

SUMS = ("LayerNorm", "layer_norm", "position", "token_type")  # gradients that are sums over all tokens, and no products


def gradients(family, precision):
    """By name, at 2,048 tokens."""
    network = encoder(family, precision, layers=3, width=64, heads=4, classes=2, words=300, dropout=0.0)
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 300, (32, 64), generator=random)
    labels = torch.randint(2, (32,), generator=random)
    with network.flat.lookups() as lookups:
        logits = network(Batch(labels, {"own": {"input_ids": ids, "attention_mask": ids * 0 + 1}})).logits
    network.flat.backward([F.cross_entropy(logits, labels)], None, network.leaves(), lookups)
    return {name: p.grad.clone() for name, p in network.flat.parameters.items()}


def apart(family):
    """Relative errors of gradients in bf16: the greatest of sums over tokens, and of matrix products, which are summed in
    float32. Gradients that are mere rounding (an attention key's bias has none) do not count."""
    exact, found = gradients(family, "fp32"), gradients(family, "bf16")
    most = max(g.norm() for g in exact.values())
    errors = {n: ((found[n] - g).norm() / g.norm()).item() for n, g in exact.items() if g.norm() > 1e-6 * most}
    sums = {n: e for n, e in errors.items() if any(kind in n for kind in SUMS)}
    assert len(sums) >= 9
    return max(sums.values()), max(e for n, e in errors.items() if n not in sums)


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_sums_over_tokens_are_as_good_as_products(family):
    sums, products = apart(family)
    assert sums < 1.2 * products


def test_float32_goes_through_torch(monkeypatch):
    """Not a bit is different where nothing has to be."""
    expected = gradients("bert", "fp32")
    for what in ("_norm", "_embed"):
        monkeypatch.setattr(encoder_layers, what, lambda module, x: type(module).forward(module, x))
    assert all(torch.equal(g, expected[n]) for n, g in gradients("bert", "fp32").items())
