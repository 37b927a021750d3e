"""KL over averaged teacher logits plus cross-entropy, in one pass over memory, differentiable twice (`op.py`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.kernels.ops.common.autograd import forward_mode
from engine.kernels.ops.common.backends import backend
from engine.kernels.ops.common.checks import check_logits
from engine.kernels.ops.common.teachers import split_weights, together
from engine.kernels.ops.kd_loss import naive, op


def kd_loss(
    student: Tensor,  # [..., C] logits
    teachers: Sequence[Tensor],  # K x [..., C] logits
    labels: Tensor | None = None,  # [...] int64
    *,
    temperature: float,
    alpha: float,
    weights: Sequence[float] | Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """alpha T^2 KL(softmax(zbar / T) || softmax(z_S / T)) + (1 - alpha) CE(z_S, labels), zbar = sum_k w_k z_k.

    Differentiable twice in the student and every teacher; forward mode and torch.func's transforms run by the reference.
    Logits are float32, bfloat16, float16 or float64 and may differ in dtype and strides; arithmetic and result are float32,
    float64 where an input is. w_k is 1/K unless given; a tensor [K] of weights may itself require gradient.

    `reduction` is "mean" (KL over all rows, cross-entropy over the rows whose label is not `ignore_index`), "sum" or "none"
    ([...]). An ignored label takes the cross-entropy off its row, not the KL: what should carry nothing at all, padding for
    one, is left out of the logits. A class whose teacher probability is zero adds nothing, so that models may mask classes
    by -inf; NaN or +inf in a row makes the loss NaN, and so does an infinite term whose factor (alpha, 1 - alpha) is zero.
    float32 knows the KL to about 1e-7: at a high temperature the loss is no more exact than T^2 times that.

    Raises ValueError on shapes, dtypes or settings that do not fit, and IndexError, on a CPU, on a label that is out of
    range. On CUDA such a label makes the loss NaN, since to look at it would wait for the device; $ENGINE_KERNELS_CHECK=1
    has it looked at there too.
    """
    teachers, weights = list(teachers), together(weights)
    check_logits(student, teachers, labels, temperature, alpha, weights, reduction)
    plain = backend(student.device.type).name == "reference"
    if plain or forward_mode([student, *teachers, weights]):
        return naive.kd_loss(
            student, teachers, labels, temperature=temperature, alpha=alpha, weights=weights, ignore_index=ignore_index,
            reduction=reduction,
        )  # fmt: skip
    teachers, weights, constants = split_weights(student, teachers, weights)
    inputs = (student, *teachers)
    # "none" waits for the gradient of every row, and float16 for the factor of a GradScaler, without which it underflows
    early = reduction != "none" and torch.is_grad_enabled() and all(t.dtype != torch.float16 for t in inputs)
    wanted = [early and t.requires_grad for t in inputs]
    settings = (labels, weights, constants, temperature, alpha, ignore_index, reduction)
    return op.loss(student, teachers, settings, wanted)
