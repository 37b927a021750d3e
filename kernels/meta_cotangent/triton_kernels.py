"""`meta_cotangent` as a part of the second derivative of `kd_loss`: c_k = w_k factor p (u - <p, u>), row by row."""

from collections.abc import Sequence

from torch import Tensor

from engine.kernels.ops.common.layout import Rows
from engine.kernels.ops.common.triton_launch import Launch, output_like
from engine.kernels.ops.common.triton_second import launch_second


def kd_cotangent(
    teachers: Sequence[Tensor],  # K x [..., C]
    tangent: Tensor,  # [..., C]
    weights: Tensor | None,  # [K]
    constants: Sequence[float],  # K
    temperature: float,
    factor: float,
) -> list[Tensor]:
    """K x w_k factor p (u - <p, u>), in float32 (float64 where an input is)."""
    # the tangent's place among the logits is the student's, whose logits are not read
    layout = Rows([tangent, *teachers, tangent, *teachers])
    outputs = [output_like(t, layout.dtype) for t in teachers]
    call = Launch(layout, None, weights, constants, None, None, 0)
    wanted = 2 ** (len(teachers) + 1) - 2
    launch_second(call, None, [tangent, *outputs], 1 / temperature, -factor, 1.0, wanted, 1, False)
    return outputs
