"""Gradients and tangents by rows are those of plain autograd; what an optimizer finds is what everybody added."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from flat_helpers import KINDS, H, Model, V, by_name, error, gaps, ids
from hypothesis import example, given, settings
from hypothesis import strategies as st
from time_machine_helpers import random_step
from torch import nn
from torch.func import functional_call

from engine.params.flat import FlatParameters, Lookups
from engine.params.optim import FlatAdamW
from engine.params.vectors import Rows

# Largest difference over the largest expected entry, in float64: sums in another order.
TOLERANCE = 1e-13
WHOLE = {"whole", "whole alone"}
kinds = pytest.mark.parametrize("kind", KINDS)


def reference(module, batch, cotangent):
    """Plain autograd's output and its gradients on copies of the weights, zeros for none."""
    weights = {n: p.detach().clone().requires_grad_() for n, p in module.named_parameters() if p.requires_grad}
    out = functional_call(module, weights, (batch,))
    found = torch.autograd.grad(out, list(weights.values()), cotangent, materialize_grads=True, allow_unused=True)
    return out, dict(zip(weights, found, strict=True))


@kinds
def test_gradients_are_those_of_plain_autograd(kind):
    """Of two outputs, by a graph that is kept; a table that the first batch finds used whole is right there and behind it."""
    module = Model(kind)
    flat = FlatParameters(module, table_rows=V)
    for seed in range(3):
        batches, cotangents = [ids(seed), ids(seed + 10)], torch.randn(2, 4, 3, dtype=torch.float64)
        outputs, expected = zip(
            *(reference(module, b, c) for b, c in zip(batches, cotangents, strict=True)), strict=True
        )
        with flat.lookups() as lookups:
            got = [module(b) for b in batches]
        assert all(torch.equal(a, b) for a, b in zip(got, outputs, strict=True))
        vector = flat.gradients_of(got, cotangents.unbind(), flat.leaves(), lookups, retain_graph=True)
        again = by_name(flat, flat.gradients_of(got, cotangents.unbind(), flat.leaves(), lookups))
        for name, gradient in by_name(flat, vector).items():
            assert error(gradient, expected[0][name] + expected[1][name]) < TOLERANCE, name
            assert torch.equal(again[name], gradient)
        assert vector.dense[gaps(flat)[: flat.dense]].abs().sum() == 0
        for table, part in zip(flat.tables, vector.tables, strict=True):
            by_rows = not (kind in WHOLE and table.name == "words.weight")
            assert table.row_wise == isinstance(part, Rows) == by_rows
            if by_rows:
                assert torch.equal(part.rows, part.rows.unique()) and len(part.rows) < V
    with pytest.raises(IndexError), flat.lookups():
        assert any(m._forward_hooks for m in module.modules())
        module(ids() + V)
    assert not any(m._forward_hooks for m in module.modules())
    assert all(p.grad is None for p in module.parameters())


def test_what_depends_on_nothing_is_zero():
    module = Model("unused")
    flat = FlatParameters(module, table_rows=V)
    for leaves in (flat.leaves(), {}, {"out.weight": module.out.weight}):
        with flat.lookups() as lookups:
            out = module(ids())
        found = flat.gradients_of([out.sum()], None, leaves, lookups)
        dense = flat.views(found.dense, flat.dense_names)
        assert {name for name, view in dense.items() if view.any()} == leaves.keys() & set(flat.dense_names)
        words, other = found.tables
        assert len(words.rows) == 0 and len(other.rows)


def test_a_module_of_tables_alone():
    module = nn.Embedding(V, H)
    flat = FlatParameters(module, table_rows=1)
    assert flat.dense == 0 and flat.dense_names == []
    with flat.lookups() as lookups:
        out = module(torch.tensor([1, 4, 1]))
    (part,) = flat.gradients_of([out.sum()], None, flat.leaves(), lookups).tables
    assert torch.equal(part.rows, torch.tensor([1, 4])) and torch.equal(part.values[:, 0], torch.tensor([2.0, 1.0]))


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
    direction = random_step(flat, 1, whole)

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
    direction = random_step(flat, 0)
    flat.tables[0].row_wise = False
    with pytest.raises(RuntimeError, match="words.weight is used whole"):
        flat.tangents(direction)
    assert flat.tangents(direction, ["out.bias"]).keys() == {"out.bias"}
    assert flat.tangents(random_step(flat, 0), dtype=torch.bfloat16)["words.weight"].dtype == torch.bfloat16


# Gradients for an optimizer

EVENTS = ["ours", "backward", "to none", "to zero", "clear", "norm", "scale"]


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(
    kind=st.sampled_from(["plain", "whole", "unused"]),
    events=st.lists(st.sampled_from(EVENTS), max_size=12),
    earlier=st.booleans(),
)
@example("plain", ["ours", "to none", "backward"], False)
@example("plain", ["norm", "ours"], True)
def test_gradients_are_what_everybody_added(kind, events, earlier):
    """Ours by rows, a user's `backward()` into `.grad`, also from before, an optimizer's `zero_grad` either way, in any
    order. Between the weights there are zeros, over which norms and decay go."""
    module = Model(kind)
    if earlier:
        module(ids(99)).sum().backward()
    expected = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in module.named_parameters()}
    flat = FlatParameters(module, table_rows=V)
    optimizer, expected = torch.optim.SGD(module.parameters(), lr=0.1), {n: expected[n] for n in flat.parameters}
    clear = {
        "to none": optimizer.zero_grad,
        "to zero": lambda: optimizer.zero_grad(False),
        "clear": flat.clear_gradients,
    }
    for seed, event in enumerate(events):
        if event in ("ours", "backward"):
            _, added = reference(module, ids(seed), torch.ones(4, 3, dtype=torch.float64))
            if event == "ours":
                with flat.lookups() as lookups:
                    out = module(ids(seed))
                flat.backward([out.sum()], None, flat.leaves(), lookups)
            else:
                module(ids(seed)).sum().backward()
            expected = {n: g + added[n] for n, g in expected.items()}
        elif event == "scale":
            flat.gradients.mul_(0.5)
            expected = {n: g * 0.5 for n, g in expected.items()}
        elif event in clear:
            clear[event]()
            expected = {n: torch.zeros_like(g) for n, g in expected.items()}
        else:
            length = torch.cat([g.flatten() for g in expected.values()]).norm()
            torch.testing.assert_close(flat.gradient_norm(), length, rtol=1e-12, atol=0)
    views = flat.views(flat.gradients)
    for name, p in flat.parameters.items():
        assert p.grad.data_ptr() == views[name].data_ptr() and p.grad.shape == p.shape
        assert error(p.grad, expected[name]) < TOLERANCE if expected[name].any() else not p.grad.any()
    FlatAdamW(flat, lr=0.1).step()
    assert not flat.gradients[gaps(flat)].any() and not flat.weights[gaps(flat)].any()
    flat.clear_gradients()
    assert not flat.gradients.any() and flat.gradient_norm() == 0


def test_the_norm_of_rows_needs_only_the_rows():
    module = Model()
    flat = FlatParameters(module, table_rows=V)
    found, values = (
        Lookups({0, 1}, [(i, torch.tensor([5, 2]), None) for i in range(2)]),
        torch.ones(2, H, dtype=torch.float64),
    )
    for _ in range(2):
        flat.add({}, found, [values, values])
    assert [torch.cat(touched).tolist() for touched in flat._touched] == [[2, 5, 2, 5]] * 2
    torch.testing.assert_close(flat.gradient_norm().item(), (2 * 2 * H * 4) ** 0.5)
    flat.clear_gradients()
    assert flat._touched == [[], []]


# The bf16 shadow


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
    """Once it is asked for. The leaves stay the same tensors, and a graph recorded on them can still be differentiated."""
    module = Model(dtype=torch.float32)
    flat = FlatParameters(module, table_rows=V)
    assert flat.shadow is None and flat.leaves() is flat.parameters
    leaves = dict(flat.leaves(low_precision=True))
    assert leaves.keys() == flat.parameters.keys()
    for name, leaf in leaves.items():
        assert leaf.dtype == torch.bfloat16 and leaf.is_leaf and leaf.requires_grad
        assert leaf.data_ptr() == flat.shadow[flat.offsets[name] :].data_ptr()
    out = functional_call(module, {**leaves, "shift": module.shift.bfloat16()}, (ids(),))
    for _ in range(2):
        before = flat.weights.clone()
        rewrite(module, flat, how)
        again = flat.leaves(low_precision=True)
        assert not torch.equal(flat.weights, before)
        assert torch.equal(flat.shadow, flat.weights.bfloat16())
        assert all(again[n] is leaf for n, leaf in leaves.items())
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
