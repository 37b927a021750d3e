"""Models as configurations, from which fake ones are built: no weights are downloaded or read."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    PretrainedConfig,
    RobertaConfig,
)

from engine.config import Config
from engine.data.labels import Task
from engine.errors import UserError
from engine.hub import Hub
from engine.models import families
from engine.models.load import ModelSource, configuration_of
from engine.models.student_layers import keep_in_config
from engine.run.choices import layer_numbers

# What the hub's config.json of each alias says of sizes; tests hold the numbers of parameters against the published ones.
PUBLISHED: dict[str, PretrainedConfig] = {
    "bert": BertConfig(),
    "roberta": RobertaConfig(vocab_size=50_265, max_position_embeddings=514, type_vocab_size=1, pad_token_id=1),
    "distilbert": DistilBertConfig(),
    "tinybert": BertConfig(hidden_size=312, num_hidden_layers=4, intermediate_size=1_200),
}


@dataclass(frozen=True)
class Blueprint:
    """A model that can be built where it is needed. `note` says where its sizes are from, unless its own config.json has them."""

    source: ModelSource
    config: PretrainedConfig
    trained_head: bool
    layers: list[int] | None = None  # the only ones kept
    note: str | None = None

    def build(self) -> nn.Module:
        """In eval mode. Raises UserError for a configuration of no classifier."""
        # a copy, since a model keeps, and changes, its own
        config = copy.deepcopy(self.config) if self.layers is None else keep_in_config(self.config, self.layers)
        try:
            module = AutoModelForSequenceClassification.from_config(config)
        except (ValueError, KeyError, ImportError) as e:
            raise UserError(f"The configuration of {self.source.given} makes no classifier ({str(e).splitlines()[0]}); give a "
                            "model that transformers has one for.") from e  # fmt: skip
        return module.eval()

    @cached_property
    def longest(self) -> int | None:
        """Tokens that it can read, where something limits them."""
        with torch.device("meta"):
            return families.longest(self.build())


def blueprints(config: Config, task: Task, hub: Hub) -> tuple[Blueprint, list[Blueprint]]:
    """The student's and the teachers'. Raises UserError for a name that nothing is known of."""
    models = config.models
    given = [item.strip() for item in models.teachers.split(",") if item.strip()]
    teachers = [replace(_blueprint(item, task, hub), layers=None) for item in given]
    if models.retrain_teachers:
        teachers = [replace(teacher, trained_head=False) for teacher in teachers]
    layers = None if models.student_layers is None else layer_numbers(models.student_layers)
    return replace(_blueprint(models.student, task, hub), layers=layers), _named_apart(teachers)


def _named_apart(teachers: Sequence[Blueprint]) -> list[Blueprint]:
    found: list[Blueprint] = []
    for teacher in teachers:
        name, taken = teacher.source.name, {each.source.name for each in found}
        free = next(n for n in (name, *(f"{name}-{i}" for i in range(2, len(teachers) + 2))) if n not in taken)
        found.append(replace(teacher, source=replace(teacher.source, name=free)))
    return found


def _blueprint(given: str, task: Task, hub: Hub) -> Blueprint:
    alias, sample, config = configuration_of(given, hub)
    if config is None and hub.source == "embedded":
        config, kind, note = _miniature(alias, task), "embedded", f"{given}: the embedded miniature of {alias}"
    elif config is None:
        note = f"{given}: sizes as published; its config.json was not read ({hub.why})"
        config, kind = PUBLISHED[alias], "hub"
    else:
        kind, note = "local" if Path(given).expanduser().is_dir() else "hub", None
    config = AutoConfig.for_model(**config.to_dict()) if kind != "local" else config  # a copy, to be changed
    trained = _has_head(config, task)
    config.num_labels = task.num_labels
    config.problem_type = "regression" if task.kind == "regression" else "single_label_classification"
    name = alias and f"{alias}{sample + 1 if sample else ''}"
    source = ModelSource(given, name or Path(given).name, kind, alias or given, sample)
    return Blueprint(source, config, trained, note=note)


def _has_head(config: PretrainedConfig, task: Task) -> bool:
    """Whether the weights come with a classifier of the right size, which is then used as it is."""
    named = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
    return named and config.num_labels == task.num_labels


def _miniature(alias: str, task: Task) -> PretrainedConfig:
    from engine.embedded import build, generate

    return build(alias, [text for text, _ in generate(2_000, 0)], task.num_labels, 0)[0].config
