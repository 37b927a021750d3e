"""Joules of windows from counters and from power, on signals whose energy is known."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.telemetry.energy import PERIODS, WATCH_SECONDS, WRAPS, Counter, Energy, Trapezoid, Watch


def steps(watts, period):
    """A counter of steady power that moves only every `period` seconds."""
    return lambda time: watts * math.floor(time / period + 1e-9) * period


def watched(energy, value, power=None, every=0.005):
    """Samples in quick succession until the watch is over; the time then."""
    looks = 0
    while energy.watching:
        energy.add(every * looks, counter=value(every * looks), power=power)
        looks += 1
        assert every * looks < 10
    return every * looks


# The two sums


def test_trapezoid_of_uneven_times():
    power = Trapezoid()
    for time, watts in ((0, 100), (1, 200), (1.5, 200), (1.5, 999), (1.2, 999), (3.5, 0)):
        power.add(time, watts)
    assert (power.joules, power.seconds) == (150 + 100 + 200, 3.5)  # what stands still or goes back is passed over


# From 1e6 J a wrap would take megawatts; from 6 kJ below it, 5.9 kW.
@pytest.mark.parametrize(("samples", "joules", "seconds"), [
    pytest.param([(5, 1e6), (6, 1e6 + 300), (6, 2e6), (8, 1e6 + 900)], 900, 3, id="counts from its first sample"),
    *(pytest.param([(0, w - 50), (1, 250), (2, 550)], 600, 2, id="wraps") for w in WRAPS),
    *(pytest.param([(0, b - 300), (1, b), (2, 100), (3, 400)], 600, 2, id="reset") for b in (1e6, WRAPS[0] - 6000)),
])  # fmt: skip
def test_counter(samples, joules, seconds):
    """What lies across a reset is left out, with its time."""
    counter = Counter()
    for sample in samples:
        counter.add(*sample)
    assert counter.joules == pytest.approx(joules, abs=8)  # 2**64 mJ has steps of 4 J as a double
    assert counter.seconds == seconds


# How often a counter moves


@pytest.mark.parametrize(("period", "every", "found"), [(0.02, 0.005, 0.02), (0.2, 0.005, 0.2), (0.1, 0.25, 0.25)])
def test_period_is_found(period, every, found):
    """Too long where looks are too seldom, which is the safe side."""
    watch, time = Watch(), 0.0
    while not watch.over:
        watch.add(time, steps(300, period)(time))
        time += every
    assert watch.period == pytest.approx(found, rel=0.1)
    assert time <= WATCH_SECONDS + every


# Windows


def test_power_where_there_is_no_counter():
    energy = Energy(has_counter=False)
    assert not energy.watching and energy.take() is None
    energy.add(0, power=100)
    assert energy.take() is None
    energy.add(0.25, power=200)
    assert energy.source == "power" and energy.take() == (37.5, 0.25)
    assert energy.take() is None
    energy.add(0.5, power=200)
    assert energy.take() == (50, 0.25) and energy.total == 87.5


@pytest.mark.parametrize(("value", "power"), [(5.0, 100), (None, 100), (None, None)])
def test_where_the_counter_stands_still_or_is_silent(value, power):
    """It is watched for as long as a counter may need, then there is power, or nothing."""
    energy = Energy(has_counter=True)
    assert watched(energy, lambda time: value, power) == pytest.approx(WATCH_SECONDS, abs=0.01)
    assert energy.watch.period is None and energy.source == ("power" if power else None)
    if power:
        joules, seconds = energy.take()
        assert joules == pytest.approx(100 * seconds) and seconds == pytest.approx(WATCH_SECONDS, abs=0.01)
    else:
        assert energy.take() is None and energy.total is None


def test_slow_counter_is_better_than_nothing_and_stays():
    energy = Energy(has_counter=True)
    now = watched(energy, steps(100, 1.5))
    assert energy.source == "counter" and energy.take() is None
    energy.add(now + 18, counter=100 * 19.5, power=1)
    energy.add(now + 19, counter=100 * 19.5, power=1)
    assert energy.source == "counter"  # for good, or sums would be mixed
    assert energy.take() == (pytest.approx(1950), pytest.approx(now + 19))


# Seconds between samples (some far too short), watts, and after which of them a window is asked for.
samples = st.lists(st.tuples(st.floats(1e-3, 2.0), st.floats(0, 1000), st.booleans()), min_size=1, max_size=60)


@given(samples, st.floats(0.01, 0.3))
@settings(max_examples=15)
def test_windows_of_a_counter_add_up(points, period):
    """Short ones are carried over, so that a period at their ends is a tenth of them at most."""
    energy, value, given_out = Energy(has_counter=True), steps(100, period), []
    time = watched(energy, value)
    last = value(time)
    for wait, watts, taken in points:
        time += wait
        last += watts * wait
        energy.add(time, counter=last)
        if taken and (window := energy.take()):
            given_out.append(window)
    assert energy.source == "counter"
    for joules, seconds in given_out:
        assert seconds >= PERIODS * energy.watch.period * (1 - 1e-6) and joules >= 0
    energy.add(time + 100, counter=last)
    given_out.append(energy.take())
    assert sum(seconds for _, seconds in given_out) == pytest.approx(time + 100)
    total = sum(joules for joules, _ in given_out)
    assert total == pytest.approx(last, rel=1e-9, abs=1e-6) and energy.total == pytest.approx(total)
