"""Tiny random models of many families, as local directories: configuration, weights and fast tokenizer.

A family's configuration, special tokens, token types and padding are those of its published models; only sizes are small. The
words of its texts are letters, so that every tokenizer, whatever its kind, makes one token of a word.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnopqrstuvwxyz"
LAYERS, WIDTH, POSITIONS, LABELS = 3, 16, 18, 3
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTA = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
ALBERT = ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]
END = "<|endoftext|>"


# Tokenizers: a family's own class, with letters for words


def words(cls: str, special: list[str] = BERT, **settings) -> Any:
    """WordPiece."""
    return _class(cls)(vocab={token: i for i, token in enumerate([*special, *LETTERS])}, **settings)


def pairs(cls: str, special: list[str], space: str = "Ġ", **settings) -> Any:
    """Byte pairs, merged to whole words."""
    vocab, merges = _pairs(special, space)
    return _class(cls)(vocab=vocab, merges=merges, **settings)


def pieces(cls: str, special: list[str], **settings) -> Any:
    """Unigrams of SentencePiece."""
    scores = [(token, 0.0) for token in special] + [(f"▁{letter}", -1.0) for letter in LETTERS] + [("▁", -2.0)]
    return _class(cls)(vocab=scores, **settings)


def backend(special: list[str], single: str, pair: str, model: str = "pairs", **settings) -> Any:
    """Of a family whose models bring a tokenizer.json without a class of its own: `single` and `pair` are its templates."""
    if model == "pairs":
        vocab, merges = _pairs(special, "Ġ")
        tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        vocab = {token: i for i, token in enumerate([*special, *LETTERS])}
        tokenizer = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token=special[0]))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    used = [token for token in special if token in single]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(token, vocab[token]) for token in used]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)


def _class(name: str) -> type:
    return getattr(transformers, name)


def _pairs(special: list[str], space: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    tokens = [*special, space, *LETTERS, *(space + letter for letter in LETTERS)]
    return {token: i for i, token in enumerate(tokens)}, [(space, letter) for letter in LETTERS]


# Configurations

COMMON = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 24,
          "max_position_embeddings": POSITIONS}  # fmt: skip
DECODER = COMMON | {"num_key_value_heads": 1, "head_dim": 8}
FACTORED = COMMON | {"embedding_size": 8}
DISENTANGLED = COMMON | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
GPT2 = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 2, "n_positions": POSITIONS}


@dataclass
class Family:
    """One family of models.

    settings     of its configuration, beside the vocabulary and the special tokens
    tokenizer    makes the tokenizer
    pad_known    whether the configuration names the padding token, as most do; where not, only the tokenizer does
    invariant    whether its logits are the same however much a text is padded
    gain         standard deviation of its random matrices
    """

    kind: str
    tokenizer: Callable[[], Any]
    settings: dict[str, Any] = field(default_factory=lambda: COMMON)
    pad_known: bool = True
    invariant: bool = True
    gain: float = 0.3


def _bert(kind: str, settings: dict[str, Any] = COMMON, tokenizer: str = "BertTokenizer", **more) -> Family:
    return Family(kind, lambda: words(tokenizer), settings, **more)


def _roberta(kind: str, settings: dict[str, Any] = COMMON) -> Family:
    return Family(kind, lambda: pairs("RobertaTokenizer", ROBERTA), settings)


def _xlm_roberta(kind: str, settings: dict[str, Any] = COMMON) -> Family:
    return Family(kind, lambda: pieces("XLMRobertaTokenizer", ROBERTA), settings)


def _llama(kind: str, settings: dict[str, Any] = DECODER, **pad) -> Family:
    """Without `pad_token` it has none, as most published ones."""
    special = ["<unk>", "<s>", "</s>", *pad.values()]
    return Family(kind, lambda: pairs("LlamaTokenizer", special, "▁", add_bos_token=True, **pad), settings, bool(pad))


def _gemma(kind: str, settings: dict[str, Any] = DECODER) -> Family:
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    return Family(kind, lambda: pairs("GemmaTokenizer", special, "▁", add_bos_token=True), settings)


def _qwen(kind: str) -> Family:
    return Family(kind, lambda: pairs("Qwen2Tokenizer", [END]), DECODER, pad_known=False)


def _big_bird(attention: str) -> Family:
    special = ["<pad>", "</s>", "<s>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]
    return Family("big_bird", lambda: pieces("BigBirdTokenizer", special), COMMON | {"attention_type": attention})


BART = {"d_model": WIDTH, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": POSITIONS,
        "decoder_start_token_id": 2, "forced_eos_token_id": 2}  # fmt: skip
T5 = {"d_model": WIDTH, "d_kv": 8, "d_ff": 24, "num_layers": LAYERS, "num_decoder_layers": LAYERS, "num_heads": 2,
      "decoder_start_token_id": 0}  # fmt: skip
XLM = ["<s>", "</s>", "<pad>", "<unk>"]
EUROBERT = ["<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"]
FAMILIES = {
    "BERT": _bert("bert"),
    "RoBERTa": _roberta("roberta"),
    "XLM-R": _xlm_roberta("xlm-roberta"),
    "ELECTRA": _bert("electra", FACTORED),
    "DistilBERT": _bert("distilbert", {"dim": WIDTH, "n_layers": LAYERS, "n_heads": 2, "hidden_dim": 24,
                                       "max_position_embeddings": POSITIONS}, "DistilBertTokenizer"),
    "ALBERT": Family("albert", lambda: pieces("AlbertTokenizer", ALBERT), FACTORED),
    "DeBERTa": Family("deberta", lambda: pairs("DebertaTokenizer", ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"]), DISENTANGLED),
    "DeBERTa-v2": Family("deberta-v2", lambda: pieces("DebertaV2Tokenizer", BERT), DISENTANGLED | {"position_buckets": 8}),
    "MPNet": Family("mpnet", lambda: words("MPNetTokenizer", ["<s>", "<pad>", "</s>", "[UNK]", "<mask>"])),
    "ModernBERT": Family(
        "modernbert", lambda: backend(
            BERT, "[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
            sep_token="[SEP]", mask_token="[MASK]", model_input_names=["input_ids", "attention_mask"],
        ), COMMON | {"global_attn_every_n_layers": 2, "local_attention": 4}),
    "GPT-2": Family("gpt2", lambda: pairs("GPT2Tokenizer", [END]), GPT2, pad_known=False),
    "OPT": Family(
        "opt", lambda: pairs("GPT2Tokenizer", ["<s>", "<pad>", "</s>"], bos_token="</s>", eos_token="</s>", unk_token="</s>",
                             pad_token="<pad>", add_bos_token=True),
        {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "ffn_dim": 24, "word_embed_proj_dim": WIDTH,
         "max_position_embeddings": POSITIONS}),
    "GPT-NeoX": Family("gpt_neox", lambda: pairs("GPTNeoXTokenizer", [END, "<|padding|>"]), pad_known=False),
    "Gemma": _gemma("gemma"),
    "Gemma 2": _gemma("gemma2", DECODER | {"sliding_window": 4}),
    "Gemma 3": _gemma("gemma3_text", DECODER | {"sliding_window": 4, "layer_types": [
        "sliding_attention", "full_attention", "sliding_attention"]}),
    "Llama": _llama("llama"),
    "Qwen2": _qwen("qwen2"),
    "Qwen3": _qwen("qwen3"),
    "Mistral": _llama("mistral", DECODER | {"sliding_window": 4}),
    "Phi-3": _llama("phi3", pad_token=END),
    "BLOOM": Family("bloom", lambda: backend(["<unk>", "<s>", "</s>", "<pad>"], "$A", "$A $B", pad_token="<pad>", unk_token="<unk>",
                                             bos_token="<s>", eos_token="</s>", padding_side="left"),
                    {"hidden_size": WIDTH, "n_layer": LAYERS, "n_head": 2}),
    "NomicBERT": _bert("nomic_bert"),
    "EuroBERT": Family(
        "eurobert", lambda: backend(
            EUROBERT, f"{EUROBERT[0]} $A {EUROBERT[1]}", f"{EUROBERT[0]} $A {EUROBERT[1]} $B {EUROBERT[1]}", pad_token=EUROBERT[2],
            bos_token=EUROBERT[0], eos_token=EUROBERT[1], model_input_names=["input_ids", "attention_mask"],
        ), DECODER | {"mask_token_id": 3}),
    "T5": Family("t5", lambda: pieces("T5Tokenizer", ["<pad>", "</s>", "<unk>"], extra_ids=0), T5),
    "BART": _roberta("bart", BART),
    "Funnel": Family("funnel", lambda: words("FunnelTokenizer", ["<pad>", "<unk>", "<cls>", "<sep>", "<mask>", "<s>", "</s>"]),
                     {"d_model": WIDTH, "block_sizes": [2, 1], "n_head": 2, "d_head": 8, "d_inner": 24}),
    "XLNet": Family("xlnet", lambda: pieces("XLNetTokenizer", ["<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>"]),
                    {"d_model": WIDTH, "n_layer": LAYERS, "n_head": 2, "d_inner": 24}),
    "FNet": Family("fnet", lambda: pieces("FNetTokenizer", ALBERT), {
        "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "intermediate_size": 24, "max_position_embeddings": POSITIONS},
        invariant=False),
    "XLM": Family(
        "xlm", lambda: backend(
            XLM, "<s> $A </s>", "<s> $A </s> $B </s>", "words", pad_token="<pad>", unk_token="<unk>", bos_token="<s>",
            sep_token="</s>", cls_token="</s>", model_input_names=["input_ids", "attention_mask"],
        ), {"emb_dim": WIDTH, "n_layers": LAYERS, "n_heads": 2, "max_position_embeddings": POSITIONS, "n_langs": 1, "pad_index": 2,
            "bos_index": 0, "eos_index": 1, "unk_index": 3}),
    "Longformer": _roberta("longformer", COMMON | {"attention_window": [4] * LAYERS}),
    "BigBird": _big_bird("block_sparse"),
    "BigBird with full attention": _big_bird("original_full"),
    "SqueezeBERT": _bert("squeezebert", COMMON | {"embedding_size": WIDTH} | {f"{part}_groups": 1 for part in (
        "q", "k", "v", "post_attention", "intermediate", "output")}),
    "RoFormer": _bert("roformer", COMMON | {"embedding_size": WIDTH}),
    "RemBERT": Family("rembert", lambda: pieces("RemBertTokenizer", ALBERT),
                      COMMON | {"input_embedding_size": 8, "output_embedding_size": 8}),
    "Megatron-BERT": _bert("megatron-bert"),
    "ERNIE": _bert("ernie"),
    "XMOD": _xlm_roberta("xmod", COMMON | {"languages": ["en_XX"], "default_language": "en_XX"}),
    "data2vec-text": _roberta("data2vec-text"),
    "RoBERTa-prelayernorm": _roberta("roberta-prelayernorm"),
    "CamemBERT": Family("camembert", lambda: pieces("CamembertTokenizer", ROBERTA)),
    "ConvBERT": _bert("convbert", COMMON | {"embedding_size": WIDTH, "head_ratio": 1, "conv_kernel_size": 3},
                      invariant=False),
    "MobileBERT": _bert("mobilebert", FACTORED | {"true_hidden_size": WIDTH, "intra_bottleneck_size": WIDTH,
                                                  "num_feedforward_networks": 1}, gain=0.2),
    # its classifier reads the first state, which a causal mask lets see the first word alone
    "BERT as a decoder": Family("bert", lambda: pairs("GPT2Tokenizer", [END], pad_token=END), COMMON | {"is_decoder": True}),
    "RoBERTa with BERT's tokenizer": _bert("roberta", COMMON | {"type_vocab_size": 1}),
}  # fmt: skip


def save(family: Family, seed: int, folder: Path) -> Path:
    """A model of this family with random weights of `seed`, and its tokenizer, in `folder`, which is returned."""
    tokenizer = family.tokenizer()
    special = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "cls", "sep", "pad")
    }
    if not family.pad_known:
        del special["pad_token_id"]
    known = {name: number for name, number in special.items() if number is not None}
    config = AutoConfig.for_model(
        family.kind, vocab_size=len(tokenizer) + 3, num_labels=LABELS, **known | family.settings
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(config)
        with torch.no_grad():
            for p in model.parameters():
                if p.ndim > 1:
                    p.normal_(0, family.gain)
                else:  # norms stay near 1, or near 0 where that is their 1
                    p.add_(torch.randn_like(p), alpha=0.1)
            for table in (
                m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m.padding_idx is not None
            ):
                table.weight[table.padding_idx] = 0  # as it is in published models, for it takes no gradient
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
