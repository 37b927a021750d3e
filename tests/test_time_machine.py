"""A rewound module is the same to the last bit, and so is a gradient from a graph that was kept over an excursion."""

import pytest
import torch
from torch import nn

from engine.time_machine import RandomState, TimeMachine


@pytest.fixture
def module():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))
    module[0].bias.requires_grad_(False)  # a frozen weight
    return module.train()


@pytest.fixture
def x():
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(1))


def everything(module):
    return {n: t.detach().clone() for n, t in [*module.named_parameters(), *module.named_buffers()]}


def differing(a, b):
    assert a.keys() == b.keys()
    return {name for name in a if not torch.equal(a[name], b[name])}


def trainable(module):
    return [p for p in module.parameters() if p.requires_grad]


def pilot(module, machine, x, lr=0.1):
    """A step with everything that a pilot touches: random numbers, buffers, weights."""
    gradients = torch.autograd.grad(module(x).square().mean(), trainable(module))
    machine.advance(gradients, lr)


MOVED = {"0.weight", "1.weight", "1.bias", "4.weight", "4.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"}  # fmt: skip


def test_excursion_comes_back_bit_exact(module, x):
    machine, before = TimeMachine(module), everything(module)
    for _ in range(2):  # the slot is reused
        with machine.excursion():
            for _ in range(3):
                pilot(module, machine, x)
            assert differing(before, everything(module)) == MOVED
        assert differing(before, everything(module)) == set()


def test_excursion_comes_back_when_the_body_raises(module, x):
    machine, before = TimeMachine(module), everything(module)
    with pytest.raises(ZeroDivisionError), machine.excursion():
        pilot(module, machine, x)
        raise ZeroDivisionError
    assert differing(before, everything(module)) == set()


def test_not_a_number_does_not_survive_a_rewind(module):
    machine, before = TimeMachine(module), everything(module)
    with machine.excursion():
        machine.advance([torch.full_like(p, float("nan")) for p in trainable(module)], 1.0)
        assert module[0].weight.isnan().all()
    assert differing(before, everything(module)) == set()


def test_advance_is_plain_sgd_on_the_trainable_weights(module):
    before = everything(module)
    gradients = [torch.randn_like(p) for p in trainable(module)]
    TimeMachine(module).advance(gradients, 0.3)
    by_name = dict(zip((n for n, p in module.named_parameters() if p.requires_grad), gradients, strict=True))
    for name, now in everything(module).items():
        expected = before[name].add(by_name[name], alpha=-0.3) if name in by_name else before[name]
        assert torch.equal(now, expected), name


def test_slots_are_independent(module, x):
    machine, states = TimeMachine(module), []
    for slot in range(3):
        machine.snapshot(slot)
        states.append(everything(module))
        pilot(module, machine, x)
    assert differing(states[0], states[1]) == differing(states[1], states[2]) == MOVED
    for slot in (2, 0, 1, 1):
        machine.rewind(slot)
        assert differing(states[slot], everything(module)) == set()
    with pytest.raises(KeyError):
        machine.rewind(3)


def test_a_snapshot_is_a_copy(module, x):
    """Writes by an optimizer, which are in place and known to autograd, do not reach it."""
    machine, before = TimeMachine(module), everything(module)
    machine.snapshot()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(x).sum().backward()
    optimizer.step()
    machine.rewind()
    assert differing(before, everything(module)) == set()


def test_a_kept_graph_outlives_an_excursion(module, x):
    machine = TimeMachine(module)
    loss = module(x).square().mean()
    first = torch.autograd.grad(loss, trainable(module), retain_graph=True)
    versions = [p._version for p in module.parameters()]
    with machine.excursion():
        pilot(module, machine, x)
        inside = torch.autograd.grad(module(x).square().mean(), trainable(module))
    assert versions == [p._version for p in module.parameters()]
    second = torch.autograd.grad(loss, trainable(module))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, inside, strict=True))


def test_random_state_replays_dropout(module, x):
    state = RandomState([p.device for p in module.parameters()])
    first, other = module(x), module(x)
    assert not torch.equal(first, other)
    after = torch.get_rng_state()
    state.restore()
    assert torch.equal(module(x), first)
    assert torch.equal(module(x), other)
    assert torch.equal(torch.get_rng_state(), after)
    state.restore()  # it can be used again
    assert torch.equal(module(x), first)


def test_perturbed_goes_along_and_comes_back_bit_for_bit():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    before = [t.detach().clone() for t in [*module.parameters(), *module.buffers()]]
    direction = [torch.randn_like(p) for p in module.parameters()]
    machine = TimeMachine(module)
    with pytest.raises(ZeroDivisionError), machine.perturbed(direction, torch.tensor(0.3)):
        for p, b, d in zip(module.parameters(), before, direction, strict=False):
            assert torch.equal(p, b + 0.3 * d)
        module(torch.randn(3, 4))  # moves the running statistics
        raise ZeroDivisionError
    assert all(torch.equal(t, b) for t, b in zip([*module.parameters(), *module.buffers()], before, strict=True))
