"""Deterministic, disjoint, stratified cuts of the training rows."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

HELD_OUT = ("test", "validation", "quiz")
"""Order of precedence: a text that stands in two splits stays in the first of them."""


class Pool:
    """Rows in one random queue per class, or per class of a domain; every cut takes from the heads of the queues.

    What is cut first therefore does not depend on what is cut after it: not on the number of samples, nor on the sizes
    of later parts.
    """

    def __init__(self, classes: np.ndarray, num_classes: int, seed: int, domains: np.ndarray | None = None):
        """`classes` and `domains` are ids [rows]; without domains all rows are of one."""
        domains = np.zeros_like(classes) if domains is None else domains
        self.num_classes, num_domains = num_classes, int(domains.max(initial=0)) + 1
        cells = domains * num_classes + classes
        order = np.random.default_rng(seed).permutation(len(classes))
        self.queues = [order[cells[order] == cell] for cell in range(num_domains * num_classes)]

    @property
    def counts(self) -> np.ndarray:  # [domains, classes]
        return np.array([len(queue) for queue in self.queues]).reshape(-1, self.num_classes)

    def cut(self, size: int, leave: int = 0) -> np.ndarray:
        """Up to `size` rows in proportion to what is left of domains and classes, `leave` rows of each class of a domain
        left behind.
        """
        counts = self.counts
        most = np.maximum(counts - leave, 0)
        shares, owed = [], np.zeros(self.num_classes)
        for of_domain, *domain in zip(allocate(size, counts.sum(1), most.sum(1)), counts, most, strict=True):
            shares.append(allocate(of_domain, *domain, owed))
            # what rounding took from a class in one domain it gets in the next: a cut of a row a domain has every class
            owed += of_domain * domain[0] / max(domain[0].sum(), 1) - shares[-1]
        shares = np.concatenate(shares)
        taken = [queue[:share] for queue, share in zip(self.queues, shares, strict=True)]
        self.queues = [queue[share:] for queue, share in zip(self.queues, shares, strict=True)]
        return np.concatenate(taken)


def allocate(size: int, counts: np.ndarray, most: np.ndarray, owed: np.ndarray | float = 0.0) -> np.ndarray:
    """Share `size` among classes in proportion to `counts`, within one row: at least 1 and at most `most` each.

    A class with more `owed` [classes] to it comes first where rows are left over by rounding.
    """
    size = min(size, int(most.sum()))
    if size == 0:
        return np.zeros_like(counts)
    exact = size * counts / counts.sum()
    least = np.minimum(1, most) if size >= (most > 0).sum() else np.zeros_like(most)
    shares = np.clip(np.floor(exact).astype(int), least, most)
    while (missing := size - int(shares.sum())) != 0:
        # largest remainder first; argmax takes the first of equals, so that the result does not depend on luck
        if missing > 0:
            shares[np.argmax(np.where(shares < most, exact - shares + owed, -np.inf))] += 1
        else:
            shares[np.argmax(np.where(shares > least, shares - exact - owed, -np.inf))] -= 1
    return shares


def fit(
    rows: int, classes: int, held_out: Mapping[str, int], train_size: int, samples: int
) -> tuple[dict[str, int], int]:
    """Sizes of the held-out cuts and of each training sample that `rows` allow.

    Whether the held-out cuts shrink is decided for one sample, so that they are the same for every number of samples.
    """
    sizes = dict(held_out)
    if sum(sizes.values()) + train_size > rows:
        # a row of each class, where training then keeps two
        least = classes if rows >= (len(sizes) + 2) * classes else 0
        limit = max(rows // 10, least)
        sizes = {part: min(size, limit) for part, size in sizes.items()}
    rest = max(rows - sum(sizes.values()), 0)
    return sizes, min(train_size, rest // samples)
