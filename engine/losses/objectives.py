"""The losses a student is trained on: hard (labels), soft (averaged teacher logits), features, and their sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels import mean_logits
from engine.losses.divergences import DIVERGENCES, FOR_REGRESSION, Divergence
from engine.models.network import Outputs

FeatureLoss = Literal["none", "patient", "tinybert"]
IGNORED = -100  # the label of an example that has none, as in torch's cross_entropy and in engine.kernels


@dataclass(frozen=True)
class Objective:
    """L = alpha soft(student, mean of teachers) + (1 - alpha) hard(student, labels) + beta features, mean over the batch.

    soft compares the student's logits with zbar = sum_k w_k z_k, w_k = 1/K unless given, by the divergence with the name
    `soft_loss` (engine.losses.divergences). hard is cross-entropy, or the squared error of the one output in a regression.
    Cross-entropy is the mean over the labels that are not -100, and 0 where there is none: such an example counts in soft and
    in the features, but not in hard. A regression has no such label.
    Features of `patient` (PKD, Sun et al. 2019), h the inner layers' states of the token that the classifier reads [B, layers, H], and of `tinybert`
    (Jiao et al. 2020), h the states and a the attention scores of every matched layer, n_i the real tokens of example i, W the
    projection that the student learns:

    patient     sum_k w_k mean_{B,layers,H} (h_S/|h_S| - h_k/|h_k|)^2         (W h_S for h_S where widths differ)
    tinybert    sum_k w_k mean_B sum_layers [ mean_{n_i,H} (W h_S - h_k)^2 + mean_{heads,n_i,n_i} (a_S - a_k)^2 ]

    Where models give their examples' domain features d [B, H], tinybert adds mean_H (W' d_S - d_k)^2 (Meta-KD, Pan et al.
    2021, where all these are weighted by example). Without `on_logits`, L is the features' part alone.

    A part of a batch (engine.meta.micro_batches) is weighed by what it counts in the batch's means: `share` of its examples,
    `hard_share` of its labels, a scalar on the device where it depends on how many of them are -100.
    """

    soft_loss: str = "kl"
    temperature: float = 5.0
    alpha: float = 0.5
    regression: bool = False
    feature_loss: FeatureLoss = "none"
    beta: float = 100.0
    on_logits: bool = True
    share: float = 1.0
    hard_share: float | Tensor = 1.0

    def __post_init__(self):
        for name, allowed in (("soft_loss", DIVERGENCES), ("feature_loss", get_args(FeatureLoss))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}.")
        if not self.temperature > 0 or not 0 <= self.alpha <= 1 or not self.beta >= 0:
            raise ValueError(
                f"temperature is {self.temperature}, alpha {self.alpha} and beta {self.beta}; they must be above 0, from 0 to 1, "
                "and at least 0.")  # fmt: skip
        if not self.on_logits and self.feature_loss == "none":
            raise ValueError("a loss that is not on_logits needs a feature_loss.")
        if self.regression and not self.divergence.regression:
            raise ValueError(f"{self.soft_loss} is not for the one output of a regression; use {FOR_REGRESSION}.")

    @property
    def divergence(self) -> Divergence:
        return DIVERGENCES[self.soft_loss]

    def hard(self, student: Tensor, labels: Tensor) -> Tensor:
        """Mean hard loss of logits [B, C] (regression: [B, 1]) against labels [B]; raises ValueError for other shapes."""
        if self.regression:
            fits = student.shape in (labels.shape, (*labels.shape, 1))
        else:
            fits = student.shape[:-1] == labels.shape
        if not fits:
            raise ValueError(f"logits {tuple(student.shape)} and labels {tuple(labels.shape)} do not fit: the labels of "
                             f"{'[B, 1]' if self.regression else '[B, C]'} logits are [B].")  # fmt: skip
        labels = labels.reshape(-1)
        if self.regression:
            loss = _mean_square(student.reshape(-1) - labels)
        else:  # torch's own mean is NaN where no label counts
            loss = F.cross_entropy(
                student.reshape(-1, student.shape[-1]), labels, ignore_index=IGNORED, reduction="sum"
            )
            loss = loss / count_labels(labels)
        return _weighed(loss, self.hard_share)

    def distil(
        self, student: Outputs, teachers: Sequence[Outputs], labels: Tensor, weights: Tensor | None = None,
        by_example: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The whole loss of a student given K teachers, differentiable twice in all of them and in `weights` [K].

        `by_example` [B] weighs the examples in the mean of the features' part, without dividing by the weights' sum.
        Raises ValueError for shapes that do not fit, and where features are wanted and a model gives none.
        """
        if not self.on_logits:
            return _weighed(self.beta * self._features(student, teachers, weights, by_example), self.share)
        logits, divergence = [teacher.logits for teacher in teachers], self.divergence
        together = divergence.fused and not isinstance(self.hard_share, Tensor)  # labels count as their examples do
        if divergence.fused:
            labels_too = labels if together else None
            loss = divergence.loss(
                student.logits, logits, labels_too, temperature=self.temperature, alpha=self.alpha, weights=weights
            )
        else:
            mean = mean_logits(logits, weights)
            if mean.shape != student.logits.shape:
                raise ValueError(
                    f"student logits are {tuple(student.logits.shape)}, teachers' are {tuple(mean.shape)}; they must agree.")  # fmt: skip
            loss = self.alpha * divergence.soft(student.logits, mean, self.temperature)
        loss = _weighed(loss, self.share)
        if not together:
            loss = loss + (1 - self.alpha) * self.hard(student.logits, labels)
        if self.feature_loss != "none":
            features = self.beta * self._features(student, teachers, weights, by_example)
            loss = loss + _weighed(features, self.share)
        return loss

    def _features(
        self, student: Outputs, teachers: Sequence[Outputs], weights: Tensor | None, by_example: Tensor | None
    ) -> Tensor:
        """The features' part of every teacher, averaged over the batch."""
        shapes = [[None if t is None else tuple(t.shape) for t in each[1:]] for each in (student, *teachers)]
        wanted = shapes[0][0] is not None and (self.feature_loss == "patient" or shapes[0][1] is not None)
        if not wanted or any(shape != shapes[0] for shape in shapes):
            raise ValueError(
                f"the {self.feature_loss} loss compares states of one shape; student and teachers give {shapes}. Use "
                "feature_loss='none' (--feature-loss none).")  # fmt: skip
        if weights is None:
            weights = [1 / len(teachers)] * len(teachers)
        compare = _patient if self.feature_loss == "patient" else _tinybert
        each = sum(w * compare(student, t) for w, t in zip(weights, teachers, strict=True))  # [B]
        return (each if by_example is None else each * by_example).mean()

    def slopes(
        self, student: Outputs, teachers: Sequence[Outputs], labels: Tensor, weights: Tensor | None = None,
        by_example: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
        """The loss, and its gradient to each of the student's outputs: the head alone, detached from every model."""
        with torch.enable_grad():
            head = student.detached(requires_grad=True)
            weights = None if weights is None else weights.detach()
            loss = self.distil(head, [t.detached() for t in teachers], labels, weights, by_example)
            return loss.detach(), _gradients(loss, head.given())

    def slopes_along(
        self, student: Outputs, tangents: Outputs, teachers: Sequence[Outputs], labels: Tensor, weights: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
        """`slopes`, and how each changes as the student's outputs move along `tangents`.

        The second is H u with H = d^2 L / d o_S^2. H is symmetric, so that it is also the gradient of < dL/do_S, u >: the
        loss needs two derivatives in reverse, and none forward.
        """
        with torch.enable_grad():
            head = student.detached(requires_grad=True)
            loss = self.distil(
                head, [t.detached() for t in teachers], labels, None if weights is None else weights.detach()
            )
            slopes = _gradients(loss, head.given(), create_graph=True)
            inner = sum((s * u).sum() for s, u in zip(slopes, tangents.given(), strict=True))
            return [s.detach() for s in slopes], _gradients(inner, head.given())

    def cotangents(
        self, student: Outputs, teachers: Sequence[Outputs], labels: Tensor, tangents: Outputs, weights: Tensor | None = None
    ) -> tuple[list[Outputs], Tensor | None]:  # fmt: skip
        """c = d/d o < dL/do_S, u > for every output o of every teacher, and for `weights` where they require gradient.

        u are the student's tangents, of its outputs' shapes. The divergence's closed form where it has one (kl) and logits
        alone are compared; else autograd at the head, on tensors of [B, C] and [B, layers, H].
        """
        learned = weights is not None and weights.requires_grad
        closed_form = self.divergence.cotangents
        if closed_form is not None and self.feature_loss == "none" and not learned:
            logits = [t.logits for t in teachers]
            settings = {"temperature": self.temperature, "alpha": self.alpha, "weights": weights}
            found = closed_form(student.logits, logits, tangents.logits, **settings)
            return [Outputs(_weighed(c, self.share)) for c in found], None
        with torch.enable_grad():
            student = student.detached(requires_grad=True)
            teachers = [t.detached(requires_grad=True) for t in teachers]
            w = weights.detach().requires_grad_() if learned else weights
            slopes = _gradients(self.distil(student, teachers, labels, w), student.given(), create_graph=True)
            inner = sum((s * u).sum() for s, u in zip(slopes, tangents.given(), strict=True))
            found = iter(_gradients(inner, [*(t for o in teachers for t in o.given()), *([w] if learned else [])]))
            cotangents = [Outputs(*(None if t is None else next(found) for t in o)) for o in teachers]
            return cotangents, next(found) if learned else None


def _gradients(loss: Tensor, inputs: list[Tensor], create_graph: bool = False) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs, create_graph=create_graph, allow_unused=True, materialize_grads=True))


def _patient(student: Outputs, teacher: Outputs) -> Tensor:
    """[B]; of features [B, layers, H]."""
    return (_unit(student.features) - _unit(teacher.features)).square().flatten(1).mean(1)


def _tinybert(student: Outputs, teacher: Outputs) -> Tensor:
    """[B]; features and attention come divided, so that sums of squares are means (engine.models.features)."""
    loss = (student.features - teacher.features).square().flatten(1).sum(1)
    loss = loss + (student.attention - teacher.attention).square().flatten(1).sum(1)
    if student.domain is not None:
        loss = loss + (student.domain - teacher.domain).square().mean(1)
    return loss


def count_labels(labels: Tensor) -> Tensor:
    """How many labels [] the mean of cross-entropies is over: those that are not ignored, one at least."""
    return (labels != IGNORED).sum().clamp_min(1)


def _weighed(loss: Tensor, share: float | Tensor) -> Tensor:
    if isinstance(share, Tensor):
        return loss * share.to(loss.dtype)
    return loss if share == 1 else loss * share


def _unit(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12)


def _mean_square(x: Tensor) -> Tensor:
    # not F.mse_loss: its backward fails on forward-mode duals one of whose sides has no tangent (torch 2.13)
    return x.square().mean()
