"""How logits of one shape [..., C] lie in memory, for kernels that take them as rows without copying them."""

from collections.abc import Sequence
from math import prod

from torch import Tensor

from engine.kernels.ops.common.numbers import arithmetic


class Rows:
    """Tensors of one shape [..., C] as R rows; row r of a tensor begins at (r // inner) outer + (r % inner) step.

    `strides` holds (outer, step, class) of one tensor after the other, in elements. Leading dimensions are merged where
    the memory of every tensor allows it; two may remain, for slices of [B, L, C]. Only where more would is a tensor copied.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        self.shape = tensors[0].shape
        self.classes, self.rows = self.shape[-1], prod(self.shape[:-1])
        self.dtype = arithmetic(tensors)
        groups = _merged(self.shape, tensors)
        if len(groups) > 2:
            tensors = [t.contiguous() for t in tensors]
            groups = _merged(self.shape, tensors)
        self.tensors = tuple(tensors)
        self.inner = max(1, prod(self.shape[d] for d in groups[-1])) if groups else 1
        self.strides = tuple(
            stride
            for t in tensors
            for stride in ([0] * (2 - len(groups)) + [t.stride(group[-1]) for group in groups] + [t.stride(-1)])
        )


def _merged(shape: Sequence[int], tensors: Sequence[Tensor]) -> list[list[int]]:
    """The leading dimensions, those together whose rows lie evenly in every tensor."""
    groups: list[list[int]] = []
    for d, size in enumerate(shape[:-1]):
        if size == 1:
            continue
        if groups and all(t.stride(groups[-1][-1]) == t.stride(d) * size for t in tensors):
            groups[-1].append(d)
        else:
            groups.append([d])
    return groups
