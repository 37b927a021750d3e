"""mean_{B,C} (zbar - z_S)^2, whatever the temperature is."""

from __future__ import annotations

from torch import Tensor

from engine.losses.divergences import Divergence


def soft(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    # not F.mse_loss: its backward fails on forward-mode duals one of whose sides has no tangent (torch 2.13)
    return (student - teacher).square().mean()


DIVERGENCE = Divergence(soft=soft, help="mean squared difference of the logits, without a temperature", regression=True)
