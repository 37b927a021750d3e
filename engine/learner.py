"""A network with what trains it: gradients into its flat buffer, clipping, optimizer, schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from engine.flat import Lookups
from engine.network import Network, Outputs
from engine.optim import FlatAdamW


@dataclass
class Learner:
    """`schedule` and clipping (to the global norm `max_grad_norm`) are left out where they are None."""

    network: Network
    optimizer: Optimizer
    schedule: LambdaLR | None = None
    max_grad_norm: float | None = None

    def forward(self, batch, repeated: bool = False) -> tuple[Outputs, Lookups]:
        """Outputs with graph, and what `backward` needs to know of it."""
        with self.network.flat.lookups() as lookups:
            return self.network(batch, repeated=repeated), lookups

    def backward(self, outputs: Sequence[Tensor], cotangents: Sequence[Tensor] | None, lookups: Lookups) -> None:
        """Add J^T cotangents (of a scalar loss without) to the gradients."""
        self.network.flat.backward(outputs, cotangents, self.network.leaves(), lookups)

    def update(self) -> None:
        """Clip the gradients to a global norm, take an optimizer step and a step of the schedule, clear the gradients."""
        flat, clip = self.network.flat, None
        flat.check()
        if self.max_grad_norm is not None:
            clip = (self.max_grad_norm / (flat.gradient_norm() + 1e-6)).clamp(max=1.0)
        if isinstance(self.optimizer, FlatAdamW):
            self.optimizer.step(clip=clip)
        else:
            if clip is not None:
                flat.gradients.mul_(clip)
            self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()
        flat.clear_gradients()

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
        """AdamW with linear warm-up over `warmup_ratio * steps` and linear decay to 0 at `steps`; no decay of vectors."""
        optimizer = FlatAdamW(network.flatten(), lr=lr, weight_decay=weight_decay)
        warmup = int(warmup_ratio * steps)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)  # never 0: a first step that does nothing would waste its batch
            return max(0.0, (steps - step) / max(1, steps - warmup))

        return cls(network, optimizer, LambdaLR(optimizer, factor), max_grad_norm)

    @classmethod
    def constant(cls, network: Network, lr: float) -> Learner:
        """AdamW at one learning rate, without weight decay or clipping."""
        optimizer = FlatAdamW(network.flatten(), lr=lr, weight_decay=0.0)
        return cls(network, optimizer, LambdaLR(optimizer, lambda step: 1.0))
