"""Prototype scores and domain expertise: what an example counts in Meta-KD (Pan et al., ACL 2021), each for itself.

With h_i the mean state of example i over its real tokens in the encoder that the teacher starts from, p_k^m the mean of the
h_i of domain k and class m, and p_y,i the probability that the prepared teacher gives to the example's own class:

    t_i = own cos(p_k^m, h_i) + others sum_{k' != k} cos(p_k'^m, h_i)        typicality: of its domain, and of all
    w_i = (1 + t_i) / (exp((p_y,i - 1)^2) + 1)                                expertise of the teacher on it
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.data.batches import evaluation_batches
from engine.data.encode import EncodedSplit
from engine.evaluation import EVALUATION_BATCH
from engine.features import InnerStates
from engine.network import Encoder
from engine.precision import ieee


@torch.no_grad()
def mean_states(network: Encoder, split: EncodedSplit, device: torch.device) -> Tensor:
    """h [n, H] of every example, in its order, dropout off and in float32; on the CPU."""
    split, found, before = split.only({network.encoding}), None, network.inner
    assert not hasattr(network.module, "extras"), "h is the encoder's own state, before a domain head is attached"
    network.inner = InnerStates(domain="feature")
    try:
        with network.in_mode(train=False), ieee():
            for rows, batch in evaluation_batches(split, EVALUATION_BATCH):
                h = network(batch.to(device), precision="fp32").domain
                found = h.new_empty(len(split), h.shape[1]) if found is None else found
                found[torch.tensor(rows, device=device)] = h
    finally:
        network.inner = before
    return found.cpu()  # sync: before a training


def typicality(
    states: Tensor, domains: Tensor, labels: Tensor, own: float, others: float, domain_count: int, classes: int
) -> Tensor:
    """t [n] of states [n, H], domains [n] and labels [n] (numbers). A domain without examples of a class has no prototype
    of it, and adds nothing."""
    t = torch.zeros(len(states), dtype=states.dtype)
    for m in range(classes):
        of_class = labels == m
        for k in range(domain_count):
            members = of_class & (domains == k)
            if not members.any():
                continue
            similar = F.cosine_similarity(states[of_class], states[members].mean(0), dim=-1)
            t[of_class] += torch.where(domains[of_class] == k, own, others) * similar
    return t


def expertise(t: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """w [n] of typicality t [n], the teacher's logits [n, C] and labels [n]."""
    p = logits.softmax(-1).gather(1, labels[:, None]).squeeze(1)
    return (1 + t) / ((p - 1).square().exp() + 1)
