"""FlatAdamW takes torch.optim.AdamW's steps, and either goes on from the other's state."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from engine.params.flat import FlatParameters
from engine.params.optim import FlatAdamW

# Largest difference of a weight after 10 steps, the weights being of size 1. Adam divides by the gradient's own size, so
# that rounding in a small gradient is multiplied; in float32 1e-7 becomes up to 1e-5.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
SETTINGS = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6}
DECAY = 0.1


class Model(nn.Module):
    """A table, vectors, matrices, a frozen weight."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.hidden, self.norm = nn.Embedding(13, 5), nn.Linear(5, 5), nn.LayerNorm(5)
        self.out = nn.Linear(5, 3)
        self.hidden.bias.requires_grad_(False)
        self.to(dtype)

    def forward(self, ids):
        return self.out(torch.tanh(self.norm(self.hidden(self.words(ids))))).square().sum()


def ids(seed):
    """A few of the rows, other ones every time."""
    return torch.randint(13, (4,), generator=torch.Generator().manual_seed(seed))


def ours(module, table_rows=1):
    return FlatAdamW(FlatParameters(module, table_rows), weight_decay=DECAY, **SETTINGS)


def theirs(module):
    parameters = [p for p in module.parameters() if p.requires_grad]
    matrices, vectors = ([p for p in parameters if (p.ndim >= 2) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, foreach=False, **SETTINGS)


def backward(module, optimizer, seed):
    """A gradient for every trained weight: a row that was not looked up has 0."""
    if isinstance(optimizer, FlatAdamW):
        flat = optimizer.flat
        with flat.lookups() as lookups:
            loss = module(ids(seed))
        flat.accumulate(flat.gradients_of([loss], None, flat.leaves(), lookups))
    else:
        optimizer.zero_grad()
        module(ids(seed)).backward()


def train(module, optimizer, steps, clip=None, schedule=None):
    for step in steps:
        backward(module, optimizer, step)
        if isinstance(optimizer, FlatAdamW):
            optimizer.step(clip=None if clip is None else clip.to(optimizer.flat.weights.dtype))
            optimizer.flat.clear_gradients()
        else:
            for p in module.parameters():
                if clip is not None and p.grad is not None:
                    p.grad *= clip
            optimizer.step()
        if schedule is not None:
            schedule.step()


def apart(module, other):
    return max((a - b).abs().max().item() for a, b in zip(module.parameters(), other.parameters(), strict=True))


def bits(flat, optimizer):
    """Everything that a step may write."""
    moments = [t for p in flat.parameters.values() for t in optimizer.state[p].values()]
    return [t.clone() for t in (flat.weights, *moments, *([] if flat.shadow is None else [flat.shadow]))]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("table_rows", [1, 99], ids=["rows", "dense"])
def test_ten_steps_are_those_of_torch(table_rows, clip, dtype):
    module = Model(dtype)
    other = copy.deepcopy(module)
    clip = None if clip is None else torch.tensor(clip)
    for each, optimizer in ((module, ours(module, table_rows)), (other, theirs(other))):
        schedule = LambdaLR(optimizer, lambda step: (step + 1) / 4 if step < 3 else 0.9**step)
        train(each, optimizer, range(10), clip, schedule)
    assert apart(module, other) < TOLERANCE[dtype]
    assert apart(module, Model(dtype)) > 0.05
    assert torch.equal(module.hidden.bias, Model(dtype).hidden.bias)


def test_groups():
    """Decay is for what has two dimensions; a group without members is left out."""
    module = Model(torch.float32)
    optimizer = ours(module)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {id(p): DECAY if p.ndim >= 2 else 0.0 for p in module.parameters() if p.requires_grad}
    for bias, weight in ((False, True), (True, False)):
        part = nn.Linear(3, 2, bias=bias)
        part.weight.requires_grad_(weight)
        before = [p.detach().clone() for p in part.parameters()]
        optimizer = FlatAdamW(FlatParameters(part), lr=0.1)
        assert len(optimizer.param_groups) == 1
        part(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        moved = [not torch.equal(p, b) for p, b in zip(part.parameters(), before, strict=True)]
        assert moved == [p.requires_grad for p in part.parameters()]


def test_a_weight_without_gradient_decays():
    """Other than torch's, which leaves out what has no `.grad`."""
    module = Model(torch.float64)
    optimizer = ours(module)
    before = copy.deepcopy(module)
    train(module, optimizer, [])
    optimizer.step()
    for p, b in zip(module.parameters(), before.parameters(), strict=True):
        decayed = p.requires_grad and p.ndim >= 2
        torch.testing.assert_close(p, b * (1 - SETTINGS["lr"] * DECAY) if decayed else b, rtol=1e-15, atol=0)


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize(("first", "second"), [(ours, theirs), (theirs, ours), (ours, ours)])
def test_state_goes_from_one_kind_to_the_other(first, second, steps):
    """And where both are ours, what is resumed goes on bit for bit."""
    module = Model(torch.float64)
    optimizer = first(module)
    train(module, optimizer, range(steps))
    other = copy.deepcopy(module)
    resumed = second(other)
    if resumed.__class__ is FlatAdamW:  # whatever it did before
        kept = resumed.flat.weights.clone()
        train(other, resumed, [50, 51])
        resumed.flat.weights.copy_(kept)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, o in ((module, optimizer), (other, resumed)):
        train(each, o, range(steps, steps + 4))
    if first is second:
        assert same(bits(optimizer.flat, optimizer), bits(resumed.flat, resumed))
    assert apart(module, other) < TOLERANCE[torch.float64]
    mine, yours = optimizer.state_dict()["state"], resumed.state_dict()["state"]
    assert mine.keys() == yours.keys()
    for number, entries in mine.items():
        assert entries.keys() == yours[number].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert entries["step"] == yours[number]["step"] == steps + 4
        for key, value in entries.items():
            torch.testing.assert_close(yours[number][key], value, rtol=1e-9, atol=1e-15, check_dtype=False)


def test_settings_are_loaded_too():
    module, other = Model(torch.float32), Model(torch.float32)
    optimizer = FlatAdamW(FlatParameters(module), lr=0.5, betas=(0.1, 0.2), eps=1e-3, weight_decay=0.7)
    for make in (ours, theirs):
        loaded = make(other)
        loaded.load_state_dict(optimizer.state_dict())
        for group, expected in zip(loaded.param_groups, optimizer.param_groups, strict=True):
            assert all(group[key] == value for key, value in expected.items() if key != "params")


def test_a_closure_is_refused():
    with pytest.raises(ValueError, match="closure"):
        ours(Model(torch.float32)).step(lambda: None)
