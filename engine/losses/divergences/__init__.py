"""The divergences: what the soft loss compares the student's logits with the teachers' by, one file each.

Imports the kernels. Another divergence is one file here that ends in

    DIVERGENCE = Divergence(soft=soft, help="...")

where `soft` is a function of the student's logits [B, C], the teachers' mean logits [B, C] and the temperature, whose value is
a scalar, the mean over the batch, that autograd can differentiate twice in both. `--soft-loss` takes it from there. A file
elsewhere does as well: by its path, `--soft-loss my_divergence.py`, or as an entry point of an installed package, in the group
`metadistil.divergences`, as in `mine = "my_package.my_divergence"`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from engine.plugins import DIVERGENCES

__all__ = ["DIVERGENCES", "FOR_REGRESSION", "Divergence"]

FOR_REGRESSION = "mse_logits"  # what a regression takes where --soft-loss compares classes alone


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Either `soft`, or `loss` and `cotangents` that compute with fused kernels.

    help        one line of --help: what the soft loss is. A literal text (engine.plugins)
    soft        (student [B, C], mean of the teachers [B, C], temperature) -> scalar
    loss        (student, list of the teachers' logits, labels, temperature=, alpha=, weights=) -> alpha soft + (1 - alpha)
                cross-entropy, as engine.kernels.kd_loss; labels None leave the cross-entropy out
    cotangents  (student, list of the teachers' logits, tangents u of the student's logits, temperature=, alpha=, weights=) ->
                for each teacher d/dz_k < dL/dz_S, u > in closed form, as engine.kernels.meta_cotangent
    regression  `soft` also compares the one output of a regression

    Raises ValueError where not just one of the two forms is given.
    """

    help: str
    soft: Callable[[Tensor, Tensor, float], Tensor] | None = None
    loss: Callable[..., Tensor] | None = None
    cotangents: Callable[..., list[Tensor]] | None = None
    regression: bool = False

    def __post_init__(self):
        if (self.soft is None) == (self.loss is None) or (self.loss is None) != (self.cotangents is None):
            raise ValueError("a divergence has either soft, or loss and cotangents.")
        if self.regression and self.soft is None:
            raise ValueError("fused kernels compare classes: a divergence for a regression has soft.")

    @property
    def fused(self) -> bool:
        """Whether it computes with fused kernels."""
        return self.loss is not None
