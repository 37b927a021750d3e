"""The C++ kernels (csrc/kd.cpp), which are there once `backends` has loaded the library; arguments as in triton_kernels.py."""

from torch import Tensor, ops


def kd_first(*arguments) -> list[Tensor]:
    """Row losses [...], where wanted, then the gradients wanted."""
    return ops.metadistil.kd_first(*arguments)


def kd_second(*arguments) -> list[Tensor]:
    """What reaches the upstream, row by row [...], then what reaches the inputs wanted."""
    return ops.metadistil.kd_second(*arguments)
