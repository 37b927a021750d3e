"""MetaDistil and plain KD as a user gets them without the engine: what its speed, memory and gradients are held against.

With KD loss l(phi, theta; x) = alpha T^2 KL(softmax(zbar/T) || softmax(z_S/T)) + (1 - alpha) CE(z_S, y), zbar the mean of
the teachers' logits, a round of MetaDistil on a pilot batch x and a quiz batch x' is

    phi'    = phi - eta grad_phi l(phi, theta; x)       kept in the graph
    theta_k <- AdamW(theta_k, d CE(phi'; x') / d theta_k)
    phi     <- AdamW(phi, grad_phi l(phi, theta; x))    from the phi that was backed up, with the new teachers

Source: MetaDistil (Zhou, Xu and McAuley, ACL 2022), written from the formulas. What the published program does at a cost
is done here too, since that cost is to be measured: eager attention, every batch at the full length, `create_graph` from
the teachers' weights to the quiz loss, deep copies of the student and its optimizer in every round, a host sync a loss.
Its mistakes are not repeated. Nothing of the engine is imported.

`precision="bf16"` runs the forwards under torch's autocast, as people do. Weights, losses and optimizers stay float32.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

Batch = dict[str, Tensor]  # input_ids, attention_mask and perhaps token_type_ids [B, L]; labels [B]
Precision = Literal["fp32", "bf16"]


def pad(batch: Batch, length: int = 128, pad_id: int = 0) -> Batch:
    """The batch with its [B, L] tensors filled up to [B, length]: tokens with `pad_id`, masks and segments with 0."""
    longest = batch["input_ids"].shape[1]
    if longest > length:
        raise ValueError(f"The batch has {longest} tokens, more than the length {length}; cut it or raise the length.")
    fill = {name: pad_id if name == "input_ids" else 0 for name in batch if name != "labels"}
    return batch | {name: F.pad(batch[name], (0, length - longest), value=value) for name, value in fill.items()}


def distillation_loss(
    student: Tensor, teachers: Sequence[Tensor], labels: Tensor, temperature: float, alpha: float
) -> Tensor:
    """Scalar loss of the student's logits [B, C] against those of K teachers [B, C], averaged before the softmax."""
    mean = torch.stack(list(teachers)).mean(0)
    log_student = F.log_softmax(student / temperature, dim=-1)
    soft = F.kl_div(log_student, F.softmax(mean / temperature, dim=-1), reduction="batchmean")
    return alpha * temperature**2 * soft + (1 - alpha) * F.cross_entropy(student, labels)


class Learner:
    """A model with AdamW, without weight decay, and a learning rate that falls linearly to 0 at `total_steps`."""

    def __init__(self, model: nn.Module, lr: float, total_steps: int, max_grad_norm: float):
        self.model, self.max_grad_norm = model, max_grad_norm
        self.optimizer = AdamW(model.parameters(), lr=lr, weight_decay=0.0)
        self.schedule = LambdaLR(self.optimizer, lambda step: max(0.0, 1 - step / total_steps))

    def update(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()


class PlainKD:
    """Distillation from frozen teachers (Hinton et al. 2015) in straightforward PyTorch."""

    def __init__(
        self,
        student: nn.Module,
        teachers: Sequence[nn.Module],
        *,
        lr: float,
        temperature: float,
        alpha: float,
        max_grad_norm: float = 1.0,
        total_steps: int = 10_000,
        length: int = 128,
        precision: Precision = "fp32",
    ):
        self.student, self.teachers, self.precision = student, list(teachers), precision
        self.learner = Learner(student, lr, total_steps, max_grad_norm)
        self.temperature, self.alpha, self.length = temperature, alpha, length
        for teacher in self.teachers:
            teacher.eval()

    def step(self, batch: Batch) -> dict[str, float]:
        batch = self.pad(batch)
        self.student.train()
        with torch.no_grad():
            teacher_logits = [logits(teacher, batch, precision=self.precision) for teacher in self.teachers]
        found = logits(self.student, batch, precision=self.precision)
        loss = self.loss(found, teacher_logits, batch["labels"])
        loss.backward()
        self.learner.update()
        return {"loss": loss.item()}

    def loss(self, student: Tensor, teachers: Sequence[Tensor], labels: Tensor) -> Tensor:
        return distillation_loss(student, teachers, labels, self.temperature, self.alpha)

    def pad(self, batch: Batch) -> Batch:
        return pad(batch, self.length, self.student.config.pad_token_id or 0)


class PublishedLoop:
    """MetaDistil with one pilot and one quiz batch a step; the parts of a step are methods, to be timed one by one."""

    def __init__(
        self,
        student: nn.Module,
        teachers: Sequence[nn.Module],
        *,
        lr: float,
        teacher_lr: float,
        pilot_lr: float,
        temperature: float,
        alpha: float,
        max_grad_norm: float = 1.0,
        total_steps: int = 10_000,
        length: int = 128,
        precision: Precision = "fp32",
    ):
        for model in (student, *teachers):
            attention = model.config._attn_implementation
            if attention != "eager":  # fused attention has no second derivative, and would not be what was published
                raise ValueError(f"Attention is {attention!r}; load the model with attn_implementation='eager'.")
        self.precision: Precision = precision
        self.kd = PlainKD(
            student, teachers, lr=lr, temperature=temperature, alpha=alpha, max_grad_norm=max_grad_norm,
            total_steps=total_steps, length=length, precision=precision,
        )  # fmt: skip
        self.student, self.teachers, self.pilot_lr = student, self.kd.teachers, pilot_lr
        self.teacher_learners = [Learner(teacher, teacher_lr, total_steps, max_grad_norm) for teacher in self.teachers]

    def step(self, batch: Batch, quiz: Batch) -> dict[str, float]:
        optimizer = self.kd.learner.optimizer
        weights_backup = copy.deepcopy(self.student.state_dict())
        optimizer_backup = copy.deepcopy(optimizer.state_dict())
        losses = self.meta_gradient(batch, quiz)
        for learner in self.teacher_learners:
            learner.update()
        # `fast_weights` leaves the student alone; the published program writes to it and restores it in every round
        self.student.load_state_dict(weights_backup)
        optimizer.load_state_dict(optimizer_backup)
        return losses | self.kd.step(batch)

    def meta_gradient(self, batch: Batch, quiz: Batch) -> dict[str, float]:
        """Leave d quiz loss / d theta_k in the teachers' `.grad`; no model is updated."""
        batch, quiz = self.kd.pad(batch), self.kd.pad(quiz)
        teacher_logits = self.teach(batch)
        pilot_loss, fast = self.fast_weights(batch, teacher_logits)
        quiz_loss = self.quiz_loss(fast, quiz)
        self.teachers_backward(quiz_loss)
        return {"pilot_loss": pilot_loss.item(), "quiz_loss": quiz_loss.item()}

    def teach(self, batch: Batch) -> list[Tensor]:
        """The teachers' logits [B, C] with their graph."""
        return [logits(teacher, batch, precision=self.precision) for teacher in self.teachers]

    def fast_weights(self, batch: Batch, teacher_logits: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The pilot loss, and the student's weights after the pilot step, which depend on the teachers."""
        self.student.train()
        weights = dict(self.student.named_parameters())
        found = logits(self.student, batch, weights, self.precision)
        loss = self.kd.loss(found, teacher_logits, batch["labels"])
        gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True, allow_unused=True)
        fast = {
            name: weight if gradient is None else weight - self.pilot_lr * gradient
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
        }
        return loss, fast

    def quiz_loss(self, fast: dict[str, Tensor], quiz: Batch) -> Tensor:
        self.student.eval()
        return F.cross_entropy(logits(self.student, quiz, fast, self.precision), quiz["labels"])

    def teachers_backward(self, quiz_loss: Tensor) -> None:
        """Parameters that the quiz loss does not depend on have None for a gradient; AdamW leaves them out."""
        targets = [p for teacher in self.teachers for p in teacher.parameters()]
        gradients = torch.autograd.grad(quiz_loss, targets, allow_unused=True)
        for target, gradient in zip(targets, gradients, strict=True):
            target.grad = gradient


def logits(
    model: nn.Module, batch: Batch, weights: dict[str, Tensor] | None = None, precision: Precision = "fp32"
) -> Tensor:
    """Logits [B, C] in the weights' dtype, with other weights than the model's own if given."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    low = precision == "bf16"
    with torch.autocast(batch["labels"].device.type, torch.bfloat16, enabled=low):
        output = model(**inputs) if weights is None else functional_call(model, weights, kwargs=inputs)
    return output.logits.float() if low else output.logits
