"""Flat parameters: the module notices nothing, and vectors with rows are the dense ones."""

import copy
import pickle

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn
from torch.func import functional_call
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from engine.params.flat import ALIGNMENT, FlatParameters, Rows, Vector
from engine.params.optim import FlatAdamW

# Largest difference over the largest expected entry, in float64: sums in another order.
TOLERANCE = 1e-13
V, H, PAD = 11, 5, 0


class Model(nn.Module):
    """[B, L] ids -> [B, 3]; sizes that leave gaps, a scalar, a frozen weight, and the table used as `kind` says."""

    def __init__(self, kind="plain", dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.words = nn.Embedding(V, H, padding_idx=PAD if kind == "padding" else None)
        self.other = nn.Embedding(V, H)
        if kind == "tied tables":
            self.other.weight = self.words.weight
        self.norm, self.out = nn.LayerNorm(H), nn.Linear(H, 3)
        self.scale, self.shift = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.zeros(3), requires_grad=False)
        if kind == "frozen":
            self.words.weight.requires_grad_(False)
        self.to(dtype)

    def forward(self, ids):
        if self.kind == "keyword":
            x = self.words(input=ids.int())
        elif self.kind == "unused":
            x = self.other(ids + 1) * 0.5
        else:
            x = self.words(ids) + self.other(ids.flip(1)) * 0.5
        if self.kind == "used twice":
            x = x + self.words(ids[:, :1])
        x = torch.tanh(self.norm(x)).mean(1)
        if self.kind == "whole":  # a tied output
            x = x + F.linear(x, self.words.weight).exp().sum(-1, keepdim=True) * 0.1
        if self.kind == "whole alone":
            x = x * self.words.weight.square().mean()
        return self.out(x) * self.scale + self.shift


KINDS = ["plain", "padding", "tied tables", "used twice", "whole", "whole alone", "frozen", "unused", "keyword"]
WHOLE = {"whole", "whole alone"}
kinds = pytest.mark.parametrize("kind", KINDS)


def ids(seed=0, size=4):
    """With repetitions and padding."""
    found = torch.randint(V, (size, 6), generator=torch.Generator().manual_seed(seed)).clamp_max(V - 3)
    found[:, -1] = PAD
    return found


def error(got, expected):
    return ((got - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


def by_name(flat, vector):
    """A vector as dense tensors."""
    found = flat.views(vector.dense, flat.dense_names)
    for table, part in zip(flat.tables, vector.tables, strict=True):
        found[table.name] = part.dense(table.weight) if isinstance(part, Rows) else part
    return found


def random_vector(flat, seed, whole=False):
    """Of every table that is looked up by rows some rows, of the others, or with `whole` of every one, all."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=flat.weights.dtype)

    dense, tables = torch.zeros(flat.dense, dtype=flat.weights.dtype), []
    for view in flat.views(dense, flat.dense_names).values():
        view.copy_(random(*view.shape))
    for table in flat.tables:
        rows = torch.randperm(V, generator=generator)[: V // 2].sort().values
        tables.append(Rows(rows, random(len(rows), H)) if table.row_wise and not whole else random(V, H))
    return Vector(dense, tables)


def gaps(flat):
    """[N], true where no parameter is."""
    found = torch.ones(len(flat.weights), dtype=torch.bool)
    for view in flat.views(found).values():
        view.fill_(False)
    return found


# Layout


@kinds
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


def test_views_are_cut_alike_from_any_buffer():
    flat = FlatParameters(Model(), table_rows=V)
    numbers = torch.arange(len(flat.weights))
    for name, view in flat.views(numbers).items():
        assert view.shape == flat.parameters[name].shape
        start = flat.offsets[name]
        assert torch.equal(view.flatten(), numbers[start : start + view.numel()])
    assert flat.views(numbers[: flat.dense], ["out.weight"]).keys() == {"out.weight"}


def test_which_embeddings_are_tables():
    class Own(nn.Embedding):
        """May do anything in its forward."""

    module = nn.Module()
    module.small, module.big, module.own = nn.Embedding(7, 2), nn.Embedding(8, 2), Own(8, 2)
    module.clipped, module.scaled = nn.Embedding(8, 2, max_norm=1.0), nn.Embedding(8, 2, scale_grad_by_freq=True)
    module.tied, module.output = nn.Embedding(8, 2), nn.Linear(2, 8)
    module.output.weight = module.tied.weight
    module.twin, module.twins = nn.Embedding(8, 2), nn.Embedding(8, 2)
    module.twins.weight = module.twin.weight
    flat = FlatParameters(module, table_rows=8)
    assert {t.name: t.modules for t in flat.tables} == {
        "big.weight": [module.big],
        "twin.weight": [module.twin, module.twins],
    }


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
    module.to(torch.float64), module.cpu(), module.requires_grad_(True), module.train()  # which move nothing
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
    with safe_open(files[1], framework="pt") as file:
        assert {"bert.embeddings.word_embeddings.weight"} < set(file.keys())
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


@pytest.mark.parametrize("own", [True, False], ids=["FlatAdamW", "torch"])
def test_gaps_stay_zero(own):
    """Norms and decay go over them."""
    module = Model(dtype=torch.float32)
    flat = FlatParameters(module, table_rows=V)
    optimizer = FlatAdamW(flat, lr=0.1) if own else torch.optim.AdamW(flat.parameters.values(), lr=0.1)
    for seed in range(3):
        with flat.lookups() as lookups:
            loss = module(ids(seed)).square().mean()
        flat.accumulate(flat.gradients_of([loss], None, flat.leaves(), lookups))
        module(ids(seed)).sum().backward()
        assert not flat.gradients[gaps(flat)].any()
        optimizer.step()
        flat.clear_gradients()
    assert not flat.weights[gaps(flat)].any()


# Rows and vectors

SEEDS, COUNTS = st.integers(0, 10**6), st.integers(0, 7)


def random_part(seed, count):
    """Of a table [7, 2]: some rows, or with `count` None all of it."""
    generator = torch.Generator().manual_seed(seed)
    if count is None:
        return torch.randn(7, 2, generator=generator, dtype=torch.float64)
    rows = torch.randperm(7, generator=generator)[:count].sort().values
    return Rows(rows, torch.randn(count, 2, generator=generator, dtype=torch.float64))


def whole(part):
    return part.dense(torch.empty(7, 2, dtype=torch.float64)) if isinstance(part, Rows) else part


def flattened(vector):
    return torch.cat([t.flatten() for t in (vector.dense, *map(whole, vector.tables))])


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(parts=st.lists(st.tuples(SEEDS, st.none() | COUNTS, SEEDS, st.none() | COUNTS), max_size=3), seed=SEEDS,
       factor=st.sampled_from([1.0, -1.0, 0.3]))  # fmt: skip
def test_algebra(parts, seed, factor):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    a = Vector(dense[0], [random_part(*part[:2]) for part in parts])
    b = Vector(dense[1], [random_part(*part[2:]) for part in parts])
    x, y = flattened(a), flattened(b)
    for got, expected in (
        (a.scaled(factor), factor * x),
        (a.scaled(torch.tensor(factor, dtype=torch.float64)), factor * x),
        (a.plus(b), x + y),
        (a.plus(b, factor), x + factor * y),
    ):
        torch.testing.assert_close(flattened(got), expected, rtol=1e-15, atol=1e-15)  # a fused product rounds once
        torch.testing.assert_close(got.norm(), expected.norm(), rtol=1e-14, atol=0)
        for part in got.tables:
            assert not isinstance(part, Rows) or torch.equal(part.rows, part.rows.unique())
    assert torch.equal(flattened(a), x) and torch.equal(flattened(b), y), "neither was written to"


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(seed=SEEDS, count=COUNTS, shape=st.sampled_from([(), (0,), (5,), (2, 3)]))
def test_lookup_of_rows(seed, count, shape):
    part = random_part(seed, count)
    wanted = torch.randint(7, shape, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(part.lookup(wanted), whole(part)[wanted])


def test_rows_that_repeat_are_summed():
    rows, values = torch.tensor([3, 1, 3, 6, 3]), torch.arange(10.0).view(5, 2)
    got = Rows.summed(rows, values)
    assert torch.equal(got.rows, torch.tensor([1, 3, 6]))
    assert torch.equal(got.values, torch.tensor([[2.0, 3.0], [12.0, 15.0], [6.0, 7.0]]))
    none = Rows.summed(rows[:0], values[:0])
    assert none.rows.shape == (0,) and none.values.shape == (0, 2)


# Gradients and tangents


def reference(module, batch, cotangent):
    """Plain autograd's gradients on copies of the weights, zeros for none, and J d for a direction by name."""
    weights = {n: p.detach().clone().requires_grad_() for n, p in module.named_parameters() if p.requires_grad}
    out = functional_call(module, weights, (batch,))
    found = torch.autograd.grad(out, list(weights.values()), cotangent, materialize_grads=True, allow_unused=True)
    return out, dict(zip(weights, found, strict=True))


@kinds
def test_gradients_are_those_of_plain_autograd(kind):
    """Three batches: a table that the first finds used whole is right there and behind it."""
    module = Model(kind)
    flat = FlatParameters(module, table_rows=V)
    for seed in range(3):
        cotangent = torch.randn(4, 3, dtype=torch.float64)
        out, expected = reference(module, ids(seed), cotangent)
        with flat.lookups() as lookups:
            got = module(ids(seed))
        assert torch.equal(got, out)
        vector = flat.gradients_of([got], [cotangent], flat.leaves(), lookups)
        for name, gradient in by_name(flat, vector).items():
            assert error(gradient, expected[name]) < TOLERANCE, name
        assert vector.dense[gaps(flat)[: flat.dense]].abs().sum() == 0
        for table, part in zip(flat.tables, vector.tables, strict=True):
            by_rows = not (kind in WHOLE and table.name == "words.weight")
            assert table.row_wise == isinstance(part, Rows) == by_rows
            if by_rows:
                assert torch.equal(part.rows, part.rows.unique()) and len(part.rows) < V
    assert not any(m._forward_hooks for m in module.modules())
    assert all(p.grad is None for p in module.parameters())


def test_what_depends_on_nothing_is_zero():
    module = Model("unused")
    flat = FlatParameters(module, table_rows=V)
    with flat.lookups() as lookups:
        out = module(ids())
    words, other = flat.gradients_of([out.sum()], None, flat.leaves(), lookups).tables
    assert len(words.rows) == 0 and len(other.rows)
    for leaves in ({}, {"out.weight": module.out.weight}):
        with flat.lookups() as lookups:
            out = module(ids())
        part = flat.gradients_of([out.sum()], None, leaves, lookups).dense
        views = flat.views(part, flat.dense_names)
        assert {name for name, view in views.items() if view.any()} == set(leaves)


def test_a_module_of_tables_alone():
    module = nn.Embedding(V, H)
    flat = FlatParameters(module, table_rows=1)
    assert flat.dense == 0 and flat.dense_names == []
    with flat.lookups() as lookups:
        out = module(torch.tensor([1, 4, 1]))
    (part,) = flat.gradients_of([out.sum()], None, flat.leaves(), lookups).tables
    assert torch.equal(part.rows, torch.tensor([1, 4])) and torch.equal(part.values[:, 0], torch.tensor([2.0, 1.0]))


def test_several_outputs_and_a_graph_that_is_kept():
    module = Model()
    flat = FlatParameters(module, table_rows=V)
    with flat.lookups() as lookups:
        outputs = [module(ids(0)), module(ids(1))]
    cotangents = [torch.randn(4, 3, dtype=torch.float64) for _ in outputs]
    expected = [reference(module, ids(seed), c)[1] for seed, c in enumerate(cotangents)]
    first = flat.gradients_of(outputs, cotangents, flat.leaves(), lookups, retain_graph=True)
    second = flat.gradients_of(outputs, cotangents, flat.leaves(), lookups)
    again = by_name(flat, second)
    for name, gradient in by_name(flat, first).items():
        assert error(gradient, expected[0][name] + expected[1][name]) < TOLERANCE
        assert torch.equal(again[name], gradient)


@kinds
@pytest.mark.parametrize("whole", [False, True], ids=["rows", "whole"])  # as SGD's pilot goes, and as AdamW's
@pytest.mark.parametrize("second", [False, True], ids=["forward", "forward over reverse"])
def test_tangents_are_those_of_plain_forward_mode(kind, second, whole):
    module = Model(kind)
    flat = FlatParameters(module, table_rows=V)
    batch = ids(5)
    with flat.lookups() as lookups:
        out = module(batch)
    flat.gradients_of([out.sum()], None, flat.leaves(), lookups)  # which finds out how tables are used
    direction = random_vector(flat, 1, whole)

    def directional(duals, lookups):
        out = functional_call(module, duals, (batch,))
        inputs = [*duals.values(), *lookups.leaves]
        found = torch.autograd.grad(out.square().sum(), inputs, allow_unused=True) if second else ()
        tangent, *others = [g if g is None else forward_ad.unpack_dual(g).tangent for g in (out, *found)]
        return tangent, others

    def dual(name, tangent):
        return forward_ad.make_dual(flat.parameters[name].detach().requires_grad_(second), tangent)

    with torch.set_grad_enabled(second), forward_ad.dual_level():
        dense = {n: dual(n, t) for n, t in by_name(flat, direction).items()}
        with flat.lookups(differentiate=second) as none:
            pass
        expected, expected_hd = directional(dense, none)
        duals = {n: dual(n, t) for n, t in flat.tangents(direction).items()}
        assert duals.keys() == dense.keys() - {t.name for t in flat.tables if t.row_wise and not whole}
        with flat.lookups(direction, second) as lookups:
            got, hd = directional(duals, lookups)
    assert error(got, expected) < TOLERANCE
    if second:
        vector = flat.vector(dict(zip(duals, hd, strict=False)), lookups, hd[len(duals) :])
        expected_hd = dict(zip(dense, expected_hd, strict=True))
        for name, gradient in by_name(flat, vector).items():
            if expected_hd[name] is None:
                assert not gradient.any()
            else:
                assert error(gradient, expected_hd[name]) < TOLERANCE, name


def test_rows_cannot_stand_for_a_table_that_is_used_whole():
    flat = FlatParameters(Model("whole"), table_rows=V)
    direction = random_vector(flat, 0)
    flat.tables[0].row_wise = False
    with pytest.raises(RuntimeError, match="words.weight is used whole"):
        flat.tangents(direction)
    assert flat.tangents(direction, ["out.bias"]).keys() == {"out.bias"}
    assert flat.tangents(random_vector(flat, 0), dtype=torch.bfloat16)["words.weight"].dtype == torch.bfloat16


def test_hooks_are_gone_also_when_the_forward_raises():
    module = Model()
    flat = FlatParameters(module, table_rows=V)
    with pytest.raises(IndexError), flat.lookups():
        assert module.words._forward_hooks
        module(torch.tensor([[V]]))
    assert not any(m._forward_hooks for m in module.modules())


# Gradients for an optimizer


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(
    kind=st.sampled_from(["plain", "whole", "unused"]),
    events=st.lists(
        st.sampled_from(["accumulate", "backward", "to none", "to zero", "clear", "norm", "scale"]), max_size=12
    ),
)
@example("plain", ["accumulate", "to none", "backward"])
def test_gradients_are_what_everybody_added(kind, events):
    """Ours by rows, a user's `backward()` into `.grad`, an optimizer's `zero_grad` either way, in any order."""
    module = Model(kind)
    flat = FlatParameters(module, table_rows=V)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    expected = {n: torch.zeros_like(p) for n, p in flat.parameters.items()}
    for seed, event in enumerate(events):
        if event in ("accumulate", "backward"):
            _, added = reference(module, ids(seed), torch.ones(4, 3, dtype=torch.float64))
            if event == "accumulate":
                with flat.lookups() as lookups:
                    out = module(ids(seed))
                vector = flat.gradients_of([out.sum()], None, flat.leaves(), lookups)
                flat.accumulate(vector)
            else:
                module(ids(seed)).sum().backward()
            expected = {n: g + added[n] for n, g in expected.items()}
        elif event == "scale":
            flat.gradients.mul_(0.5)
            expected = {n: g * 0.5 for n, g in expected.items()}
        elif event != "norm":
            clear = {"to none": optimizer.zero_grad, "to zero": lambda: optimizer.zero_grad(False)}
            clear.get(event, flat.clear_gradients)()
            expected = {n: torch.zeros_like(g) for n, g in expected.items()}
        if event == "norm":
            length = torch.cat([g.flatten() for g in expected.values()]).norm()
            torch.testing.assert_close(flat.gradient_norm(), length, rtol=1e-12, atol=0)
    views = flat.views(flat.gradients)
    for name, p in flat.parameters.items():
        assert p.grad.data_ptr() == views[name].data_ptr() and p.grad.shape == p.shape
        assert error(p.grad, expected[name]) < TOLERANCE if expected[name].any() else not p.grad.any()
    assert not flat.gradients[gaps(flat)].any()
    flat.clear_gradients()
    assert not flat.gradients.any() and flat.gradient_norm() == 0


def test_the_norm_of_rows_needs_only_the_rows():
    """And takes each once, however often it was added to."""
    module = Model()
    flat = FlatParameters(module, table_rows=V)
    flat.clear_gradients()
    for _ in range(2):
        rows = Rows(torch.tensor([2, 5]), torch.ones(2, H, dtype=torch.float64))
        flat.accumulate(Vector(flat.weights.new_zeros(flat.dense), [rows, rows]))
    assert [torch.cat(touched).tolist() for touched in flat._touched] == [[2, 5, 2, 5]] * 2
    torch.testing.assert_close(flat.gradient_norm().item(), (2 * 2 * H * 4) ** 0.5)
    flat.clear_gradients()
    assert not flat.gradients.any() and flat._touched == [[], []]


def test_gradients_from_before_the_flattening_count():
    module = Model()
    module(ids()).sum().backward()
    before = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    flat = FlatParameters(module, table_rows=V)
    found = flat.views(flat.gradients)
    assert all(torch.equal(found[n], g) for n, g in before.items())


# The bf16 shadow


def test_there_is_no_shadow_until_it_is_asked_for():
    flat = FlatParameters(Model(dtype=torch.float32), table_rows=V)
    assert flat.shadow is None and flat.leaves() is flat.parameters
    leaves = flat.leaves(low_precision=True)
    assert leaves.keys() == flat.parameters.keys()
    for name, leaf in leaves.items():
        assert leaf.dtype == torch.bfloat16 and leaf.is_leaf and leaf.requires_grad
        assert leaf.data_ptr() == flat.shadow[flat.offsets[name] :].data_ptr()


def rewrite(module, flat, how):
    state = {n: t * 1.5 for n, t in module.state_dict().items()}
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    if how == "load_state_dict":
        module.load_state_dict(state)
    elif how == "in place":
        nn.init.normal_(module.out.weight)
    elif how == "FlatAdamW":
        FlatAdamW(flat, lr=0.1).step()
    else:
        optimizer = getattr(torch.optim, how.removeprefix("foreach "))
        optimizer(flat.parameters.values(), lr=0.1, foreach="foreach" in how).step()


@pytest.mark.parametrize("how", ["load_state_dict", "in place", "FlatAdamW", "AdamW", "foreach AdamW", "SGD"])
def test_the_shadow_follows_the_weights(how):
    """The leaves stay the same tensors, and a graph that was recorded on them can still be differentiated."""
    module = Model(dtype=torch.float32)
    flat = FlatParameters(module, table_rows=V)
    leaves = dict(flat.leaves(low_precision=True))
    out = functional_call(module, {**leaves, "shift": module.shift.bfloat16()}, (ids(),))
    before = flat.weights.clone()
    for _ in range(2):
        rewrite(module, flat, how)
        again = flat.leaves(low_precision=True)
        assert not torch.equal(flat.weights, before)
        assert torch.equal(flat.shadow, flat.weights.bfloat16())
        assert all(again[n] is leaf for n, leaf in leaves.items())
        before = flat.weights.clone()
    out.sum().backward()


def test_gradients_on_the_shadow_are_in_the_weights_dtype():
    """A table's rows are summed in float32, better than the bf16 sums of autograd (8 bits: 4e-2 of the largest)."""
    module = Model("used twice", dtype=torch.float32)
    flat = FlatParameters(module, table_rows=V)
    leaves = flat.leaves(low_precision=True)
    weights = {**leaves, "shift": module.shift.bfloat16()}
    out = functional_call(module, weights, (ids(),))
    expected = torch.autograd.grad(out.sum(), list(leaves.values()))
    with flat.lookups() as lookups:
        out = functional_call(module, weights, (ids(),))
    found = by_name(flat, flat.gradients_of([out.sum()], None, leaves, lookups))
    for (name, leaf), gradient in zip(leaves.items(), expected, strict=True):
        assert found[name].dtype == torch.float32 and gradient.dtype == leaf.dtype == torch.bfloat16
        if leaf.ndim == 2 and len(leaf) == V:
            assert error(found[name], gradient.float()) < 4e-2
        else:
            assert torch.equal(found[name], gradient.float())
