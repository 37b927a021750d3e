"""The C++ kernel (csrc/kd.cpp), which is there once `backends` has loaded the library; arguments as in triton_kernels.py."""

from torch import Tensor, ops


def kd_cotangent(*arguments) -> list[Tensor]:
    """K x w_k factor p (u - <p, u>)."""
    return ops.metadistil.kd_cotangent(*arguments)
