"""The meta-teacher of Meta-KD (Pan et al., ACL 2021): L = mean_i t_i [CE_i + lambda DA_i] over examples of all domains.

t_i is the example's typicality (engine.run.prototypes), CE_i its cross-entropy, DA_i that of the domain classifier
(engine.losses.domain_head): on the example's domain, whose gradient is reversed on its way into the encoder, or on the domain of a
random other example of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.batch import Batch
from engine.losses.objectives import Objective
from engine.methods.common.state import State
from engine.methods.common.train import train
from engine.models.network import Outputs


def step(weight: float, shuffled: bool) -> Callable[[State, Sequence[Batch], Sequence[Batch]], dict[str, Tensor]]:
    """A step function with `weight` lambda; batches have columns "domain" [B] and "typicality" [B]."""

    def loss_of(objective: Objective, outputs: Outputs, batch: Batch) -> Tensor:
        t, domains = batch.columns["typicality"], batch.columns["domain"]
        if shuffled:
            domains = domains[torch.rand(len(domains), device=domains.device).argsort()]
        task = F.cross_entropy(outputs.logits, batch.labels, reduction="none")
        domain = F.cross_entropy(outputs.domain, domains, reduction="none")
        return objective.share * (t * (task + weight * domain)).mean()

    return lambda state, batches, quizzes=(): train(state, batches, loss_of)
