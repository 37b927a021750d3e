"""Prototype scores and domain expertise: what an example counts in Meta-KD (Pan et al., ACL 2021), each for itself.

With h_i the mean state of example i over its real tokens in the encoder that the teacher starts from, p_k^m the mean of the
h_i of domain k and class m, and p_y,i the probability that the prepared teacher gives to the example's own class:

    t_i = own cos(p_k^m, h_i) + others sum_{k' != k} cos(p_k'^m, h_i)        typicality: of its domain, and of all
    w_i = (1 + t_i) / (exp((p_y,i - 1)^2) + 1)                                expertise of the teacher on it
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from engine.data import kept
from engine.data.batches import evaluation_batches
from engine.data.encoded import EncodedSplit
from engine.errors import UserError
from engine.models.features import EXTRAS, InnerStates
from engine.models.load import content_hash
from engine.models.network import Encoder
from engine.run import checkpoint
from engine.run.evaluation import EVALUATION_BATCH


@torch.no_grad()
def mean_states(network: Encoder, split: EncodedSplit, device: torch.device) -> Tensor:
    """h [n, H] of every example, in its order, dropout off; on the CPU."""
    split, found = split.only({network.encoding}), None
    assert not hasattr(network.module, EXTRAS), "h is the encoder's own state, before a domain head is attached"
    with network.in_mode(train=False), network.giving(InnerStates(domain="feature")):
        for rows, batch in evaluation_batches(split, EVALUATION_BATCH):
            h = network(batch.to(device)).domain
            found = h.new_empty(len(split), h.shape[1]) if found is None else found
            found[torch.tensor(rows, device=device)] = h
    return found.cpu()  # sync: before a training


def kept_states(network: Encoder, split: EncodedSplit, content: str, device: torch.device, cache: Path) -> Tensor:
    """`mean_states` of examples that `content` identifies, computed once and kept in `cache`."""
    key = kept.key(
        torch=torch.__version__, transformers=transformers.__version__, device=device.type, precision=network.precision,
        encoding=network.encoding, data=content, model=content_hash(network.module), batch=EVALUATION_BATCH,
        threads=torch.get_num_threads() if device.type == "cpu" else 0,  # sums depend on it
        widths=[table.buckets.widths.tolist() for table in split.only({network.encoding}).tables],
    )  # fmt: skip
    file = cache / f"{key}.safetensors"
    if file.exists():
        try:
            return checkpoint.load(file)[0]["states"]
        except UserError:
            file.unlink()  # a damaged cache entry costs its computation again, nothing else
    states = mean_states(network, split, device)
    checkpoint.save(file, {"states": states}, {})
    return states


def prototypes(states: Tensor, domains: Tensor, labels: Tensor, count: int, classes: int) -> Tensor:
    """p [domains, classes, H], the means of states [n, H] by domain [n] and label [n]; zero where there is no example."""
    p = states.new_zeros(count, classes, states.shape[1])
    for k, m in product(range(count), range(classes)):
        members = (domains == k) & (labels == m)
        if members.any():
            p[k, m] = states[members].mean(0)
    return p


def typicality(
    states: Tensor, domains: Tensor, labels: Tensor, prototypes: Tensor, own: float, others: float
) -> Tensor:
    """t [n] of states [n, H], domains [n] and labels [n]; a prototype that is zero adds nothing."""
    t = states.new_zeros(len(states))
    for k in range(len(prototypes)):
        similar = F.cosine_similarity(states, prototypes[k, labels], dim=-1)
        t += torch.where(domains == k, own * similar, others * similar)
    return t


def expertise(t: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """w [n] of typicality t [n], the teacher's logits [n, C] and labels [n]."""
    p = logits.softmax(-1).gather(1, labels[:, None]).squeeze(1)
    return (1 + t) / ((p - 1).square().exp() + 1)
