"""A module bound to its inputs (`Network`), and to the optimizer that trains it (`Learner`)."""

from __future__ import annotations

import inspect
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from engine.batch import Batch

# transformers looks at the values of a 2-D mask, a host synchronisation in every forward on a GPU; these families take
# a ready 4-D mask as it is
READY_MASKS = {"bert", "camembert", "distilbert", "electra", "roberta", "xlm-roberta"}


class Network:
    """A classifier that reads its own encoding of a batch and gives float32 logits [B, C].

    `parameters` may stand in for the module's own weights (name -> tensor), which is how pilot weights and forward-mode
    tangents pass through a model without touching it.
    """

    def __init__(self, name: str, module: nn.Module, encoding: str, precision: str = "fp32"):
        self.name, self.module, self.encoding, self.precision = name, module, encoding, precision
        self._inputs = set(inspect.signature(module.forward).parameters)
        self._ready_mask = getattr(getattr(module, "config", None), "model_type", None) in READY_MASKS

    def __call__(
        self, batch: Batch, parameters: dict[str, Tensor] | None = None, precision: str | None = None
    ) -> Tensor:
        inputs = {k: v for k, v in batch.inputs[self.encoding].items() if k in self._inputs}
        if batch.labels.is_cuda and self._ready_mask:
            inputs["attention_mask"] = attention_mask(inputs["attention_mask"])
        with torch.autocast(batch.labels.device.type, torch.bfloat16, enabled=(precision or self.precision) == "bf16"):
            if parameters is None:
                logits = self.module(**inputs).logits
            else:
                logits = functional_call(self.module, parameters, (), inputs).logits
        return logits if logits.dtype == torch.float64 else logits.float()

    def trainable(self) -> dict[str, nn.Parameter]:
        """The weights that take gradients, by name, a tied weight once."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def size(self) -> int:
        """Number of parameters, a tied weight counted once."""
        return sum(p.numel() for p in self.module.parameters())

    @contextmanager
    def in_mode(self, train: bool):
        """Dropout and its like switched for the body, and back as they were."""
        before = self.module.training
        self.module.train(train)
        try:
            yield
        finally:
            self.module.train(before)


def attention(device: torch.device, derivatives: bool):
    """Math attention where forward mode or a second derivative needs it, and on the CPU, where it is the faster one at
    short lengths; the fused kernels otherwise."""
    return sdpa_kernel(SDPBackend.MATH) if derivatives or device.type == "cpu" else nullcontext()


def attention_mask(mask: Tensor) -> Tensor:
    """[B, L] of 0 and 1 -> bool [B, 1, L, L], true where a query may look at a key."""
    return mask.bool()[:, None, None, :].expand(-1, 1, mask.shape[1], -1)


@dataclass
class Learner:
    """A network with the optimizer and schedule that train it."""

    network: Network
    optimizer: Optimizer
    schedule: LambdaLR
    max_grad_norm: float

    def update(self) -> None:
        """Clip the gradients to a global norm, take an optimizer step and a step of the schedule, drop the gradients."""
        nn.utils.clip_grad_norm_(self.network.module.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)

    def resume_schedule(self, steps: int) -> None:
        """Set the schedule to where it stood after `steps` steps."""
        self.schedule.last_epoch = steps
        for group, base, factor in zip(
            self.optimizer.param_groups, self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True
        ):
            group["lr"] = base * factor(steps)

    @classmethod
    def adamw(
        cls, network: Network, *, lr: float, steps: int, warmup_ratio: float, weight_decay: float, max_grad_norm: float
    ) -> Learner:
        """AdamW with linear warm-up over `warmup_ratio * steps` and linear decay to 0 at `steps`."""
        matrices = [p for p in network.trainable().values() if p.ndim >= 2]
        vectors = [p for p in network.trainable().values() if p.ndim < 2]  # biases and norms: no decay
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, fused=True)
        warmup = int(warmup_ratio * steps)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)  # never 0: a first step that does nothing would waste its batch
            return max(0.0, (steps - step) / max(1, steps - warmup))

        return cls(network, optimizer, LambdaLR(optimizer, factor), max_grad_norm)
