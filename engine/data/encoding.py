"""From text to token ids: every text once per tokenizer, cached on disk by content and read memory-mapped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import transformers
from datasets import Dataset
from transformers import BatchEncoding, PreTrainedTokenizerBase

from engine.data import kept
from engine.data.token_files import Chunk, Tokens, load, save

TOKENIZED_AT_ONCE = 1000  # texts
# What decides about ids, types and padding beside the backend's content, as it is where nobody has changed it
ORDINARY = {
    "truncation_side": "right", "padding_side": "right", "pad_token_type_id": 0, "split_special_tokens": False, "types": True,
    "padding": "right", "fixed": False,
}  # fmt: skip


@dataclass
class Encoding:
    """A tokenizer and its identity; models whose tokenizers agree in content share one.

    Texts are padded on the side `padding`, all to `max_length` where the width is `fixed` (for models that see no mask).
    """

    key: str
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    padding: Literal["right", "left"] = "right"
    fixed: bool = False

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, max_length: int, padding: Literal["right", "left"] = "right",
        fixed: bool = False,
    ) -> Encoding:  # fmt: skip
        """Raises AttributeError for a tokenizer without a fast backend; `engine.models.load` only loads fast ones."""
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        for used in ("truncation", "padding"):  # settings that the last call left behind
            content.pop(used, None)
        given = {name: getattr(tokenizer, name, None) for name in ORDINARY}
        given |= {"types": "token_type_ids" in tokenizer.model_input_names, "padding": padding, "fixed": fixed}
        # only what is not ordinary: noise is drawn by the key, which should change for no other tokenizer
        changed = {name: value for name, value in given.items() if value != ORDINARY[name]}
        identity = json.dumps(
            [content, max_length, tokenizer.pad_token_id, *([changed] if changed else [])], sort_keys=True
        )
        return cls(hashlib.sha256(identity.encode()).hexdigest()[:16], tokenizer, max_length, padding, fixed)

    def tokenized(self, dataset: Dataset) -> Iterator[BatchEncoding]:
        """`dataset` (text, optional pair), some texts at a time: token ids, and types where the tokenizer gives them by itself."""
        for start in range(0, len(dataset), TOKENIZED_AT_ONCE):
            rows = dataset[start : start + TOKENIZED_AT_ONCE]
            yield self.tokenizer(
                rows["text"], rows.get("pair"), truncation=True, max_length=self.max_length, return_attention_mask=False
            )


def encode(dataset: Dataset, encoding: Encoding, content: str, cache: Path) -> Tokens:
    """`dataset` (text, optional pair) as token ids. `content` identifies its rows; the result is reused from `cache`.

    Raises UserError where it cannot be written there.
    """
    folder = cache / kept_key(encoding, content)
    return load(folder, len(dataset)) or save(folder, _tokenize(dataset, encoding))


def kept_key(encoding: Encoding, content: str, of: str = "tokens") -> str:
    """The name under which what a tokenizer says `of` the rows that `content` identifies is kept."""
    return kept.key(of=of, encoding=encoding.key, data=content, transformers=transformers.__version__)


def _tokenize(dataset: Dataset, encoding: Encoding) -> Iterator[Chunk]:
    for done in encoding.tokenized(dataset):
        yield done["input_ids"], done.get("token_type_ids")
