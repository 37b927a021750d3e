"""Planned widths: the best there are, by trying them all, and which of them a batch gets."""

from itertools import combinations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.batches import training_rows
from engine.data.buckets import Buckets, plan

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def padded(lengths, widths, batch_size):
    """Tokens of an epoch's batches, each padded to the smallest width that holds its longest example."""
    buckets = Buckets(np.array(widths), max(lengths))
    batches = training_rows(buckets(lengths), batch_size, seed=0, epoch=0)
    return sum(len(rows) * int(buckets(lengths[rows].max())) for rows in batches)


@SETTINGS
@given(
    examples=st.dictionaries(st.integers(1, 40), st.integers(1, 9), min_size=1, max_size=8),
    count=st.integers(1, 9), batch_size=st.integers(1, 12), random=st.randoms(use_true_random=False),
)  # fmt: skip
def test_no_other_widths_pad_less(examples, count, batch_size, random):
    lengths = [length for length, times in examples.items() for _ in range(times)]
    random.shuffle(lengths)
    lengths, longest = np.array(lengths), max(lengths)
    widths = plan(lengths, count, batch_size).tolist()
    assert widths == sorted(set(widths)) and len(widths) <= count and widths[-1] == longest
    others = sorted(set(examples) - {longest})
    choices = [(*c, longest) for size in range(min(count, len(others) + 1)) for c in combinations(others, size)]
    assert padded(lengths, widths, batch_size) == min(padded(lengths, choice, batch_size) for choice in choices)


def test_sums_are_exact_for_many_long_examples():
    """The choices differ by one token of 5 billion, which sums in int32 or float32 do not hold."""
    for few in range(300_000, 300_010):
        assert plan(np.repeat([8190, 8191, 8192], [few, few + 1, 1]), 2).tolist() == [8191, 8192]
        assert plan(np.repeat([8190, 8191, 8192], [few + 1, few, 1]), 2).tolist() == [8190, 8192]


@SETTINGS
@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=20), count=st.integers(1, 6),
    batch_size=st.integers(1, 30), further=st.integers(0, 30),
)  # fmt: skip
def test_a_width_is_the_smallest_planned_and_then_a_multiple_of_8(lengths, count, batch_size, further):
    longest = max(*lengths, 1) + further
    buckets = Buckets.of(np.array(lengths), longest, count, batch_size)
    for length in range(longest + 1):
        holding = [w for w in buckets.widths if w >= length]
        expected = min(holding) if holding else min(-(-length // 8) * 8, longest)
        assert buckets(np.array([[length]])).tolist() == [[expected]]
        assert max(length, 1) <= expected <= longest


def test_widths_are_of_a_type_that_numpy_sorts_in_linear_time():
    for longest in (128, 512, 8192):
        buckets = Buckets.of(np.array([3, 100]), longest, 2)
        assert buckets(np.array([3, longest])).dtype == np.int16
        assert buckets(np.array([longest])).tolist() == [longest]
