"""The meta-teacher of Meta-KD (Pan et al., ACL 2021): L = mean_i t_i [CE_i + lambda DA_i] over examples of all domains.

t_i is the example's typicality (engine.prototypes), CE_i its cross-entropy, DA_i that of the domain classifier
(engine.domain_head): on the example's domain, whose gradient is reversed on its way into the encoder, or on the domain of a
random other example of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.batch import Batch
from engine.methods.state import State


def step(weight: float, shuffled: bool) -> Callable[[State, Sequence[Batch], Sequence[Batch]], dict[str, Tensor]]:
    """A step function with `weight` lambda; batches have columns "domain" [B] and "typicality" [B]."""

    def meta_teacher(state: State, batches: Sequence[Batch], quizzes: Sequence[Batch] = ()) -> dict[str, Tensor]:
        teacher, losses = state.student, []
        teacher.network.module.train()
        for whole in batches:
            for batch, objective in state.parts(whole):
                outputs, lookups = teacher.forward(batch)
                t, domains = batch.columns["typicality"], batch.columns["domain"]
                if shuffled:
                    domains = domains[torch.rand(len(domains), device=domains.device).argsort()]
                task = F.cross_entropy(outputs.logits, batch.labels, reduction="none")
                domain = F.cross_entropy(outputs.domain, domains, reduction="none")
                loss = objective.share * (t * (task + weight * domain)).mean()
                teacher.backward([loss], None, lookups)
                losses.append(loss.detach())
            teacher.update()
        return {"loss": torch.stack(losses).sum() / len(batches)}

    return meta_teacher
