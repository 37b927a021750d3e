"""What a run uses where no model hub can be reached: a generated corpus and miniatures of the published models.

This package imports neither torch nor transformers; `build` does when it is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.embedded.corpus import SIZES, generate, splits
from engine.embedded.defaults import DEFAULTS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ALIASES = ("bert", "roberta", "distilbert", "tinybert")

__all__ = ["ALIASES", "DEFAULTS", "SIZES", "build", "generate", "splits"]


def build(
    alias: str, texts: list[str], num_labels: int, seed: int, problem_type: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """See `engine.embedded.models.build`."""
    from engine.embedded import models

    return models.build(alias, texts, num_labels, seed, problem_type)
