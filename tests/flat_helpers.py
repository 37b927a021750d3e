"""A module whose embedding tables are used in many ways, for tests of flat parameters and of gradients by rows."""

import torch
import torch.nn.functional as F
from torch import nn

from engine.params.vectors import Rows

V, H, PAD = 11, 5, 0
KINDS = ["plain", "padding", "tied tables", "used twice", "whole", "whole alone", "frozen", "unused", "keyword"]


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


def ids(seed=0, size=4):
    """[B, 6], with repetitions and padding."""
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


def joined(flat, vector):
    """[N], without the gaps"""
    return torch.cat([t.flatten() for t in by_name(flat, vector).values()])


def gaps(flat):
    """[N], true where no parameter is."""
    found = torch.ones(len(flat.weights), dtype=torch.bool)
    for view in flat.views(found).values():
        view.fill_(False)
    return found
