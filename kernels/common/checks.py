"""What the ops ask of their inputs. Only labels are looked at, and only where that waits for no device."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.kernels.ops.common.autograd import transformed

DTYPES = {torch.float32, torch.bfloat16, torch.float16, torch.float64}
REDUCTIONS = ("mean", "sum", "none")


def check_logits(student: Tensor, teachers: list[Tensor], labels, temperature, alpha, weights, reduction: str) -> None:
    """Metadata alone: nothing waits for a device."""
    check_teachers(teachers, teachers if weights is None else weights)
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
            f"labels must be int64 {tuple(student.shape[:-1])} on {student.device}, to fit logits {tuple(student.shape)}; got "
            f"{labels.dtype} {tuple(labels.shape)} on {labels.device}."
        )


def check_teachers(teachers: Sequence[Tensor], weights: Sequence[float] | Tensor) -> None:
    if not teachers:
        raise ValueError("at least one teacher's logits are needed; got none.")
    if any(z.shape != teachers[0].shape for z in teachers):
        raise ValueError(f"teachers' logits must share one shape; got {[tuple(z.shape) for z in teachers]}.")
    if isinstance(weights, Tensor) and (
        weights.dim() != 1 or weights.device != teachers[0].device or not weights.is_floating_point()
    ):
        raise ValueError(
            f"weights must be numbers, or a floating tensor [K] on the logits' device, {teachers[0].device}; got "
            f"{weights.dtype} {tuple(weights.shape)} on {weights.device}."
        )
    if len(weights) != len(teachers):
        raise ValueError(f"got {len(weights)} weights for {len(teachers)} teachers.")


def check_labels(labels: Tensor | None, classes: int, ignore_index: int) -> None:
    """Raises IndexError naming the first that is out of range. Only where looking waits for no device, or is asked for.

    $ENGINE_KERNELS_CHECK=1 has labels looked at on every device.
    """
    if labels is None or type(labels) is not Tensor or torch.compiler.is_compiling() or transformed():
        return
    if labels.device.type != "cpu" and os.environ.get("ENGINE_KERNELS_CHECK", "0") != "1":
        return
    bad = (labels != ignore_index) & ((labels < 0) | (labels >= classes))
    if bad.any():
        raise IndexError(
            f"label {labels[bad][0].item()} is out of range; labels are 0 to {classes - 1}, or {ignore_index} to be ignored."
        )
