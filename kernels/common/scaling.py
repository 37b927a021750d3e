"""Gradients that were computed with the loss, times what arrives at the loss in the backward."""

from __future__ import annotations

from torch import Tensor

from engine.kernels.ops.common.autograd import forward_mode, traced
from engine.kernels.ops.common.backends import backend


def scaled(tensors: list[Tensor], factor: Tensor) -> list[Tensor]:
    """factor x, in place and without a pass where it is 1: for gradients that came with a loss, which nobody else has."""
    # what a traced forward returned is not written in its backward, and a kernel would lose a tangent
    if traced([factor]) or forward_mode([factor]):
        return [t * factor for t in tensors]  # a factor [] does not widen them
    kind = factor.device.type
    if kind != "cpu" and backend(kind).name == "triton":  # which looks at the factor without a wait for the device
        from engine.kernels.ops.common.triton_launch import scale_

        scale_(tensors, factor)
    elif kind != "cpu" or factor != 1:
        for t in tensors:
            t.mul_(factor)
    return tensors
