"""A small module with all that a time machine has to bring back, and looks at it. Imports little: GPU tests use it."""

import torch
from torch import nn

from engine.meta.time_machine import TimeMachine
from engine.params.flat import FlatParameters, Rows, Vector


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
    """Anything in the dense part; of each table some rows (none and all of them too), or with `whole` all of it."""
    generator = torch.Generator().manual_seed(seed)
    dense, tables = torch.zeros(flat.dense, device=flat.weights.device), []
    for view in flat.views(dense, flat.dense_names).values():
        view.copy_(torch.randn(view.shape, generator=generator))
    for table in flat.tables:
        V, H = table.weight.shape
        count = int(torch.randint(V + 1, (), generator=generator))
        rows = torch.arange(V) if whole else torch.randperm(V, generator=generator)[:count].sort().values
        values = torch.randn(len(rows), H, generator=generator).to(dense)
        tables.append(values if whole else Rows(rows.to(dense.device), values))
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
