"""Prototypes, typicality and expertise (methods 6) against the sums that they are written as; mean states and their cache."""

import copy
import math
from itertools import product

import pytest
import torch
from datasets import Dataset

from engine.data.encoded import EncodedSplit
from engine.data.encoding import Encoding
from engine.data.splits import content_hash
from engine.embedded import generate
from engine.embedded.models import build
from engine.losses.domain_head import DomainHead
from engine.models.features import attach
from engine.models.network import Encoder
from engine.run.prototypes import expertise, kept_states, mean_states, prototypes, typicality

CPU, ROWS = torch.device("cpu"), 40


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


def examples(seed, n=30, domains=3, classes=2, width=4):
    """States, domains, labels."""
    generator = torch.Generator().manual_seed(seed)
    ks = torch.randint(domains, (n,), generator=generator)
    ys = torch.randint(classes, (n,), generator=generator)
    return torch.randn(n, width, generator=generator, dtype=torch.float64), ks, ys


@pytest.mark.parametrize(
    "unseen", [set(), {(1, 0)}, {(2, 0), (2, 1)}], ids=["all", "without a class", "without a domain"]
)
def test_prototypes_and_typicality_are_the_written_ones(unseen):
    """Prototypes of what is seen; typicality of all examples, of the unseen ones by the others' prototypes alone."""
    h, ks, ys = examples(0)
    seen = torch.tensor([(k, m) not in unseen for k, m in zip(ks.tolist(), ys.tolist(), strict=True)])
    p = prototypes(h[seen], ks[seen], ys[seen], 3, 2)
    groups = {}
    for k, m in product(range(3), range(2)):
        members = [h[i] for i in range(30) if (ks[i], ys[i]) == (k, m)]
        if (k, m) in unseen:
            assert not p[k, m].any()
        else:
            groups[k, m] = (sum(members) / len(members)).tolist()
            torch.testing.assert_close(p[k, m], torch.tensor(groups[k, m], dtype=torch.float64))
    got = typicality(h, ks, ys, p, 0.6, 0.15)
    for i, (k, m) in enumerate(zip(ks.tolist(), ys.tolist(), strict=True)):
        similar = {o: cosine(groups[o, m], h[i].tolist()) for o in range(3) if (o, m) in groups}
        t = sum((0.6 if o == k else 0.15) * cos for o, cos in similar.items())
        assert got[i].item() == pytest.approx(t, abs=1e-12)


def test_sizes():
    """On the prototype of both of two domains, as typical as can be; the teacher certain, undecided, certainly wrong."""
    h, ks, ys = torch.tensor([[2.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]), torch.tensor([0, 0])
    p = prototypes(h, ks, ys, 2, 2)
    assert typicality(h, ks, ys, p, 0.5, 0.5).tolist() == pytest.approx([1, 1])
    assert typicality(-h, ks, ys, p, 0.5, 0.5).tolist() == pytest.approx([-1, -1])
    logits = torch.tensor([[50.0, 0.0], [0.0, 0.0], [-50.0, 0.0]])
    w = expertise(torch.ones(3), logits, torch.zeros(3, dtype=torch.int64))
    assert w.tolist() == pytest.approx([2 / 2, 2 / (math.exp(0.25) + 1), 2 / (math.e + 1)])
    assert w[0] > w[1] > w[2]


# Mean states


@pytest.fixture(scope="module")
def texts():
    return [text for text, _ in generate(ROWS, seed=3)]


@pytest.fixture(scope="module")
def built(texts):
    return build("bert", texts, 2, 0)


@pytest.fixture(scope="module")
def make_split(texts, built, tmp_path_factory):
    columns = {"text": texts, "label": [i % 2 for i in range(ROWS)], "domain": [i % 3 for i in range(ROWS)]}
    dataset, folder = Dataset.from_dict(columns), tmp_path_factory.mktemp("tokens")
    encodings = [Encoding.of(built[1], 64)]
    return lambda buckets=16: EncodedSplit(dataset, encodings, content_hash(dataset), folder, buckets)


@pytest.fixture(scope="module")
def split(make_split):
    return make_split()


@pytest.fixture
def network(split, built):
    """With dropout, which must not show."""
    module = copy.deepcopy(built[0])
    for m in module.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.5
    encoder = Encoder("bert", module.train(), split.tables[0].encoding.key)
    encoder.flatten()
    return encoder


def test_mean_states_are_the_plain_models(split, network, texts):
    """One text at a time, so that there is no padding; in the split's order, dropout off, modes and states put back."""
    got = mean_states(network, split, CPU)
    assert network.module.training and not network.inner and got.shape == (ROWS, 64) and not got.requires_grad
    tokenizer = split.tables[0].encoding.tokenizer
    network.module.eval()
    for text, h in zip(texts, got, strict=True):
        with torch.no_grad():
            out = network.module(**tokenizer(text, return_tensors="pt"), output_hidden_states=True)
        # fp32 in another order, 4 layers deep
        torch.testing.assert_close(h, out.hidden_states[-1][0].mean(0), rtol=0, atol=1e-5)


def test_mean_states_are_the_encoders_own(split, network):
    attach(network.module, "domain", DomainHead(64, 3, True, 0))
    with pytest.raises(AssertionError, match="before a domain head"):
        mean_states(network, split, CPU)


@pytest.fixture
def passes(monkeypatch):
    """How often states were computed."""
    from engine.run import prototypes as module

    found = []
    monkeypatch.setattr(module, "mean_states", lambda *given: found.append(1) or mean_states(*given))
    return found


@pytest.mark.parametrize("change", ["content", "weights", "precision", "widths"])
def test_other_states_have_another_name(change, split, make_split, network, tmp_path, passes):
    kept_states(network, split, "these", CPU, tmp_path)
    if change == "weights":
        with torch.no_grad():
            next(network.module.parameters())[0, 0] += 1e-6
    network.precision = "bf16" if change == "precision" else "fp32"
    other = make_split(1) if change == "widths" else split
    kept_states(network, other, "those" if change == "content" else "these", CPU, tmp_path)
    assert len(passes) == 2 and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("damage", [None, b"", b"nonsense", "half"])
def test_states_are_kept_and_damaged_ones_computed_again(damage, split, network, tmp_path, passes):
    whole = kept_states(network, split, "these", CPU, tmp_path / "deep" / "states")
    (file,) = (tmp_path / "deep" / "states").iterdir()
    if damage is not None:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if damage == "half" else damage)
    for _ in range(2):
        assert torch.equal(kept_states(network, split, "these", CPU, tmp_path / "deep" / "states"), whole)
        assert len(passes) == 1 + (damage is not None)
