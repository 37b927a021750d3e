"""Step 2: load the models."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.config import Config
from engine.data.encoding import Encoding
from engine.data.splits import Splits, Task
from engine.errors import UserError
from engine.losses.domain_head import widen
from engine.methods import METHODS
from engine.models.compiling import CompiledLayers
from engine.models.families import family, inputs_of
from engine.models.load import ModelSource, load_model
from engine.models.network import Encoder
from engine.models.student_layers import keep_layers
from engine.run import choices
from engine.run.inputs import Inputs
from engine.run.machine import suit_threads
from engine.screen.console import Console


@dataclass
class Member:
    """A model of the run: where it came from, its network, its tokenizer."""

    source: ModelSource
    network: Encoder
    tokenizer: object
    trained_head: bool


@dataclass
class Models:
    """The models of a run, the teachers not prepared yet.

    encodings  one for each kind of tokenizer; models with equal tokenizers share it
    compiled   what all models' layers are compiled by, with --compile
    """

    student: Member
    teachers: list[Member]
    encodings: list[Encoding]
    compiled: CompiledLayers | None

    def taught(self) -> list[Encoder]:
        """The teachers' networks."""
        return [member.network for member in self.teachers]


def load_models(config: Config, inputs: Inputs, device: torch.device, console: Console) -> Models:
    """Raises UserError for a model that cannot be read, or does not fit the task or the settings."""
    suit_threads(device, [*inputs.teachers, inputs.student])
    compiled = CompiledLayers() if config.run.compile else None
    loading = _Loading(config, inputs.splits, compiled, console, {})
    keep, seeds = not config.models.retrain_teachers, config.run
    teachers = [loading.member(source, seeds.teacher_seed, keep) for source in inputs.teachers]
    student = loading.member(inputs.student, seeds.seed, True, config.models.student_layers)
    for member in teachers:
        _give_heads(config, member, inputs.splits.task)
    _compare_sizes(student, teachers, console)
    return Models(student, teachers, list(loading.encodings.values()), compiled)


@dataclass
class _Loading:
    """What loading one model after another shares."""

    config: Config
    splits: Splits
    compiled: CompiledLayers | None
    console: Console
    encodings: dict[str, Encoding]  # by key, of the models loaded so far

    def member(self, source: ModelSource, seed: int, keep_head: bool, layers: str | None = None) -> Member:
        """`layers` are those of --student-layers, which the others are taken out of."""
        loaded = load_model(source, self.splits.task, self.texts, seed, keep_head)
        name, longest = source.name, self.config.data.max_length
        if layers is not None:
            loaded.module = keep_layers(loaded.module, choices.layer_numbers(layers))
            name += f"[{layers}]"
        length = min(longest, loaded.max_length)
        if length < longest:
            self.console.say(
                f"{name} reads at most {length} tokens, so --max-length {longest} becomes {length} for it."
            )
        if loaded.note is not None:
            self.console.say(f"{name} {loaded.note}.")
        masked = "attention_mask" in inputs_of(loaded.module)
        if not masked:
            self.console.say(
                f"{name} sees no mask of what is padding, so all texts are padded to {length} tokens for it."
            )
        encoding = Encoding.of(loaded.tokenizer, length, family(loaded.module).padding, fixed=not masked)
        self.encodings.setdefault(encoding.key, encoding)
        network = Encoder(name, loaded.module, encoding.key, self.config.run.precision, self.compiled)
        return Member(source, network, loaded.tokenizer, loaded.trained_head)

    def texts(self) -> list[str]:
        """What an embedded model's tokenizer learns its words from."""
        sample = self.splits.train[0]
        return [*sample["text"], *(sample["pair"] if self.splits.task.pair else [])]


def _give_heads(config: Config, member: Member, task: Task) -> None:
    """Give a teacher the heads that --prepare-method trains; raises UserError where it has a trained one already."""
    how = config.method.prepare_method
    if how == "finetune" or METHODS[config.method.method].teachers == "none":
        return
    if member.trained_head:
        raise UserError(f"--prepare-method {how} trains a new head, and {member.source.name} has a trained one already; "
                        "give --retrain-teachers, or --prepare-method finetune.")  # fmt: skip
    if how == "multitask":
        widen(member.network.module, task.num_labels, list(task.domains), config.run.teacher_seed)
        member.network.heads = len(task.domains)


def _compare_sizes(student: Member, teachers: list[Member], console: Console) -> None:
    size = student.network.size()
    for network in (member.network for member in teachers):
        if size > network.size():
            console.warn(
                f"the student has {size:,} parameters, its teacher {network.name} only {network.size():,}; a student "
                "is meant to be smaller.")  # fmt: skip
