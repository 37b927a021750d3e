"""What the engine knows of each family of classifiers: one record a family, one table by the model type of transformers.

A model that the table does not have runs as the plain module that transformers made: slower than it could, and right. So does an
encoder that is configured as a decoder. What can be seen of the module itself (how it counts positions, whether it takes a
mask, has a cache or finds its last token by the padding token) is in no record: the functions below look.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import nn


@dataclass(frozen=True)
class Family:
    """What is known of one family; each default is right for any model.

    layers             the nn.ModuleLists below `base_model` that its layers stand in; without them `encoder_layers` looks for some
    lean               the structure of its layers, where `lean_layers` knows how to run them with less work
    ready_mask         whether it takes a 4-D mask as it is. At the values of a 2-D one transformers looks: a host synchronisation
                       in every forward on a GPU
    attention_dropout  the name of that probability in its configuration. With a name, plain and fused attention are known to
                       give the same, and `engine.models.network.attention` chooses
    reads              the state that its classifier reads, "first" or "last" (of the real tokens), or the entry of its
                       configuration that says so; None for a mean or anything else
    query_and_value    names of these projections in its layers
    padding            the side that texts are padded on; transformers' causal models count positions from the left
    """

    layers: tuple[str, ...] = ()
    lean: Literal["bert", "distilbert"] | None = None
    ready_mask: bool = False
    attention_dropout: str | None = None
    reads: str | None = None
    query_and_value: frozenset[str] = frozenset(
        {"query", "value", "q_lin", "v_lin", "q_proj", "v_proj", "query_proj", "value_proj"}
    )
    padding: Literal["right", "left"] = "right"


PLAIN = Family()
# an encoder with BERT's names, its layers as transformers has them
ENCODER = Family(layers=("encoder.layer",), reads="first")
FUSED = replace(ENCODER, attention_dropout="attention_probs_dropout_prob")
BERT = replace(FUSED, lean="bert", ready_mask=True)
CAUSAL = Family(layers=("layers",), attention_dropout="attention_dropout", reads="last")

FAMILIES: dict[str, Family] = {
    "albert": replace(FUSED, layers=("encoder.albert_layer_groups",)),
    "bart": Family(layers=("encoder.layers", "decoder.layers"), attention_dropout="attention_dropout"),
    "bert": BERT,
    "big_bird": ENCODER,
    "bloom": Family(layers=("h",), reads="last"),
    "camembert": BERT,
    "convbert": ENCODER,
    "data2vec-text": FUSED,
    "deberta": ENCODER,
    "deberta-v2": ENCODER,
    "distilbert": replace(BERT, layers=("transformer.layer",), lean="distilbert", attention_dropout="attention_dropout"),
    "electra": BERT,
    "ernie": FUSED,
    "eurobert": replace(CAUSAL, reads="classifier_pooling"),
    "fnet": ENCODER,
    "funnel": Family(layers=("encoder.blocks",), query_and_value=frozenset({"q_head", "v_head"})),
    "gemma": CAUSAL,
    "gemma2": replace(CAUSAL, attention_dropout=None),
    "gemma3_text": CAUSAL,
    "gpt2": replace(CAUSAL, layers=("h",), attention_dropout="attn_pdrop"),
    "gpt_neox": CAUSAL,
    "llama": CAUSAL,
    "longformer": ENCODER,
    "megatron-bert": ENCODER,
    "mistral": CAUSAL,
    "mobilebert": FUSED,
    "modernbert": replace(CAUSAL, reads="classifier_pooling"),
    "mpnet": replace(ENCODER, query_and_value=frozenset({"q", "v"})),
    "nomic_bert": replace(FUSED, layers=("layers",)),
    "opt": replace(CAUSAL, layers=("decoder.layers",)),
    "phi3": CAUSAL,
    "qwen2": CAUSAL,
    "qwen3": CAUSAL,
    "rembert": ENCODER,
    "roberta": BERT,
    "roberta-prelayernorm": FUSED,
    "roformer": ENCODER,
    "squeezebert": replace(ENCODER, layers=("encoder.layers",)),
    "t5": Family(layers=("encoder.block", "decoder.block"), query_and_value=frozenset({"q", "v"})),
    # attention and feed-forward network stand in lists of their own
    "xlm": Family(layers=("attentions", "ffns"), reads="summary_type"),
    "xlm-roberta": BERT,
    "xlnet": Family(layers=("layer",), reads="summary_type", padding="left"),
    "xmod": FUSED,
}  # fmt: skip
LEAN = [name for name, family in FAMILIES.items() if family.lean]


def family(module: nn.Module) -> Family:
    """The record of a sequence classifier of transformers; `PLAIN` for any other module, and for an encoder made a decoder."""
    config = getattr(module, "config", None)
    if not type(module).__name__.endswith("ForSequenceClassification") or getattr(config, "is_decoder", False):
        return PLAIN
    return FAMILIES.get(getattr(config, "model_type", None), PLAIN)


def model_type(module: nn.Module) -> str:
    """How the family is called, for messages."""
    return getattr(getattr(module, "config", None), "model_type", None) or type(module).__name__
