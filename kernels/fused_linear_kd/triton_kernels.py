"""The Triton kernel of `kd_loss` on the logits of a chunk of rows; arguments as in naive.py."""

from torch import Tensor

from engine.kernels.ops.kd_loss.triton_kernels import kd_first


def kd_rows(student: Tensor, teachers: list[Tensor], *settings, in_place: bool) -> Tensor:
    """Row losses [R]; `in_place` writes the student's gradient over its logits."""
    return kd_first(student, teachers, *settings, None, True, [False] * (1 + len(teachers)), in_place)[0]
