"""What the engine knows of each family of classifiers: one record a family, one table by the model type of transformers.

A model that the table does not have runs as the plain module that transformers made: slower than it could, and right. So does an
encoder that is configured as a decoder. What can be seen of the module itself (how it counts positions, whether it takes a
mask, has a cache or finds its last token by the padding token) is in no record: the functions below look.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn


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
                       configuration that says so; None for a mean, for anything else, and where `finds_last_token` tells
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
CAUSAL = Family(layers=("layers",), attention_dropout="attention_dropout")

FAMILIES: dict[str, Family] = {
    "albert": replace(FUSED, layers=("encoder.albert_layer_groups",)),
    "bart": Family(layers=("encoder.layers", "decoder.layers"), attention_dropout="attention_dropout"),
    "bert": BERT,
    "big_bird": ENCODER,
    "bloom": Family(layers=("h",)),
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


def longest(module: nn.Module) -> int | None:
    """Tokens that a model of transformers reads at most; None where nothing limits them."""
    for name, child in module.base_model.named_modules():
        counted = isinstance(child, nn.Embedding) and "position" in name.rpartition(".")[2]
        if (
            counted and child.padding_idx is not None
        ):  # the first token's position stands behind the padding's, as in RoBERTa
            return child.num_embeddings - child.padding_idx - 1
    limit = getattr(module.config, "max_position_embeddings", None) or -1
    return limit if limit > 0 else None


def finds_last_token(module: nn.Module) -> bool:
    """Whether its classifier looks for the last token that is not the configuration's `pad_token_id`, as causal models' do."""
    return "pad_token_id" in inspect.unwrap(type(module).forward).__code__.co_names


def state_read(module: nn.Module) -> Literal["first", "last"] | None:
    """Which token's state the classifier of a text reads; None where it is not one token's, or not known."""
    reads = family(module).reads
    if reads is None:
        return "last" if finds_last_token(module) else None
    said = getattr(module.config, reads, reads)
    return "first" if said in ("first", "cls", "bos") else "last" if said == "last" else None


def inputs_of(module: nn.Module) -> set[str]:
    """What its forward takes of an encoding; no token types where it has an embedding for one type alone."""
    names = set(inspect.signature(module.forward).parameters)
    config = getattr(module, "config", None)
    return names - ({"token_type_ids"} if getattr(config, "type_vocab_size", 2) < 2 else set())


def without_cache(module: nn.Module) -> dict[str, Any]:
    """What is passed besides, so that no keys and values are kept for a next token: layers that are computed again would read them."""
    own = inspect.signature(module.forward).parameters
    inner = inspect.signature(module.base_model.forward).parameters if hasattr(module, "base_model") else {}
    through = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in own.values())
    if "use_cache" in own or (family(module).lean is None and through and "use_cache" in inner):
        return {"use_cache": False}
    return {"cache": _NoCache()} if "cache" in own else {}


class _NoCache:
    """Stands in for XLM's cache, of which it makes one itself where none is given."""

    def get_seq_length(self) -> int:
        return 0

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        return keys, values
