"""Flat parameters: the module notices nothing, and vectors with rows are the dense ones."""

import copy
import pickle

import pytest
import torch
from flat_helpers import KINDS, Model, V, gaps, joined
from hypothesis import given, settings
from hypothesis import strategies as st
from time_machine_helpers import random_step
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from engine.params.flat import ALIGNMENT, FlatParameters
from engine.params.vectors import Rows

# Layout


@pytest.mark.parametrize("kind", KINDS)
def test_layout(kind):
    """Vectors, matrices, tables, each aligned and apart; the parameters are views and hold what they held."""
    module = Model(kind)
    before = copy.deepcopy(module.state_dict())
    flat = FlatParameters(module, table_rows=V)
    assert list(before) == list(module.state_dict())
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())
    expected = {n for n, p in module.named_parameters() if p.requires_grad}
    assert set(flat.offsets) == set(flat.parameters) == expected
    tables = {t.name for t in flat.tables}
    assert tables == {"words.weight", "other.weight"} & expected
    taken = 0
    for name, start in flat.offsets.items():  # in order
        p = flat.parameters[name]
        assert start % ALIGNMENT == 0 and taken <= start < taken + ALIGNMENT, name
        assert p.data_ptr() == flat.weights[start:].data_ptr() and p.is_contiguous()
        assert (start < flat.no_decay) == (p.ndim < 2) and (start < flat.dense) == (name not in tables)
        taken = start + p.numel()
    assert len(flat.weights) - taken < ALIGNMENT
    assert flat.dense_names == [n for n in flat.offsets if n not in tables]
    assert gaps(flat).any() and not flat.weights[gaps(flat)].any()
    flat.weights.mul_(2)
    assert all(torch.equal(t, before[n] * (2 if n in tables | set(flat.dense_names) else 1))
               for n, t in module.named_parameters())  # fmt: skip
    with torch.no_grad():
        module.out.bias.copy_(torch.arange(3.0))
    assert torch.equal(flat.weights[flat.offsets["out.bias"] :][:3], torch.arange(3.0).double())


def test_which_embeddings_are_tables():
    class Own(nn.Embedding):
        """May do anything in its forward."""

    embeddings = {name: nn.Embedding(8, 2) for name in ("big", "tied", "twin", "twins")}
    embeddings |= {"clipped": nn.Embedding(8, 2, max_norm=1.0), "scaled": nn.Embedding(8, 2, scale_grad_by_freq=True)}
    module = nn.ModuleDict(embeddings | {"small": nn.Embedding(7, 2), "own": Own(8, 2), "output": nn.Linear(2, 8)})
    module["output"].weight, module["twins"].weight = module["tied"].weight, module["twin"].weight
    found = {t.name: t.modules for t in FlatParameters(module, table_rows=8).tables}
    assert found == {"big.weight": [module["big"]], "twin.weight": [module["twin"], module["twins"]]}


def test_weights_that_do_not_fit_together_are_refused():
    mixed = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    with pytest.raises(ValueError, match=r"found torch.float32 on cpu, torch.float64 on cpu"):
        FlatParameters(mixed)
    mixed[1].requires_grad_(False)
    assert len(FlatParameters(mixed).parameters) == 2
    with pytest.raises(ValueError, match="found none"):
        FlatParameters(nn.Linear(2, 2).requires_grad_(False))


@pytest.mark.parametrize("move", [
    lambda m: m.float(),
    lambda m: setattr(m.out.weight, "data", m.out.weight.data.clone()),
    lambda m: setattr(m.scale, "data", torch.tensor(1.0, dtype=torch.float64)),
    lambda m: setattr(m.out, "weight", nn.Parameter(m.out.weight.detach())),
    lambda m: m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True),
])  # fmt: skip
def test_new_storage_is_noticed(move):
    module = Model()
    flat = FlatParameters(module, table_rows=V)
    flat.check()
    module.to(torch.float64), module.cpu(), module.out.requires_grad_(True), module.train()  # which move nothing
    flat.check()
    move(module)
    with pytest.raises(RuntimeError, match="has left the flat buffer: the module was moved"):
        flat.check()


# What others do with a module


def tiny_bert(kind=BertForSequenceClassification):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    return kind(BertConfig(vocab_size=50, max_position_embeddings=12, num_labels=3, **sizes)).eval()


@pytest.mark.parametrize("kind", [BertForSequenceClassification, BertForMaskedLM])  # the second ties its output
def test_saving_and_loading(kind, tmp_path):
    module = tiny_bert(kind)
    module.save_pretrained(tmp_path / "before")
    before = copy.deepcopy(module.state_dict())
    flat = FlatParameters(module, table_rows=20)
    assert len(flat.tables) == (1 if kind is BertForSequenceClassification else 0)
    module.save_pretrained(tmp_path / "after")
    files = [tmp_path / name / "model.safetensors" for name in ("before", "after")]
    assert files[0].read_bytes() == files[1].read_bytes()
    loaded = kind.from_pretrained(tmp_path / "after")
    assert loaded.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[n]) for n, t in loaded.state_dict().items())

    torch.save(module.state_dict(), tmp_path / "state.pt")
    flat.weights.zero_()
    module.load_state_dict(torch.load(tmp_path / "state.pt"))
    flat.check()
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())
    assert not flat.weights[gaps(flat)].any()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_live_on_their_own(duplicate):
    module = tiny_bert()
    flat = FlatParameters(module, table_rows=20)
    other = duplicate(module)
    before, batch = copy.deepcopy(module.state_dict()), {"input_ids": torch.arange(10)[None]}
    assert torch.equal(other(**batch).logits, module(**batch).logits)
    another = FlatParameters(other, table_rows=20)
    another.check(), flat.check()
    assert torch.equal(another.weights, flat.weights) and not another.weights[gaps(another)].any()
    another.weights.add_(1)
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    assert all(torch.equal(p, before[n] + 1) for n, p in other.named_parameters())


# Rows and vectors

SEEDS = st.integers(0, 10**6)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    seeds=st.tuples(SEEDS, SEEDS),
    whole=st.tuples(st.booleans(), st.booleans()),
    factor=st.sampled_from([1.0, -1.0, 0.3]),
)
def test_algebra(seeds, whole, factor):
    flat = FlatParameters(Model(), table_rows=V)
    a, b = (random_step(flat, *each) for each in zip(seeds, whole, strict=True))
    x, y = joined(flat, a), joined(flat, b)
    for got, expected in (
        (a.scaled(factor), factor * x),
        (a.scaled(torch.tensor(factor, dtype=torch.float64)), factor * x),
        (a.plus(b), x + y),
        (a.plus(b, factor), x + factor * y),
    ):
        # a fused product rounds once
        torch.testing.assert_close(joined(flat, got), expected, rtol=1e-15, atol=1e-15)
        torch.testing.assert_close(got.norm(), expected.norm(), rtol=1e-14, atol=0)
        for part in got.tables:
            assert not isinstance(part, Rows) or torch.equal(part.rows, part.rows.unique())
    assert torch.equal(joined(flat, a), x) and torch.equal(joined(flat, b), y), "neither was written to"


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(seed=SEEDS, shape=st.sampled_from([(), (0,), (5,), (2, 3)]))
def test_lookup_of_rows(seed, shape):
    flat = FlatParameters(Model(), table_rows=V)
    wanted = torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))
    for table, part in zip(flat.tables, random_step(flat, seed).tables, strict=True):
        assert torch.equal(part.lookup(wanted), part.dense(table.weight)[wanted])


def test_rows_that_repeat_are_summed():
    rows, values = torch.tensor([3, 1, 3, 6, 3]), torch.arange(10.0).view(5, 2)
    got, none = Rows.summed(rows, values), Rows.summed(rows[:0], values[:0])
    assert got.rows.tolist() == [1, 3, 6] and got.values.tolist() == [[2.0, 3.0], [12.0, 15.0], [6.0, 7.0]]
    assert none.rows.shape == (0,) and none.values.shape == (0, 2)
