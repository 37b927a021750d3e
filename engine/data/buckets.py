"""Widths that batches are padded to: the few of them that leave the fewest padded tokens."""

from __future__ import annotations

import numpy as np

PAD_MULTIPLE = 8  # what is longer than every planned width is padded to a multiple of this


def plan(lengths: np.ndarray, count: int, batch_size: int = 1) -> np.ndarray:
    """At most `count` widths, ascending, for a training set of `lengths` [n]: the exact minimum of padded tokens an epoch.

    Every example belongs to the smallest width that holds it, and batches are cut from the examples in the order of their
    widths (`engine.data.batches`), so that a batch is as wide as its last example needs. Let l_1 < ... < l_U be the lengths
    that stand there when examples are sorted by length, and C_j the number of examples in batches up to l_j. Then widths
    are among the l_j, the last one is the longest, and k of them for the first j lengths cost

        cost[k, j] = min over i < j of  cost[k - 1, i] + l_j (C_j - C_i)

    in O(count U^2) altogether: under a millisecond for 16 widths of 66 lengths.
    """
    assert count >= 1 and batch_size >= 1 and len(lengths), (count, batch_size, len(lengths))
    ends = np.minimum(np.arange(0, len(lengths), batch_size) + batch_size, len(lengths))
    at_end = np.sort(np.maximum(lengths, 1))[ends - 1].astype(np.int64)  # a batch is at least one token wide
    unique, first = np.unique(at_end, return_index=True)
    held = np.concatenate([[0], ends[np.append(first[1:], len(ends)) - 1]])  # C
    if count >= len(unique):
        return unique
    # cost[k, j] of k + 1 widths for the first j lengths; before[k, j]: how many lengths the other k widths hold of them
    cost = np.zeros((count, len(unique) + 1), np.int64)
    before = np.zeros((count, len(unique) + 1), np.int64)
    for j in range(1, len(unique) + 1):
        cost[0, j] = unique[j - 1] * held[j]
        rest = cost[:-1, :j] + unique[j - 1] * (held[j] - held[:j])  # [count - 1, j]
        before[1:, j] = rest.argmin(1)
        cost[1:, j] = rest.min(1)
    last, j = [], len(unique)
    for k in reversed(range(count)):
        last.append(j - 1)
        j = before[k, j]  # at least 1 for k > 0: a width more always pads less
    return unique[last[::-1]]


class Buckets:
    """Planned widths, and the width of a batch or an example by its length."""

    def __init__(self, widths: np.ndarray, longest: int):
        """`longest` is the most tokens that an example can have, which no width exceeds."""
        assert widths[-1] <= longest, (widths, longest)
        self.widths = widths
        lengths = np.arange(longest + 1)
        index = np.searchsorted(widths, lengths)
        further = np.minimum(-(-lengths // PAD_MULTIPLE) * PAD_MULTIPLE, longest)
        width_of = np.where(index < len(widths), widths[np.minimum(index, len(widths) - 1)], further)
        self._width_of = width_of.astype(np.min_scalar_type(-longest - 1))  # int16, which numpy sorts in linear time

    @classmethod
    def of(cls, lengths: np.ndarray, longest: int, count: int, batch_size: int = 1) -> Buckets:
        """The best widths for a training set of these lengths [n]; see `plan`."""
        return cls(plan(lengths, count, batch_size), longest)

    def __call__(self, lengths: np.ndarray) -> np.ndarray:
        """The padded width of each length, in its shape."""
        return self._width_of[lengths]
