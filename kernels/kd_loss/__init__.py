"""KL over averaged teacher logits plus cross-entropy, in one pass over memory, differentiable twice (`kd_ops.py`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.kernels.ops.common import backends
from engine.kernels.ops.kd_loss import naive as reference
from engine.kernels.ops.kd_loss import op as kd_ops

DTYPES = {torch.float32, torch.bfloat16, torch.float16, torch.float64}
REDUCTIONS = ("mean", "sum", "none")


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
    check(student, teachers, labels, temperature, alpha, weights, reduction)
    plain = backends.backend(student.device.type).name == "reference"
    if plain or reference.forward_mode([student, *teachers, weights]):
        return reference.kd_loss(
            student, teachers, labels, temperature=temperature, alpha=alpha, weights=weights, ignore_index=ignore_index,
            reduction=reduction,
        )  # fmt: skip
    teachers, weights, constants = split_weights(student, teachers, weights)
    inputs = (student, *teachers)
    # "none" waits for the gradient of every row, and float16 for the factor of a GradScaler, without which it underflows
    early = reduction != "none" and torch.is_grad_enabled() and all(t.dtype != torch.float16 for t in inputs)
    wanted = [early and t.requires_grad for t in inputs]
    settings = (labels, weights, constants, temperature, alpha, ignore_index, reduction)
    return kd_ops.loss(student, teachers, settings, wanted)


def check(student: Tensor, teachers: list[Tensor], labels, temperature, alpha, weights, reduction: str) -> None:
    """Metadata alone: nothing waits for a device."""
    reference.check_teachers(teachers, teachers if weights is None else weights)
    if student.shape != teachers[0].shape:
        raise ValueError(
            f"student logits are {tuple(student.shape)}, teachers' are {tuple(teachers[0].shape)}; they must agree."
        )
    if student.dim() == 0 or student.shape[-1] == 0:
        raise ValueError(f"logits must be [..., C] with at least one class; got {tuple(student.shape)}.")
    if any(t.dtype not in DTYPES for t in (student, *teachers)):
        raise ValueError(
            f"logits must be float32, bfloat16, float16 or float64; got {[str(t.dtype) for t in (student, *teachers)]}."
        )
    if any(t.device != student.device for t in teachers):
        raise ValueError(f"logits must be on one device; got {[str(t.device) for t in (student, *teachers)]}.")
    if isinstance(temperature, Tensor) or isinstance(alpha, Tensor):
        raise ValueError("temperature and alpha must be numbers; got a tensor, which would have to be waited for.")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0; got {temperature}.")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be mean, sum or none; got {reduction!r}.")
    if labels is None:
        return
    if labels.dtype != torch.int64 or labels.shape != student.shape[:-1] or labels.device != student.device:
        raise ValueError(
            f"labels must be int64 {tuple(student.shape[:-1])} on {student.device}, to fit the logits; got {labels.dtype} "
            f"{tuple(labels.shape)} on {labels.device}."
        )


def together(weights) -> Sequence[float] | Tensor | None:
    """A list that holds tensors [] as one tensor [K]."""
    if weights is None or isinstance(weights, Tensor) or not any(isinstance(w, Tensor) for w in weights):
        return weights
    first = next(w for w in weights if isinstance(w, Tensor))
    return torch.stack([torch.as_tensor(w, dtype=first.dtype, device=first.device) for w in weights])


def split_weights(student: Tensor, teachers: list[Tensor], weights) -> tuple[list[Tensor], Tensor | None, list[float]]:
    """For the ops: the teachers, their weights as a tensor on the device or else as numbers.

    Weights that are learned take the mean of the logits by autograd, and the ops see one teacher: at any number of
    classes that is one pass more, and derivatives of every order are right.
    """
    if isinstance(weights, Tensor):
        if weights.requires_grad and torch.is_grad_enabled():
            return [reference.mean(teachers, weights, reference.arithmetic([student, *teachers]))], None, [1.0]
        return teachers, weights.detach().contiguous(), [0.0] * len(teachers)
    return teachers, None, [1 / len(teachers)] * len(teachers) if weights is None else [float(w) for w in weights]
