"""Every kind of AdamW takes the paper's steps, is clipped and skipped on the device, and goes on from a saved state."""

import os
import signal

import fake_apex
import pytest
import torch
from device_helpers import NoReading
from hypothesis import example, given, settings
from hypothesis import strategies as st
from run_helpers import assert_same_models, flags, sentences, succeed, table, weights
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from engine.params import optim
from engine.params.flat import FlatParameters
from engine.params.native import Backend
from engine.params.optim import adamw, step
from engine.run import checkpoint
from engine.telemetry.monitor import Monitor
from engine.train import main

KINDS = ("flat", "torch", "apex")
kinds = pytest.mark.parametrize("kind", KINDS)
LR, DECAY = 0.02, 0.1
# Of a weight of size 1 after 20 steps, against float64. float32: 6e-8 a step of the weight itself, and 1 - 0.999^t, of which
# apex's float32 power has 3e-5 of its size in the first step: 1.5e-5 of a step of 0.02.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6}


@pytest.fixture(autouse=True)
def apex_everywhere(monkeypatch):
    """A stand-in, also without CUDA."""
    monkeypatch.setattr(optim, "check", lambda kind, device: None)
    monkeypatch.setattr(optim, "_fused_adam", lambda: fake_apex.FusedAdam)


class Weights(nn.Module):
    def __init__(self, shapes, dtype=torch.float32, seed=0):
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.all = nn.ParameterList(torch.randn(s, generator=random, dtype=torch.float64).to(dtype) for s in shapes)


STRANGERS = {
    "momentum": lambda flat: torch.optim.SGD(flat.parameters.values(), lr=0.1, momentum=0.9),
    "plain AdamW": lambda flat: torch.optim.AdamW(flat.parameters.values(), lr=0.1, amsgrad=True),
    "one by one": lambda flat: torch.optim.RMSprop(
        flat.parameters.values(), lr=0.1, momentum=0.9, weight_decay=0.1, foreach=False
    ),
    "fused SGD": lambda flat: torch.optim.SGD(flat.parameters.values(), lr=0.1, fused=True),
    "FusedAdam": lambda flat: fake_apex.FusedAdam(flat.parameters.values()),
    "capturable FusedAdam": lambda flat: fake_apex.FusedAdam(flat.parameters.values(), capturable=True),
}
SHAPES = [(3,), (4, 5), (17,), (2, 3, 2), (1, 1)]


class Setting:
    """Weights of some shapes with an optimizer; `train` takes steps on gradients that depend on the step's number only."""

    def __init__(self, kind, shapes=SHAPES, dtype=torch.float32, decay=DECAY, lr=LR, low_precision=False, device="cpu"):
        self.flat = FlatParameters(Weights(shapes, dtype).to(device))
        if low_precision:
            self.flat.leaves(low_precision=True)
        self.optimizer = STRANGERS[kind](self.flat) if kind in STRANGERS else adamw(kind, self.flat, lr, decay)
        self.schedule = LambdaLR(self.optimizer, factor)

    def gradients(self, number):
        """By name, float64: of sizes from 1e-3 to 1e3."""
        generator, shapes = torch.Generator().manual_seed(1000 + number), self.flat.parameters.items()
        found = {name: torch.randn(p.shape, generator=generator, dtype=torch.float64) for name, p in shapes}
        return {name: g * 10 ** (3 * torch.rand((), generator=generator)) for name, g in found.items()}

    def feed(self, number):
        for name, view in self.flat.views(self.flat.gradients).items():
            view.copy_(self.gradients(number)[name])

    def train(self, numbers, clip=None, found_inf=None):
        for number in numbers:
            self.feed(number)
            step(self.optimizer, self.flat, clip, found_inf)
            self.flat.clear_gradients()
            self.schedule.step()

    def tensors(self):
        """Everything that a step may move, copied."""
        found = [self.flat.weights, *([] if self.flat.shadow is None else [self.flat.shadow])]
        states = [self.optimizer.state.get(p, {}) for p in self.flat.parameters.values()]
        found += [state[key] for state in states for key in sorted(state)]
        return [t.clone() for t in found] + [c.clone() for c in self.counts()]

    def counts(self):  # of the groups, where they count
        return [group["step"] for group in self.optimizer.param_groups if "step" in group]


def factor(number):
    return (number + 1) / 3 if number < 3 else 0.93**number


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def by_hand(setting, steps, decay, clip=1.0):
    """The weights by name after AdamW's steps as the paper writes them, in float64."""
    found = {}
    shapes = [p.shape for p in setting.flat.parameters.values()]
    for name, p in Weights(shapes, setting.flat.weights.dtype).named_parameters():
        w = p.detach().double()
        m, v = torch.zeros_like(w), torch.zeros_like(w)
        for t in range(1, steps + 1):
            g, lr = clip * setting.gradients(t - 1)[name], LR * factor(t - 1)
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            move = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
            w = w - lr * (move + (decay * w if w.ndim >= 2 else 0))
        found[name] = w
    return found


@kinds
@settings(max_examples=8, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple), min_size=1, max_size=4),
    dtype=st.sampled_from(list(TOLERANCE)),
    decay=st.sampled_from([0.0, 0.5]),
    clip=st.sampled_from([None, 0.3, 0.0]),
)
@example([(3,)], torch.float32, 0.5, None)  # one group only
@example([(2, 3)], torch.float64, 0.5, 0.3)
@example(SHAPES, torch.float32, 0.5, 0.0)  # matrices decay, whatever is left of their gradient
def test_twenty_steps_are_adamws(kind, shapes, dtype, decay, clip):
    setting = Setting(kind, shapes, dtype, decay)
    setting.train(range(20), None if clip is None else torch.tensor(clip))
    assert {str(g["lr"].dtype) for g in setting.optimizer.param_groups if torch.is_tensor(g["lr"])} <= {"torch.float32"}
    expected = by_hand(setting, 20, decay, 1.0 if clip is None else float(torch.tensor(clip)))
    # apex's rate is float32 whatever the weights are: 6e-8 of it, over 20 steps of less than its size
    tolerance = 20 * LR * 6e-8 if kind == "apex" and dtype == torch.float64 else TOLERANCE[dtype]
    for name, p in setting.flat.parameters.items():
        assert (p - expected[name]).abs().max() < tolerance


@kinds
def test_groups_and_settings(kind):
    """Decay is for what has two dimensions; a group without members is left out."""
    optimizer = Setting(kind, lr=0.5).optimizer
    for group in optimizer.param_groups:
        assert group["betas"] == (0.9, 0.999) and group["eps"] == 1e-8
        assert {p.ndim >= 2 for p in group["params"]} == {group["weight_decay"] == DECAY}
        assert group["lr"] == pytest.approx(0.5 / 3)
    assert len(Setting(kind, [(3,)]).optimizer.param_groups) == 1


def test_what_is_refused():
    flat = FlatParameters(Weights(SHAPES))
    with pytest.raises(ValueError, match="'lion'; it must be one of flat, torch, apex"):
        adamw("lion", flat, LR, DECAY)
    with pytest.raises(ValueError, match="closure"):
        optim.FlatAdamW(flat).step(lambda: None)


@kinds
def test_a_rate_that_is_a_tensor_is_the_one_that_is_read(kind):
    flat, rate = FlatParameters(Weights(SHAPES)), torch.tensor(0.0)
    optimizer = adamw(kind, flat, rate, DECAY)
    assert all(group["lr"] is rate for group in optimizer.param_groups)
    for value in (0.0, LR):
        rate.fill_(value)
        before = flat.weights.clone()
        flat.gradients.fill_(1.0)
        step(optimizer, flat)
        assert torch.equal(flat.weights, before) == (value == 0)


# Schedules


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_schedule_gives_the_same_bits_with_rates_that_are_tensors(dtype):
    """0.02 is no float32: rounded before the schedule's factor and after it would be rounded twice."""
    number, tensor = Setting("flat", dtype=dtype), Setting("flat", dtype=dtype)
    tensor.optimizer = adamw("flat", tensor.flat, LR, DECAY)
    optim._rates_as_tensors(tensor.optimizer, LR, dtype)
    tensor.schedule = LambdaLR(tensor.optimizer, factor)
    held = [group["lr"] for group in tensor.optimizer.param_groups]
    for number_of_step in range(20):
        for each in (number, tensor):
            each.train([number_of_step])
        assert torch.equal(number.flat.weights, tensor.flat.weights), number_of_step
    assert all(group["lr"] is lr for group, lr in zip(tensor.optimizer.param_groups, held, strict=True))
    assert held[0] is not held[1] and float(held[0]) == float(torch.tensor(LR * factor(20), dtype=dtype))


# Skipping and clipping


@pytest.fixture
def as_on_a_device(monkeypatch):
    monkeypatch.setattr(optim, "AT_HAND", set())


@pytest.mark.parametrize("kind", [*KINDS, "fused SGD", "momentum", "plain AdamW", "one by one"])
@pytest.mark.parametrize("found", [1.0, 2.0, float("inf"), float("nan")])
@pytest.mark.parametrize("before", [0, 3])
def test_found_inf_moves_nothing(kind, found, before, as_on_a_device):
    """Not the weights, their shadow, the moments or the counts, also several times in turn; what comes next is as without."""
    setting, control = (Setting(kind, low_precision=True) for _ in range(2))
    for each in (setting, control):
        each.train(range(before))
    kept = setting.tensors()
    for number in (50, 51):
        setting.feed(number)
        setting.flat.gradients[2] = float("nan")
        step(setting.optimizer, setting.flat, torch.tensor(float("nan")), torch.tensor(found))
        setting.flat.clear_gradients()
        weights, shadow, *state = setting.tensors()
        assert same([weights, shadow], kept[:2])
        assert same(state, kept[2:]) if before else not any(t.any() for t in state)  # what a first step makes is zero
    for each in (setting, control):
        each.train(range(before, before + 3), torch.tensor(0.5), torch.tensor(0.0))
    assert same(setting.tensors(), control.tensors())


@pytest.mark.parametrize("kind", [*KINDS, "fused SGD", "momentum"])
@pytest.mark.parametrize("clip", [1.0, 0.37])
def test_clip_is_clipping_by_hand(kind, clip):
    """Where no inf was found. torch's fused kernels divide by the reciprocal: two roundings of 6e-8 in a gradient of up to
    1e3, whose size Adam's step divides out; they may change the last bits of a weight."""
    moves = {"torch": LR, "fused SGD": 0.1 * 1e3}
    one, other = Setting(kind), Setting(kind)
    for number in range(5):
        one.train([number], torch.tensor(clip), torch.tensor(0.0))
        other.feed(number)
        other.flat.gradients.mul_(clip)
        step(other.optimizer, other.flat)
        other.flat.clear_gradients()
        other.schedule.step()
    if kind in moves:
        torch.testing.assert_close(one.flat.weights, other.flat.weights, rtol=2.4e-7, atol=5 * moves[kind] * 2.4e-7)
        assert not hasattr(one.optimizer, "found_inf") and not hasattr(one.optimizer, "grad_scale")
    else:
        assert same(one.tensors(), other.tensors())


def test_on_a_cpu_an_optimizer_of_any_kind_is_left_out():
    setting = Setting("momentum")
    setting.optimizer.register_step_pre_hook(lambda *_: pytest.fail("it stepped"))
    setting.feed(0)
    kept = setting.tensors()
    for found in (1.0, float("nan")):
        step(setting.optimizer, setting.flat, torch.tensor(float("nan")), torch.tensor(found))
    assert same(setting.tensors(), kept)


@pytest.mark.parametrize("kind", [*KINDS, "momentum"])
def test_a_step_reads_nothing(kind, monkeypatch, as_on_a_device):
    monkeypatch.setattr("engine.params.native._chosen", Backend("torch", "for this test"))
    setting = Setting(kind, low_precision=True)
    clip, found = torch.tensor(0.5), torch.tensor(0.0)
    for number in range(2):
        setting.feed(number)
        with NoReading():
            step(setting.optimizer, setting.flat, clip, found)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoReading():
        clip.item()


# Checkpoints


@pytest.mark.parametrize("at", [0, 1, 4])
@pytest.mark.parametrize(
    ("first", "second"), [*((k, k) for k in KINDS), ("flat", "torch"), ("torch", "flat")], ids="-".join
)
def test_going_on_from_a_checkpoint(first, second, at, tmp_path):
    """Of one kind bit for bit, counts of groups too; a flat one is one of torch's, and the other way round.

    Rates that are tensors stay the tensors that schedules and graphs hold.
    """
    whole, again = Setting(first, dtype=torch.float64), Setting(second, dtype=torch.float64)
    whole.train(range(at))
    checkpoint.save(tmp_path / "c.safetensors", checkpoint.optimizer_tensors(whole.optimizer), {})
    again.train(range(60, 62))  # whatever it did before
    held = [group["lr"] for group in again.optimizer.param_groups]
    again.flat.weights.copy_(whole.flat.weights)
    checkpoint.restore_optimizer(again.optimizer, checkpoint.load(tmp_path / "c.safetensors")[0])
    for group, lr in zip(again.optimizer.param_groups, held, strict=True):
        assert group["lr"] is lr or not torch.is_tensor(lr)
        rate = LR * factor(at)
        group["lr"].fill_(rate) if torch.is_tensor(lr) else group.update(lr=rate)
    again.schedule.last_epoch = at
    for each in (whole, again):
        each.train(range(at, at + 3))
    if first == second:
        assert same(whole.tensors(), again.tensors())
    saved, expected = (checkpoint.optimizer_tensors(each.optimizer) for each in (again, whole))
    assert saved.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(saved[key], value, rtol=1e-9, atol=1e-15, check_dtype=False)
        assert not key.endswith("step") or int(saved[key]) == at + 3
    torch.testing.assert_close(again.flat.weights, whole.flat.weights, rtol=0, atol=TOLERANCE[torch.float64])
    if second == "torch":
        assert all(group["fused"] for group in again.optimizer.param_groups)


@pytest.mark.parametrize("kind", ["FusedAdam", "capturable FusedAdam"])
def test_a_groups_count_comes_back_as_what_it_was(kind):
    """A number, or a tensor of its own."""
    one, new, used = Setting(kind), Setting(kind), Setting(kind)
    empty = checkpoint.optimizer_tensors(one.optimizer)
    one.train(range(3))
    used.train(range(5))
    for each in (new, used):
        checkpoint.restore_optimizer(each.optimizer, checkpoint.optimizer_tensors(one.optimizer))
        (count,), (saved,) = each.counts(), one.counts()
        assert type(count) is type(saved) and count == saved == 3
        if kind != "FusedAdam":
            assert count.dtype == torch.int32 and count.shape == (1,) and count is not saved
    checkpoint.restore_optimizer(used.optimizer, empty)
    assert not used.optimizer.state and int(*used.counts() or [0]) == 0


# Whole runs


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torch", "apex"])
def test_a_run_that_is_stopped_goes_on_bit_for_bit(kind, tmp_path, monkeypatch, capsys):
    """Counts and moments come back with the checkpoint; teachers that another kind prepared are not taken."""
    monkeypatch.setenv("METADISTIL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(optim, "check", lambda kind, device: None)
    data = table(tmp_path / "d.tsv", sentences())
    settings = {"optimizer": kind, "max_steps": 8, "log_steps": 1, "checkpoint_steps": 100}
    flat = succeed(data, tmp_path / "flat", **settings | {"optimizer": "flat"})
    made = []
    with monkeypatch.context() as patch:
        patch.setattr(optim, "adamw", lambda kind, *rest: made.append(kind) or adamw(kind, *rest))
        whole = succeed(data, tmp_path / "whole", **settings)
    assert (
        made == [kind] * 5
    )  # student and teacher as they are probed, the teacher prepared, the student, the teacher that learns
    assert len(list((tmp_path / "cache" / "teachers").iterdir())) == 2

    log = Monitor.log

    def stopping(self, name, at, values):
        log(self, name, at, values)
        if name == "metadistil" and at == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "log", stopping)
        assert main(flags(data, tmp_path / "run", **settings)) == 128 + signal.SIGTERM
    capsys.readouterr()
    assert main(["--resume", "--output", str(tmp_path / "run"), "--optimizer", "flat"]) == 2
    assert f"--optimizer flat (was {kind})" in capsys.readouterr().err
    assert main(["--resume", "--output", str(tmp_path / "run")]) == 0
    assert_same_models(tmp_path / "run", whole)
    ours, theirs = weights(flat / "student"), weights(whole / "student")
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)
    for name in ours:  # 12 steps of 1e-3 and less, half a dozen roundings of 6e-8 in each gradient
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-4)


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["flat", "torch"])
def test_on_a_gpu_the_rate_lies_there(kind):
    """And steps are those of the CPU, and captured in a graph they go on as they do without."""
    on_cpu, on_gpu = Setting(kind), Setting(kind, device="cuda")
    assert all(group["lr"].is_cuda for group in on_gpu.optimizer.param_groups)
    clip, found = torch.tensor(0.5), torch.tensor(0.0)
    on_cpu.train(range(20), clip, found)
    clip, found = clip.cuda(), found.cuda()
    on_gpu.train(range(3), clip, found)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(on_gpu.optimizer, on_gpu.flat, clip, found)
    for number in range(3, 20):
        on_gpu.feed(number)
        graph.replay()
        on_gpu.schedule.step()
    assert (on_gpu.flat.weights.cpu() - on_cpu.flat.weights).abs().max() < 2 * TOLERANCE[torch.float32]
