"""Miniature models of each family, batches for them, and what transformers makes of both by itself."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from engine.batch import Batch
from engine.models.network import Encoder

# Of logits of size 1. bf16 has 8 bits, and a dozen operations round here; fp32 sums in another order.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6e-2}
FAMILIES = ["bert", "roberta", "distilbert"]
families = pytest.mark.parametrize("family", FAMILIES)
WORDS, PAD, LONGEST = 30, {"bert": 0, "roberta": 1, "distilbert": 0}, 80
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def transformer(
    family, seed=0, *, layers=2, width=8, heads=2, classes=3, words=WORDS, positions=LONGEST + 2, dropout=0.1,
    attention_dropout=None, attention="sdpa", spread=0.2, activation="gelu",
):  # fmt: skip
    """A classifier of this family with random weights of size `spread`, in the mode that transformers leaves it in."""
    torch.manual_seed(seed)
    of_attention = dropout if attention_dropout is None else attention_dropout
    common = {"vocab_size": words, "num_labels": classes, "initializer_range": spread, "attn_implementation": attention,
              "max_position_embeddings": positions, "pad_token_id": PAD[family]}  # fmt: skip
    if family == "distilbert":
        return DistilBertForSequenceClassification(DistilBertConfig(
            dim=width, hidden_dim=2 * width, n_layers=layers, n_heads=heads, dropout=dropout, attention_dropout=of_attention,
            seq_classif_dropout=dropout, activation=activation, **common,
        ))  # fmt: skip
    config, kind = {
        "bert": (BertConfig, BertForSequenceClassification),
        "roberta": (RobertaConfig, RobertaForSequenceClassification),
    }[family]
    return kind(config(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=heads,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=of_attention, hidden_act=activation, **common,
    ))  # fmt: skip


def tiny(family, kind="sdpa", **settings):
    return transformer(family, attention=kind, **settings).eval()


def batch(family="bert", length=9, size=4, seed=0):
    """Rows of different length, one of a single token; segments, which not every family reads."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [length, 1, *torch.randint(2, max(length, 3), (max(size - 2, 0),), generator=generator)]
    lengths = torch.tensor(lengths[:size])
    mask = (torch.arange(length) < lengths[:, None]).long()
    ids = torch.randint(2, WORDS, (size, length), generator=generator)
    kinds = torch.randint(2, (size, length), generator=generator) if family != "roberta" else torch.zeros_like(ids)
    inputs = {"input_ids": torch.where(mask == 1, ids, PAD[family]), "attention_mask": mask, "token_type_ids": kinds}
    return Batch(torch.arange(size) % 3, {"own": inputs, "another": {}})


def encoder(family="bert", precision="fp32", compiled=None, **settings):
    network = Encoder(family, tiny(family, **settings), "own", precision, compiled)
    network.flatten()
    return network


def forward_and_backward(network, given):
    """Logits, the gradient of all weights of the sum of their squares, and where the random numbers stand afterwards."""
    torch.manual_seed(1)
    with network.flat.lookups() as lookups:
        logits = network(given).logits
    after = torch.get_rng_state()
    gradient = network.flat.gradients_of([logits.square().sum()], None, network.leaves(), lookups)
    return logits.detach(), torch.cat([gradient.dense, *(t.values.flatten() for t in gradient.tables)]), after


def plain(module, given, family, **more):
    """What transformers makes of it by itself."""
    inputs = dict(given.inputs["own"])
    if family == "distilbert":
        del inputs["token_type_ids"]
    return module(**inputs, **more)


def close(a, b, dtype):
    torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=TOLERANCE[dtype])
