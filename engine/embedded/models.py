"""Miniature, randomly initialised stand-ins for the published models: the real transformers classes, scaled down.

Total parameters keep the published proportions when the tokenizers are trained on the embedded corpus:

                    published     of bert    here: layers x width
    bert           109,483,778     1          4 x 64
    roberta        124,647,170     1.139      4 x 64, the larger vocabulary makes the difference, as it does there
    distilbert      66,955,010     0.612      2 x 64, half the layers at the same width, as there
    tinybert        14,350,874     0.131      2 x 20

Tokenizers are trained on the texts at hand and the training is deterministic: the same texts give the same bytes.
"""

from __future__ import annotations

import json
from collections import Counter

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaTokenizer,
)

from engine.embedded.defaults import ALIASES
from engine.errors import UserError

MAX_LENGTH = 128
"""Tokens a model reads, special tokens included; the published 512 positions would outweigh a layer of these models."""

WORDPIECE_VOCABULARY = 1_200
BPE_VOCABULARY = 1_800
ALPHABET = 256
"""Most distinct characters a WordPiece vocabulary holds, so that Chinese text leaves room for word pieces; the
rarest beyond it become [UNK]."""

_WORDPIECE_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_BPE_SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]

# Initialisation of the weights, which decides whether a narrow post-norm encoder learns within a few hundred steps.
# Small embeddings move fast under Adam; matrices need more than the 0.02 that suits a width of 768; and residual
# branches that start small keep the early gradients even over depth.
_EMBEDDING_STD = {64: 0.01, 20: 0.01}
_MATRIX_STD = {64: 0.08, 20: 0.08}
_BRANCH_SCALE = 0.2
_BRANCH_ENDS = ("attention.output.dense.weight", "output.dense.weight", "out_lin.weight", "lin2.weight")
_DROPOUT = 0.0


def build(
    alias: str, texts: list[str], num_labels: int, seed: int, problem_type: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The miniature of `alias` with a tokenizer trained on `texts`; equal arguments give equal weights.

    The global random state is left as it was.
    """
    if alias not in ALIASES:
        raise UserError(f"There is no embedded model {alias!r}; the embedded models are {', '.join(ALIASES)}.")
    tokenizer = train_bpe(texts) if alias == "roberta" else train_wordpiece(texts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _model(alias, tokenizer, num_labels, problem_type)
        _shrink(model)
    return model.eval(), tokenizer


@torch.no_grad()
def _shrink(model: PreTrainedModel) -> None:
    """Scale embeddings and the last matrix of each residual branch; transformers draws everything from one std."""
    width = model.get_input_embeddings().weight.shape[1]
    for name, weight in model.named_parameters():
        if name.endswith("_embeddings.weight"):
            weight.mul_(_EMBEDDING_STD[width] / _MATRIX_STD[width])
        elif name.endswith(_BRANCH_ENDS):
            weight.mul_(_BRANCH_SCALE)


def _model(
    alias: str, tokenizer: PreTrainedTokenizerBase, num_labels: int, problem_type: str | None
) -> PreTrainedModel:
    shared = {
        "vocab_size": len(tokenizer),
        "num_labels": num_labels,
        "problem_type": problem_type,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if alias == "distilbert":
        return DistilBertForSequenceClassification(
            DistilBertConfig(
                dim=64,
                hidden_dim=256,
                n_layers=2,
                n_heads=4,
                max_position_embeddings=MAX_LENGTH,
                initializer_range=_MATRIX_STD[64],
                dropout=_DROPOUT,
                attention_dropout=0.0,
                seq_classif_dropout=_DROPOUT,
                **shared,
            )
        )
    width, layers, heads = (20, 2, 2) if alias == "tinybert" else (64, 4, 4)
    shared |= {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "initializer_range": _MATRIX_STD[width],
        "hidden_dropout_prob": _DROPOUT,
        "attention_probs_dropout_prob": 0.0,
    }
    if alias == "roberta":
        # roberta numbers positions from pad_token_id + 1
        positions = MAX_LENGTH + tokenizer.pad_token_id + 1
        config = RobertaConfig(
            max_position_embeddings=positions,
            type_vocab_size=1,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **shared,
        )
        return RobertaForSequenceClassification(config)
    return BertForSequenceClassification(BertConfig(max_position_embeddings=MAX_LENGTH, **shared))


def train_wordpiece(texts: list[str]) -> BertTokenizer:
    """A lower-casing WordPiece tokenizer, as bert has it: [CLS] A [SEP] B [SEP] with token types."""
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words: Counter[str] = Counter()
    for text in texts:
        words.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))

    # The trainer meets characters in the order of a hash table and breaks ties by that order, which changes from run to
    # run. So the alphabet is chosen and numbered here, and handed to it as if it were special tokens.
    letters: Counter[str] = Counter()
    for word, count in words.items():
        for letter in word:
            letters[letter] += count
    alphabet = sorted(sorted(letters, key=lambda c: (-letters[c], c))[:ALPHABET])
    known = set(alphabet)
    inside = sorted({letter for word in words for letter in word[1:]} & known)
    first_tokens = _WORDPIECE_SPECIAL + alphabet + [f"##{letter}" for letter in inside]

    trainee = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trainee.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordPieceTrainer(
        vocab_size=max(WORDPIECE_VOCABULARY, len(first_tokens)),
        min_frequency=2,
        special_tokens=first_tokens,
        show_progress=False,
    )
    usable = (" ".join([word] * count) for word, count in sorted(words.items()) if known.issuperset(word))
    trainee.train_from_iterator(usable, trainer)
    vocabulary = dict(sorted(trainee.get_vocab().items(), key=lambda item: item[1]))
    return BertTokenizer(vocab=vocabulary, do_lower_case=True, model_max_length=MAX_LENGTH)


def train_bpe(texts: list[str]) -> RobertaTokenizer:
    """A byte-level BPE tokenizer, as roberta has it: <s> A </s></s> B </s>; every byte is known."""
    trainee = Tokenizer(models.BPE())
    trainee.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainee.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BPE_VOCABULARY,
        min_frequency=2,
        special_tokens=_BPE_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trainee.train_from_iterator(texts, trainer)
    vocabulary = dict(sorted(trainee.get_vocab().items(), key=lambda item: item[1]))
    # the merges are not exposed by the trained model, only by its serialised form
    merges = [tuple(pair) for pair in json.loads(trainee.to_str())["model"]["merges"]]
    return RobertaTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_LENGTH)
