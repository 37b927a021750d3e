"""Which word each token belongs to, kept on disk beside the tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from datasets import Dataset

from engine.data.encoding import Encoding, kept_key
from engine.data.token_files import Chunk, load, save


def words_of(dataset: Dataset, encoding: Encoding, content: str, cache: Path) -> np.ndarray:
    """[tokens] int32, memory-mapped: the number of each token's word in its example, -1 for a token that is no word.

    The tokens are those of `engine.data.encoding.encode` with the same arguments; words are what the tokenizer splits a text
    into before it looks for pieces. Special tokens do not count as words, nor does a word that the vocabulary knows only in part.
    Raises UserError where they cannot be written to `cache`.
    """
    folder = cache / kept_key(encoding, content, of="words")  # of its own: what lies in the tokens' folder stays valid
    found = load(folder, len(dataset)) or save(folder, _numbers(dataset, encoding))
    return np.asarray(found.ids)


def _numbers(dataset: Dataset, encoding: Encoding) -> Iterator[Chunk]:
    tokenizer = encoding.tokenizer
    unknown = tokenizer.unk_token_id
    special = special_ids(tokenizer) - {unknown}
    for done in encoding.tokenized(dataset):
        yield (
            [
                _number(ids, zip(done.sequence_ids(i), done.word_ids(i), strict=True), special, unknown)
                for i, ids in enumerate(done["input_ids"])
            ],
            None,
        )


def _number(ids: list[int], sources: Iterator[tuple[int | None, int | None]], special: set[int], unknown) -> list[int]:
    """Words numbered through, also over the two texts of a pair. A special token that stands in a text ends a word: the
    tokenizer gives it the number of the next one."""
    numbers, last, count = [], None, -1
    for token, source in zip(ids, sources, strict=True):
        if source[1] is None or token in special:
            numbers.append(-1)
            last = None
            continue
        count += source != last
        numbers.append(count)
        last = source
    partial = {number for number, token in zip(numbers, ids, strict=True) if token == unknown}
    return [-1 if number in partial else number for number in numbers]


def special_ids(tokenizer) -> set[int]:
    """Ids of all tokens that stand for no text."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)
