"""AdamW over flat parameters: a pass a decay group, clipping and the bf16 shadow's refresh in the same pass."""

from __future__ import annotations

import torch
from torch import Tensor

from engine import native
from engine.flat import FlatParameters


class FlatAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW's update (Loshchilov and Hutter 2019) on the flat buffers.

    Two parameter groups, without and with weight decay; their state is by parameter, as torch's, so that checkpoints
    of either can be read by the other. A weight that no loss depends on has a gradient of 0 here, and so it decays.
    """

    def __init__(
        self, flat: FlatParameters, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.01,
    ):  # fmt: skip
        self.flat = flat
        self._moments = torch.zeros_like(flat.weights), torch.zeros_like(flat.weights)
        self._lrs: list[Tensor] = []
        parameters = list(flat.parameters.values())
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__([group for group in groups if group["params"]], defaults)

    def _span(self, group: dict) -> slice:
        """Where a group stands in the flat buffers: they are laid out by it."""
        return slice(0, self.flat.no_decay) if group["params"][0].ndim < 2 else slice(self.flat.no_decay, None)

    def _link(self) -> None:
        """Every parameter's state is a view; a state that was loaded is copied in first, where there is none it is zero."""
        flat = self.flat
        names = {id(p): name for name, p in flat.parameters.items()}
        exp_avg, exp_avg_sq = (flat.views(m) for m in self._moments)
        self._step = flat.weights.new_zeros((), dtype=torch.float32)
        for group in self.param_groups:
            for p in group["params"]:
                name, state = names[id(p)], self.state[p]
                for key, view in (("exp_avg", exp_avg[name]), ("exp_avg_sq", exp_avg_sq[name])):
                    if key not in state:
                        view.zero_()
                    elif state[key].data_ptr() != view.data_ptr():
                        view.copy_(state[key])
                    state[key] = view
                if "step" in state:
                    self._step.copy_(state["step"])
                state["step"] = self._step
        self._lrs = [flat.weights.new_zeros(()) for _ in self.param_groups]

    @torch.no_grad()
    def step(self, closure=None, *, clip: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        """One update from `flat.gradients`, times the device scalar `clip`; nothing moves where `found_inf` is not 0."""
        if closure is not None:
            raise ValueError("FlatAdamW takes no closure.")
        if not self.state:  # new, or taken back to that by the time machine
            self._link()
        flat, shadow = self.flat, self.flat.shadow
        self._step += 1 if found_inf is None else (found_inf == 0).to(self._step.dtype)
        for group, lr in zip(self.param_groups, self._lrs, strict=True):
            lr.fill_(group["lr"])
            span = self._span(group)
            native.adamw(
                flat.weights[span], flat.gradients[span], self._moments[0][span], self._moments[1][span], self._step, lr,
                *group["betas"], group["eps"], group["weight_decay"], clip, found_inf,
                None if shadow is None else shadow[span],
            )  # fmt: skip

    def state_dict(self) -> dict:
        """As torch's: every parameter has a step count of its own."""
        found = super().state_dict()
        state = {i: {**entries, "step": entries["step"].clone()} for i, entries in found["state"].items()}
        return {**found, "state": state}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._link()
