"""The C++ kernels (csrc/kd.cpp) on the logits of a chunk of rows; arguments as in naive.py."""

from torch import Tensor, ops


def kd_rows(student: Tensor, teachers: list[Tensor], *settings, in_place: bool) -> Tensor:
    """Row losses [R]; `in_place` writes the student's gradient over its logits."""
    if in_place:
        return ops.metadistil.kd_rows_(student, teachers, *settings)
    return ops.metadistil.kd_first(student, teachers, *settings, None, True, [False] * (1 + len(teachers)))[0]
