"""A small module with all that a time machine has to bring back, and looks at it. Imports little: GPU tests use it."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from engine.meta.time_machine import TimeMachine
from engine.params.flat import FlatParameters
from engine.params.vectors import Rows, Vector


class Model(nn.Module):
    """Tables, vectors, matrices, a frozen weight; with a batch norm buffers and with dropout random numbers as well."""

    def __init__(self, batch_norm=True):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.kinds = nn.Embedding(11, 5), nn.Embedding(7, 5, padding_idx=0)
        self.norm = nn.BatchNorm1d(5) if batch_norm else nn.LayerNorm(5)
        self.dropout, self.out = nn.Dropout(0.5), nn.Linear(5, 3)
        self.norm.bias.requires_grad_(False)

    def forward(self, ids):
        return self.out(self.dropout(torch.tanh(self.norm(self.words(ids) + self.kinds(ids % 4)))))


FROZEN = {"norm.bias"}
BUFFERS = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}


def make(table_rows=1, store="device", device="cpu", low_precision=False, batch_norm=True):
    module = Model(batch_norm).train().to(device)
    flat = FlatParameters(module, table_rows)
    assert len(flat.tables) == (2 if table_rows == 1 else 0)
    if low_precision:
        flat.leaves(low_precision=True)
    return module, flat, TimeMachine(flat, store)


def ids(flat, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(11, (6,), generator=generator).to(flat.weights.device)


def random_step(flat, seed, whole=False):
    """Anything in the dense part; of each table that is looked up by rows some (none and all of them too), of the others, or
    with `whole` of every one, all."""
    generator = torch.Generator().manual_seed(seed)
    dense, tables = torch.zeros_like(flat.weights[: flat.dense]), []
    for view in flat.views(dense, flat.dense_names).values():
        view.copy_(torch.randn(view.shape, generator=generator))
    for table in flat.tables:
        (V, H), every_row = table.weight.shape, whole or not table.row_wise
        count = int(torch.randint(V + 1, (), generator=generator))
        rows = torch.arange(V) if every_row else torch.randperm(V, generator=generator)[:count].sort().values
        values = torch.randn(len(rows), H, generator=generator).to(dense)
        tables.append(values if every_row else Rows(rows.to(dense.device), values))
    return Vector(dense, tables)


def pilot(module, flat, machine, name, seed=0):
    """A step with everything that a pilot touches: random numbers, buffers, weights."""
    with flat.lookups() as lookups:
        loss = module(ids(flat, seed)).square().mean()
    machine.advance(flat.gradients_of([loss], None, flat.leaves(), lookups), -0.3, name)


def everything(module):
    return {n: t.detach().clone() for n, t in [*module.named_parameters(), *module.named_buffers()]}


def differing(a, b):
    assert a.keys() == b.keys()
    return {name for name in a if not torch.equal(a[name], b[name])}


def shadowed(flat):
    return flat.shadow is None or torch.equal(flat.shadow, flat.weights.bfloat16())


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
    """("advance", name, seed, whole), ("snapshot", name), ("rewind", name), or ("perturbed" or "excursion", seed, operations
    inside, whether it then raises)."""
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
        (inside, raises), step = rest, random_step(flat, what)
        context = machine.excursion() if kind == "excursion" else machine.perturbed(step, flat.weights.new_tensor(0.1))
        with pytest.raises(ZeroDivisionError) if raises else nullcontext(), context:
            assert shadowed(flat) and (kind == "excursion" or not torch.equal(flat.weights, before))
            for inner in inside:
                carry_out(machine, copies, inner)
            _ = 1 / (not raises)
        assert torch.equal(flat.weights, before)
        copies.floor, copies.kept = floor, kept
    assert shadowed(flat)


def follow(machine, operations):
    copies = Copies(machine.flat)
    for operation in operations:
        carry_out(machine, copies, operation)
    for name, weights in reversed(copies.kept):
        machine.rewind(name)
        assert torch.equal(machine.flat.weights, weights)
