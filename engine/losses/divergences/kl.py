"""T^2 KL(softmax(zbar / T) || softmax(z_S / T)), summed over classes (Hinton et al. 2015), by the fused kernels."""

from __future__ import annotations

from engine.kernels import kd_loss, meta_cotangent
from engine.losses.divergences import Divergence

DIVERGENCE = Divergence(
    loss=kd_loss, cotangents=meta_cotangent, help="T^2 times the KL divergence of the softened probabilities"
)
