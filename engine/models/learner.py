"""A network with what trains it: gradients into its flat buffer, clipping, optimizer, schedule.

`update` is a function of tensors alone, so that a CUDA graph can hold it; what the host does between two steps, moving the
learning rate along its schedule, is `advance`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from engine.models.network import Network, Outputs
from engine.params import optim
from engine.params.flat import Lookups
from engine.sections import section
from engine.telemetry.below_eps import count_below


@dataclass
class Learner:
    """`schedule` and clipping (to the global norm `max_grad_norm`) are left out where they are None.

    Where it clips, a gradient whose norm is not finite moves nothing, and `skipped` counts it.
    """

    network: Network
    optimizer: Optimizer
    schedule: LambdaLR | None = None
    max_grad_norm: float | None = None
    skipped: Tensor | None = None  # [] on the device, once there was an update
    watched: bool = False  # whether `below_eps` is counted, of an optimizer that has an eps
    below_eps: Tensor | None = None  # [2] on the device (engine.telemetry.below_eps), once there was an update

    def __post_init__(self):
        self.flat = self.network.flatten()
        if getattr(self.optimizer, "flat", self.flat) is not self.flat:
            raise ValueError(f"the optimizer of the {self.network.name} was made before its module was moved or frozen, and would "
                             "step what is no part of it any more; make the optimizer anew.")  # fmt: skip

    def forward(self, batch, repeated: bool = False) -> tuple[Outputs, Lookups]:
        """Outputs with graph, and what `backward` needs to know of it."""
        with self.flat.lookups() as lookups:
            return self.network(batch, repeated=repeated), lookups

    def backward(self, outputs: Sequence[Tensor], cotangents: Sequence[Tensor] | None, lookups: Lookups) -> None:
        """Add J^T cotangents (of a scalar loss without) to the gradients."""
        self.flat.backward(outputs, cotangents, self.network.leaves(), lookups)

    @section("optimizer")
    def update(self) -> None:
        """Clip the gradients to a global norm, take an optimizer step, clear the gradients."""
        flat, clip, found_inf = self.flat, None, None
        flat.check()
        if self.max_grad_norm is not None:
            norm = flat.gradient_norm()
            clip = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            found_inf = norm.isfinite().logical_not().float()
            if self.skipped is None:
                self.skipped = torch.zeros_like(found_inf)
            self.skipped += found_inf
        if self.watched and (eps := self.optimizer.param_groups[0].get("eps")):
            counts = count_below(flat.gradients[: flat.dense], eps, clip)
            if self.below_eps is None:
                self.below_eps = torch.zeros_like(counts)
            self.below_eps += counts
        optim.step(self.optimizer, flat, clip, found_inf)
        torch.clear_autocast_cache()  # of a region that the whole step stands in
        flat.clear_gradients()

    def advance(self, steps: int = 1) -> None:
        """Move the learning rate `steps` steps along its schedule."""
        for _ in range(steps if self.schedule is not None else 0):
            self.schedule.step()

    def rate(self) -> float:
        """The learning rate of the next update."""
        return float(self.optimizer.param_groups[0]["lr"])  # sync where it is a device scalar

    def resume_schedule(self, steps: int) -> None:
        """Set the schedule to where it stood after `steps` steps."""
        self.schedule.last_epoch = steps
        for group, base, factor in zip(
            self.optimizer.param_groups, self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True
        ):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(base * factor(steps))  # in place: a CUDA graph reads it there
            else:
                group["lr"] = base * factor(steps)

    @classmethod
    def adamw(
        cls, network: Network, *, lr: float, steps: int, warmup_ratio: float, weight_decay: float, max_grad_norm: float,
        optimizer: optim.Kind = "flat",
    ) -> Learner:  # fmt: skip
        """AdamW with linear warm-up over `warmup_ratio * steps` and linear decay to 0 at `steps`; no decay of vectors.

        Raises UserError where `optimizer` (engine.params.optim) cannot be had.
        """
        stepper = optim.adamw(optimizer, network.flatten(), lr, weight_decay)
        warmup = int(warmup_ratio * steps)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)  # never 0: a first step that does nothing would waste its batch
            return max(0.0, (steps - step) / max(1, steps - warmup))

        return cls(network, stepper, LambdaLR(stepper, factor), max_grad_norm)

    @classmethod
    def constant(cls, network: Network, lr: float) -> Learner:
        """AdamW at one learning rate, without weight decay or clipping."""
        optimizer = optim.adamw("flat", network.flatten(), lr, weight_decay=0.0)
        return cls(network, optimizer, LambdaLR(optimizer, lambda step: 1.0))
