"""The time machine under any sequence of steps, snapshots, rewinds and excursions, against copies of everything."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from time_machine_helpers import make, random_step, shadowed

NAMES = st.sampled_from("abc")
SEEDS = st.integers(0, 30)
SIMPLE = st.one_of(
    st.tuples(st.just("advance"), NAMES, SEEDS, st.booleans()),
    st.tuples(st.sampled_from(["rewind", "snapshot"]), NAMES),
)
OPERATION = st.recursive(
    SIMPLE,
    lambda inner: st.tuples(st.sampled_from(["perturbed", "excursion"]), SEEDS, st.lists(inner, max_size=4)),
    max_leaves=8,
)


class Copies:
    """The promises, kept by copying everything: a list of names and whole weights in order of time."""

    def __init__(self, flat):
        self.flat, self.kept, self.floor = flat, [], 0

    def take(self, name):
        # one from before an excursion is hidden while it lasts
        self.kept = [k for i, k in enumerate(self.kept) if i < self.floor or k[0] != name]
        self.kept.append((name, self.flat.weights.clone()))

    def find(self, name):
        """Its place, None for none, -1 for one that is out of reach."""
        found = [i for i, (n, _) in enumerate(self.kept) if n == name]
        return None if not found else found[-1] if found[-1] >= self.floor else -1


def carry_out(machine, copies, operation):
    kind, what, *rest = operation
    flat = machine.flat
    if kind in ("advance", "snapshot"):
        copies.take(what)
        if kind == "advance":
            machine.advance(random_step(flat, rest[0], whole=rest[1]), 0.1, what)
        else:
            machine.snapshot(what)
    elif kind == "rewind":
        at = copies.find(what)
        with nullcontext() if at is not None and at >= 0 else pytest.raises(KeyError if at is None else ValueError):
            machine.rewind(what)
        if at is not None and at >= 0:
            assert torch.equal(flat.weights, copies.kept[at][1])
            copies.kept = copies.kept[: at + 1]
    else:
        before, floor, kept = flat.weights.clone(), copies.floor, list(copies.kept)
        copies.floor = len(kept)
        step = random_step(flat, what)
        with machine.excursion() if kind == "excursion" else machine.perturbed(step, torch.tensor(0.1)):
            assert shadowed(flat)
            for inner in rest[0]:
                carry_out(machine, copies, inner)
        assert torch.equal(flat.weights, before)
        copies.floor, copies.kept = floor, kept
    assert shadowed(flat)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(operations=st.lists(OPERATION, max_size=12), low_precision=st.booleans())
def test_any_sequence_is_as_if_everything_had_been_copied(operations, low_precision):
    _, flat, machine = make(low_precision=low_precision)
    copies = Copies(flat)
    for operation in operations:
        carry_out(machine, copies, operation)
    for at in range(len(copies.kept) - 1, -1, -1):
        machine.rewind(copies.kept[at][0])
        assert torch.equal(flat.weights, copies.kept[at][1])
