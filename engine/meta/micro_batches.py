"""A batch in parts that fit into memory, whose losses and gradients add up to the batch's own.

Every loss here is a mean over the examples of a batch, so that a part of b of its B examples counts b / B; but cross-entropy
is a mean over the labels that are not -100, of which a part may have more than its share of the examples, or none:

    L = sum_i (b_i / B) soft_i + (n_i / max(n, 1)) hard_i        and so does every derivative of it, of any order

What is left is rounding, and dropout: masks are drawn part by part, other ones than the whole batch would have had. A batch
norm's statistics are those of the parts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree

from engine.batch import Batch
from engine.losses.objectives import IGNORED, Objective, count_labels


class Part(NamedTuple):
    """Some examples of a batch, and the objective whose losses are their share of the batch's."""

    batch: Any
    objective: Objective


def parts(batch: Any, objective: Objective, size: int | None) -> list[Part]:
    """`batch` (with `.labels` [B] and `.inputs`) in parts of `size` examples and a rest; whole where `size` is None.

    Raises ValueError for inputs that are not tensors of one row an example.
    """
    examples = len(batch.labels)
    if size is None or size >= examples:
        return [Part(batch, objective)]
    if not isinstance(batch, Batch):
        batch = Batch(batch.labels, batch.inputs)
    for leaf in pytree.tree_leaves(batch):
        if not isinstance(leaf, Tensor) or leaf.ndim == 0 or len(leaf) != examples:
            shape = list(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
            raise ValueError(f"a batch of {examples} examples cannot be cut into micro-batches: one of its inputs is {shape}, "
                             "not a tensor of one row an example.")  # fmt: skip
    cut = [slice(i, min(i + size, examples)) for i in range(0, examples, size)]
    shares = [(rows.stop - rows.start) / examples for rows in cut]
    labelled = shares
    if not objective.regression:  # on the device: the host does not know what the labels are
        counts, whole = (batch.labels != IGNORED).double(), count_labels(batch.labels)
        labelled = [counts[rows].sum() / whole for rows in cut]
    return [
        Part(pytree.tree_map(lambda t, r=rows: t[r], batch), replace(objective, share=share, hard_share=hard))
        for rows, share, hard in zip(cut, shares, labelled, strict=True)
    ]
