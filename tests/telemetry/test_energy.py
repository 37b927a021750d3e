"""Joules of windows from counters and from power, on signals whose energy is known."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.telemetry.energy import PERIODS, WATCH_SECONDS, WRAPS, Counter, Energy, Trapezoid, Watch, agreement


def steps(joules, period):
    """A counter that follows `joules` but moves only every `period` seconds."""
    return lambda time: joules(math.floor(time / period + 1e-9) * period)


def wave(time):
    """Watts between 150 and 450, a period of 3 seconds."""
    return 300 + 150 * math.sin(2 * math.pi * time / 3)


def wave_joules(time):
    return 300 * time + 150 * 3 / (2 * math.pi) * (1 - math.cos(2 * math.pi * time / 3))


def watched(energy, value=lambda time: 300 * math.floor(time * 10 + 1e-9) / 10, power=None, start=0.0, every=0.005):
    """Samples in quick succession until the watch is over; the time then."""
    looks = 0
    while energy.watching:
        time = start + every * looks
        energy.add(time, counter=value(time), power=power)
        looks += 1
        assert time < 10
    return start + every * looks


# The two sums


def test_trapezoid_of_uneven_times():
    power = Trapezoid()
    for time, watts in ((0, 100), (1, 200), (1.5, 200), (1.5, 999), (1.2, 999), (3.5, 0)):
        power.add(time, watts)
    assert (power.joules, power.seconds) == (150 + 100 + 200, 3.5)  # what stands still or goes back is passed over


def test_counter_counts_from_its_first_sample():
    counter = Counter()
    for time, joules in ((5, 1e6), (6, 1e6 + 300), (6, 2e6), (8, 1e6 + 900)):
        counter.add(time, joules)
    assert (counter.joules, counter.seconds) == (900, 3)


@pytest.mark.parametrize("wrap", WRAPS)
def test_counter_that_wraps(wrap):
    counter = Counter()
    counter.add(0, wrap - 50)
    counter.add(1, 250)
    counter.add(2, 550)
    assert counter.joules == pytest.approx(600, abs=8)  # 2**64 mJ has steps of 4 J as a double
    assert counter.seconds == 2


@pytest.mark.parametrize("before", [1e6, WRAPS[0] - 6000])
def test_reset_is_left_out_with_its_time(before):
    """From 1e6 J a wrap would take megawatts; from 6 kJ below it, 5.9 kW."""
    counter = Counter()
    for time, joules in ((0, before - 300), (1, before), (2, 100), (3, 400)):
        counter.add(time, joules)
    assert (counter.joules, counter.seconds) == (600, 2)


# How often a counter moves


@pytest.mark.parametrize("period", [0.02, 0.05, 0.1, 0.2])
def test_period_is_found(period):
    watch, time = Watch(), 0.0
    while not watch.over:
        watch.add(time, steps(lambda t: 300 * t, period)(time))
        time += 0.005
    assert watch.period == pytest.approx(period, rel=0.1)
    assert time < WATCH_SECONDS


def test_looking_too_seldom_finds_a_period_that_is_too_long():
    watch = Watch()
    for look in range(10):
        watch.add(0.25 * look, steps(lambda t: 300 * t, 0.1)(0.25 * look))
    assert watch.period == pytest.approx(0.25)


@pytest.mark.parametrize("value", [7.0, None])
def test_watch_ends_where_nothing_moves_or_answers(value):
    watch, looks = Watch(), 0
    while not watch.over:
        watch.add(0.005 * looks, value)
        looks += 1
        assert looks < 1000
    assert watch.period is None and looks == pytest.approx(WATCH_SECONDS / 0.005, abs=2)


# Windows


def test_short_windows_are_carried_over():
    energy = Energy(has_counter=True)
    value = steps(lambda t: 300 * t, 0.1)
    now = watched(energy, value)
    assert energy.source == "counter" and energy.watch.period == pytest.approx(0.1, rel=0.05)
    taken = []
    for _ in range(100):
        now += 0.05
        energy.add(now, counter=value(now))
        taken.append(energy.take())
    given_out = [each for each in taken if each]
    assert taken.count(None) > 90 and len(given_out) >= 4
    assert all(seconds >= PERIODS * energy.watch.period * 0.999 for _, seconds in given_out)
    for joules, seconds in given_out:
        assert joules / seconds == pytest.approx(300, rel=1 / PERIODS)  # a period at its ends
    assert sum(j for j, _ in given_out) <= energy.total <= 300 * now


def test_windows_wait_until_the_source_is_known():
    energy = Energy(has_counter=True)
    energy.add(0, counter=0, power=100)
    energy.add(1, counter=100, power=100)
    assert energy.watching and energy.source is None and energy.take() is None and energy.total is None


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


def test_power_where_the_counter_stands_still():
    energy = Energy(has_counter=True)
    watched(energy, lambda time: 5.0, power=100)
    assert energy.source == "power"
    joules, seconds = energy.take()
    assert joules == pytest.approx(100 * seconds) and seconds == pytest.approx(WATCH_SECONDS, abs=0.01)


def test_power_where_the_counter_is_taken_back():
    energy = Energy(has_counter=True)
    energy.add(0, counter=1.0, power=100)
    energy.without_counter()
    energy.add(1, power=100)
    assert not energy.watching and energy.source == "power" and energy.take() == (100, 1)


def test_slow_counter_is_better_than_nothing_and_stays():
    energy = Energy(has_counter=True)
    now = watched(energy, steps(lambda t: 100 * t, 1.5))
    assert energy.source == "counter" and energy.take() is None
    energy.add(now + 18, counter=100 * 19.5, power=1)
    energy.add(now + 19, counter=100 * 19.5, power=1)
    assert energy.source == "counter"  # for good, or sums would be mixed
    assert energy.take() == (pytest.approx(1950), pytest.approx(now + 19))


def test_nothing_known():
    energy = Energy(has_counter=True)
    watched(energy, lambda time: None)
    assert energy.source is None and energy.take() is None and energy.total is None


# Seconds between samples (some far too short), and after which of them a window is asked for.
samples = st.lists(st.tuples(st.floats(1e-3, 2.0), st.floats(0, 1000), st.booleans()), min_size=1, max_size=60)


@given(samples, st.floats(0.01, 0.3))
def test_windows_of_a_counter_add_up(points, period):
    energy = Energy(has_counter=True)
    value, total, given_out = lambda t: 100 * math.floor(t / period + 1e-9) * period, 0.0, []
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


@given(samples)
def test_windows_of_power_add_up_and_stay_between_its_extremes(points):
    energy, reference, time = Energy(has_counter=False), 0.0, 0.0
    energy.add(0, power=points[0][1])
    before, seen, given_out = points[0][1], [points[0][1]], []
    for wait, watts, taken in points:
        time += wait
        energy.add(time, power=watts)
        reference += wait * (before + watts) / 2
        before = watts
        seen.append(watts)
        if taken:
            given_out.append(energy.take())
    given_out = [each for each in (*given_out, energy.take()) if each]
    assert sum(joules for joules, _ in given_out) == pytest.approx(reference, rel=1e-9, abs=1e-9)
    assert sum(seconds for _, seconds in given_out) == pytest.approx(time)
    for joules, seconds in given_out:
        assert min(seen) * (1 - 1e-6) - 1e-6 <= joules / seconds <= max(seen) * (1 + 1e-6) + 1e-6


# Counter against power


@pytest.mark.parametrize("period", [0.02, 0.1])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_counter_and_power_agree(period, noise):
    """10 s, sampled every 0.25 s give or take 0.1 s: the ends leave 0.1 s of 10, the trapezoids less."""
    rng = random.Random(0)
    times = sorted(0.25 * n + noise * (2 * rng.random() - 1) for n in range(2, 43))
    counter = [(t, steps(wave_joules, period)(t)) for t in times]
    power = [(t + 0.01 * rng.random(), wave(t)) for t in times]  # the two calls come one after the other
    assert agreement(counter, power) == pytest.approx(1, abs=0.05)


def test_disagreement_is_seen():
    times = [0.25 * n for n in range(40)]
    counter = [(t, 300 * t) for t in times]
    assert agreement(counter, [(t, 250) for t in times]) == pytest.approx(1.2)
    assert agreement(counter, [(t + 3.1, 300) for t in times]) == pytest.approx(1)  # where both are known
    assert agreement(counter, [(t - 3.1, 300) for t in times]) == pytest.approx(1)


def test_ends_between_samples_are_interpolated():
    """From 1 s to 5 s, watts rise from 100 to 500: 1,200 J; the counter has 300 J a second."""
    counter, power = [(1, 300.0), (5, 1500.0)], [(0, 0.0), (2, 200.0), (10, 1000.0)]
    assert agreement(counter, power) == pytest.approx(1)
    assert agreement([(0, 0.0), (4, 1200.0), (8, 2400.0)], [(1, 100.0), (5, 500.0)]) == pytest.approx(1)


def test_no_agreement_without_common_time():
    one, two = [(0, 0.0), (1, 100.0)], [(2, 100.0), (3, 100.0)]
    assert agreement(one, two) is None
    assert agreement(one, one[:1]) is None
    assert agreement(one, [(0, 0.0), (1, 0.0)]) is None
