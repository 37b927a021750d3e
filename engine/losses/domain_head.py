"""What a teacher learns about domains beside its task (Meta-KD, Pan et al., ACL 2021), and a head for each domain.

With h [B, H] an example's mean state over its real tokens and k its domain:

    f = h + e_k                     e_k a learned domain embedding: what domains are compared by, and students learn from
    d = W_2 tanh(W_1 f' + b_1) + b_2    the domain classifier's logits [B, domains]

`reversal`: f' = f with its gradient's sign turned (Ganin et al. 2016), so that the classifier learns to tell the domains
apart and encoder and embeddings learn to keep it from that. Only for examples that it knows better than by guessing, whose
cross-entropy is below log(domains that there are examples of): reversed without that bound, the gradient that misleads the
classifier outgrows the task's, and a teacher of four domains stayed at chance on its task (docs/log.md). `shuffled`, as the
published code has it: f' = f, and the classifier is taught the domains of other examples of the batch
(engine.methods.common.meta_teacher).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DomainHead(nn.Module):
    """Embeddings and classifier of `domains` domains for states of `width` numbers; `seed` fixes their first weights.

    `seen` is how many of the domains it is trained on, by default all.
    """

    def __init__(self, width: int, domains: int, reversal: bool, seed: int, seen: int | None = None):
        super().__init__()
        self.reversal = reversal
        self.chance = math.log(domains if seen is None else seen)  # cross-entropy of a guess
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Parameter(torch.randn(domains, width) * 0.02)
            self.hidden, self.out = nn.Linear(width, width), nn.Linear(width, domains)

    def feature(self, h: Tensor, domains: Tensor) -> Tensor:
        """f [B, H] of mean states [B, H] and domain numbers [B]."""
        return h + self.embedding[domains]

    def logits(self, h: Tensor, domains: Tensor) -> Tensor:
        """d [B, domains]."""
        f = self.feature(h, domains)
        if self.reversal:
            with torch.no_grad():
                told = F.cross_entropy(self._classify(f), domains, reduction="none") < self.chance  # [B]
            f = torch.where(told[:, None], 2 * f.detach() - f, f.detach())  # the value of f, minus its gradient or none
        return self._classify(f)

    def _classify(self, f: Tensor) -> Tensor:
        return self.out(torch.tanh(self.hidden(f)))

    @torch.no_grad()
    def average_into(self, unseen: list[int], seen: list[int]) -> None:
        """Give domains that were not trained on the mean of the others' embeddings."""
        self.embedding[unseen] = self.embedding[seen].mean(0)


class DomainProjection(nn.Module):
    """The student's side of f: its mean state h mapped to the teacher's width by `layer`, which it learns."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer = layer

    def feature(self, h: Tensor, domains: Tensor) -> Tensor:
        return self.layer(h)


def widen(module: nn.Module, classes: int, names: list[str], seed: int) -> None:
    """A classifier of `classes` outputs for every name instead of one: the last linear layer, made anew.

    Outputs are named "name: label". Raises ValueError where the module has no such layer.
    """
    found = [(n, m) for n, m in module.named_modules() if isinstance(m, nn.Linear) and m.out_features == classes]
    if not found:
        raise ValueError(f"a {type(module).__name__} has no linear layer of {classes} outputs.")
    path, old = found[-1]
    new = nn.Linear(old.in_features, classes * len(names), bias=old.bias is not None).to(old.weight)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        new.weight.copy_(torch.randn(new.weight.shape, generator=generator) * 0.02)
        if new.bias is not None:
            new.bias.zero_()
    parent, _, attribute = path.rpartition(".")
    setattr(module.get_submodule(parent), attribute, new)
    labels = [module.config.id2label[i] for i in range(classes)]
    module.config.id2label = dict(enumerate(f"{name}: {label}" for name in names for label in labels))
    module.config.label2id = {label: i for i, label in module.config.id2label.items()}
    if hasattr(module, "num_labels"):
        module.num_labels = classes * len(names)
