"""What a phase's steps cost, as the log and the summary have it."""

from dataclasses import asdict

import pytest
import torch
from fake_nvml import Clock

from engine.sections import section
from engine.telemetry import flops
from engine.telemetry import telemetry as subject
from engine.telemetry.flops import FlopCounter, FlopRate
from engine.telemetry.meter import Meter
from engine.telemetry.sampler import Window
from engine.telemetry.telemetry import Costs, Telemetry

CPU = torch.device("cpu")


class FakeSampler:
    """Gives what it is told to, one window after the other."""

    cause, device = "no NVML: the device is cpu", {"name": "a device"}

    def __init__(self):
        self.windows, self.started, self.closed = [Window()], False, False

    def start(self):
        self.started = True

    def window(self):
        return self.windows.pop(0) if self.windows else Window()

    def close(self):
        self.closed = True


@pytest.fixture
def clock():
    return Clock(0.0)


@pytest.fixture
def telemetry(clock, monkeypatch):
    monkeypatch.setattr(subject, "meter_of", lambda device: Meter(clock))
    monkeypatch.setattr(subject, "Sampler", lambda device, name: FakeSampler())
    return Telemetry(CPU)


def a_round(telemetry, clock, seconds=1.0):
    """10 examples, 8 tokens wide, and a quiz of 4."""
    with section("data wait"):
        clock.now += 0.25 * seconds
    with section("pilot"):
        clock.now += 0.5 * seconds
    clock.now += 0.25 * seconds
    telemetry.round([(10, 8)], [(4, 8)])


def test_a_record_of_steps(telemetry, clock):
    costs = Costs()
    clock.now += 50.0  # before the phase, and none of its time
    with telemetry.phase(costs):
        for _ in range(4):
            a_round(telemetry, clock)
        with section("evaluation"):
            clock.now += 7.0
        found = telemetry.values(4.0)
        assert found == {
            "examples_per_second": 10.0, "tokens_per_second": 80.0, "step_seconds": 1.0,
            "seconds/data wait": 0.25, "seconds/pilot": 0.5, "seconds/other": 0.25,
        }  # fmt: skip
        a_round(telemetry, clock, seconds=2.0)
        found = telemetry.values(2.0)
        assert found["examples_per_second"] == 5.0 and found["seconds/pilot"] == 1.0
        assert sum(v for k, v in found.items() if k.startswith("seconds/")) == found["step_seconds"]
    assert costs.tokens == 5 * 80
    assert costs.seconds == {"data wait": 1.5, "pilot": 3.0, "other": 1.5, "evaluation": 7.0}
    assert costs.summary()["sections"]["pilot"] == {"seconds": 3.0, "memory": None, "joules": None}
    telemetry.close()
    assert telemetry.sampler.closed


def test_a_checkpoint_finds_everything_booked_and_the_record_loses_nothing(telemetry, clock):
    costs = Costs()
    with telemetry.phase(costs):
        telemetry.sampler.windows = [Window({"host/cpu": 90.0}, {"pilot": 70}), Window({}, {"pilot": 60, "quiz": 5})]
        a_round(telemetry, clock)
        telemetry.settle()
        assert costs.tokens == 80 and costs.seconds["pilot"] == 0.5 and costs.memory == {"pilot": 70}
        a_round(telemetry, clock)
        found = telemetry.values(2.0)
        assert found["seconds/pilot"] == 0.5 and found["step_seconds"] == 1.0
        assert found["host/cpu"] == 90.0 and found["memory/pilot"] == 70 and found["memory/quiz"] == 5
    resumed = Costs(**asdict(costs))
    with telemetry.phase(resumed):
        clock.now += 100.0  # before the first round; it is time of this phase all the same
        a_round(telemetry, clock)
    assert resumed.seconds["pilot"] == 1.5 and resumed.tokens == 240 and resumed.memory["pilot"] == 70


def test_energy_is_divided_by_time_and_waits_for_the_counter(telemetry, clock):
    costs = Costs()
    with telemetry.phase(costs):
        a_round(telemetry, clock)
        assert "joules_per_step" not in telemetry.values(1.0)
        assert costs.joules is None
        a_round(telemetry, clock)
        with section("evaluation"):
            clock.now += 2.0
        telemetry.sampler.windows = [Window(joules=500.0, seconds=5.0)]  # one of them before the phase
        found = telemetry.values(1.0)
    # 4 s of the phase, of which 2 were training: half of their joules, over both steps
    expected = {
        "joules_per_step": 100.0,
        "joules_per_example": 10.0,
        "joules/data wait": 25.0,
        "joules/pilot": 50.0,
        "joules/other": 25.0,
    }
    assert {key: value for key, value in found.items() if key.startswith("joules")} == expected
    assert costs.joules == 200.0 and sum(costs.energy.values()) == 400.0
    assert costs.summary()["sections"]["evaluation"]["joules"] == 200.0


def test_no_joules_are_lost_between_payments(telemetry, clock):
    """Samples lag behind: what a payment does not cover is covered by the next one."""
    costs, covered = Costs(), 0.0
    with telemetry.phase(costs):
        for paid_until in (0.8, 2.1, 2.9, 4.0):  # of the seconds 1, 2, 3, 4; 100 W
            a_round(telemetry, clock)
            end = min(paid_until, clock.now)
            telemetry.sampler.windows = [Window(joules=100.0 * (end - covered), seconds=end - covered)]
            telemetry.values(1.0)
            covered = end
    assert costs.joules == pytest.approx(400.0)


def test_host_memory_is_never_the_devices(telemetry, clock, monkeypatch):
    """On a device whose allocator counts, where no section was watched."""
    monkeypatch.setattr(telemetry.meter, "peak", lambda: 7)
    costs = Costs()
    with telemetry.phase(costs):
        telemetry.sampler.windows = [Window(resident={"other": 10**9})]
        a_round(telemetry, clock)
    assert costs.memory == {}


def test_memory_is_watched_in_the_first_rounds_and_then_seldom(telemetry, clock):
    watched = []
    with telemetry.phase(Costs()):
        for _ in range(130):
            a_round(telemetry, clock)
            watched.append(telemetry.meter.watching)
    assert [i for i, on in enumerate(watched, 1) if on] == [1, 2, 64, 128] and not telemetry.meter.watching


def test_switched_off_it_counts_tokens_and_makes_no_thread(monkeypatch):
    monkeypatch.setattr(subject, "Sampler", None)
    off, costs = Telemetry(CPU, on=False), Costs()
    with off.phase(costs), off.counting() as counter:
        assert counter is None
        off.round([(10, 8)], [])
        assert off.values(2.0) == {"examples_per_second": 5.0, "tokens_per_second": 40.0}
        off.settle()
    assert costs == Costs(tokens=80)
    assert off.cause == "no NVML: --telemetry is off" and off.described() is None and off.peak() == {}
    off.close()


# Floating-point operations


def attention(weight, x):
    """[B, L, D]: a product with weights, and two of each example by itself."""
    h = x.flatten(0, 1) @ weight
    h = h.view_as(x)
    return (h @ h.transpose(1, 2)) @ h


def test_operations_of_other_shapes_follow_from_one_step():
    weight = torch.randn(16, 16, requires_grad=True)

    def counted(*shapes):
        with FlopCounter() as counter:
            for b, width in shapes:
                attention(weight, torch.randn(b, width, 16)).sum().backward()
        return counter

    one = counted((4, 8))
    assert one.products == 2 * 2 * 4 * 8 * 16 * 16  # forward, and the weight's gradient
    for shapes in ([(4, 8)], [(2, 24)], [(7, 5), (3, 40)]):
        assert FlopRate(one, [(4, 8)]).of(shapes) == pytest.approx(counted(*shapes).total)


@pytest.mark.parametrize("fused", [False, True])
def test_the_profiler_records_what_the_counter_counts(fused):
    weight, bias = torch.randn(16, 16, requires_grad=True), torch.randn(16, requires_grad=True)
    x = torch.randn(4, 8, 16, requires_grad=True)

    def step():
        h = torch.nn.functional.linear(x, weight, bias)
        if fused:
            h = torch.nn.functional.scaled_dot_product_attention(*[h.unsqueeze(1)] * 3)
        (attention(weight, h.reshape(4, 8, 16)) + torch.baddbmm(h.reshape(4, 8, 16), x @ x.mT, x)).sum().backward()

    with FlopCounter() as counter:
        step()
    with flops.FlopRecord() as record:
        step()
    assert record.complete
    assert (record.products, record.attention) == (counter.products, counter.attention)


@pytest.mark.parametrize("broken", ["a busy profiler", "no formula fits"])
def test_what_cannot_be_counted_is_no_reason_to_stop(telemetry, clock, monkeypatch, broken):
    if broken == "no formula fits":
        monkeypatch.setitem(flops.OPERANDS, "aten::mm", (0, 7))  # shapes that are not what they should be
    else:
        monkeypatch.setattr(flops, "profile", lambda **_: 1 / 0)
    costs = Costs()
    with telemetry.phase(costs):
        with telemetry.counting() as record:
            found = torch.eye(3) @ torch.ones(3, 3)
        a_round(telemetry, clock)
        assert not record.complete and "flops_per_second" not in telemetry.values(1.0)
    assert torch.equal(found, torch.ones(3, 3)) and costs.flops is None


def test_the_first_round_is_counted_and_others_follow(telemetry, clock):
    weight, costs = torch.randn(16, 16), Costs()
    with telemetry.phase(costs):
        for b, width in [(4, 8), (4, 16)]:
            with telemetry.counting() as counter:
                attention(weight, torch.randn(b, width, 16))
            assert (counter is not None) == (width == 8)
            clock.now += 1.0
            telemetry.round([(b, width)], [])
        expected = 2 * 4 * 8 * 16 * 16 * 3 + 2 * 2 * 4 * 16 * (8 * 8 + 16 * 16)
        assert telemetry.values(2.0)["flops_per_second"] == pytest.approx(expected / 2.0)
    assert costs.flops == pytest.approx(expected)
