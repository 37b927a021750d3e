"""What a run is made of, built before its output directory exists, so that bad input is known by then."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch

from engine import kernels
from engine.config import Config
from engine.data.encoded import EncodedSplits
from engine.data.encoding import Encoding
from engine.data.noise import Noise
from engine.data.splits import load_splits
from engine.errors import UserError
from engine.hub import Hub
from engine.methods import METHODS
from engine.models import teacher_params
from engine.models.compiling import CompiledLayers
from engine.models.load import ModelSource, content_hash, keep_layers, load_model, resolve_models
from engine.models.network import Encoder
from engine.params import native
from engine.report.words import DEMONSTRATION
from engine.run import choices, domains, matching
from engine.run.allocator import keep_freed_memory
from engine.run.output import require_directory
from engine.run.teachers import Member, make_ready
from engine.screen.console import Console


class Setup:
    """Data, models, losses of one run, settings that were left open filled in.

    splits, encoded    what the student learns from and is measured on
    data               everything that is read, encoded, by the domains that it is of
    student, teachers  models with their tokenizers, the teachers not prepared yet
    objective          of the distillation; matching: the inner states that its feature loss compares, or None
    """

    def __init__(self, config: Config, console: Console):
        self.config, self.console = config, console
        self.device = choices.settle_device(config, console.say)
        require_directory(self.cache, "--cache-dir")
        self.compiled = CompiledLayers() if config.run.compile else None
        hub = Hub(config.models.source)
        teacher_sources, student_source = self._sources(hub)
        samples = 1 + max((source.sample for source in teacher_sources), default=0)
        self.splits = load_splits(config.data, samples, hub, console.say)
        self.task = self.splits.task
        choices.resolve_defaults(config, student_source, teacher_sources)
        choices.settle_source(config, [*teacher_sources, student_source], self.splits.source)
        self.domains = domains.plan(config, self.task)
        self.splits = self.domains.scarce(self.splits)
        teacher_sources = self.domains.sources(teacher_sources)
        if self.device.type == "cpu" and all(s.kind == "embedded" for s in [*teacher_sources, student_source]):
            torch.set_num_threads(1)  # the miniatures' operations are too small to share
        self._announce([*teacher_sources, student_source], hub)
        encodings: dict[str, Encoding] = {}
        keep = not config.models.retrain_teachers
        self.teachers = [self._member(s, config.run.teacher_seed, encodings, keep) for s in teacher_sources]
        self.student = self._member(student_source, config.run.seed, encodings, True, config.models.student_layers)
        for member in self.teachers:
            make_ready(config, member, self.task)
        self._compare_sizes()
        texts = sum(map(len, [*self.splits.train, self.splits.quiz, self.splits.validation, self.splits.test]))
        self.console.say(f"Tokenising {texts:,} texts, {len(encodings)} tokenizer{'s' * (len(encodings) != 1)} ...")
        self._encode(list(encodings.values()))
        student, teachers = self.student.network, [member.network for member in self.teachers]
        readers, self.noise = choices.noise_readers(config, student, teachers, console.say), None
        if readers:
            self.noise = Noise(self.splits.train[0], list(encodings.values()), self.encoded.hashes[0], self.cache / "tokens",
                               readers, config.method.noise_kind, config.run.seed)  # fmt: skip
        self.objective = choices.objective(config, self.task, console.say)
        self.matching = None
        if self.objective.feature_loss != "none":
            self.matching = matching.match(config, student, teachers)
        self.given_weights = choices.teacher_weights(config, len(teachers))
        if METHODS[config.method.method].teachers == "learning":
            for teacher in teachers:
                teacher_params.check(teacher.module, config.method.teacher_params)
            choices.check_checkpointing(config.method.checkpointing, student, teachers)
            choices.layer_maps(config, student, teachers)
        native.prepare(console.say)  # last: it may compile for some seconds
        if self.teachers and self.objective.soft_loss == "kl":
            self._say_kernels()
        if self.compiled is not None:
            self._say_compiled(self.compiled)
        if self.device.type == "cpu":
            keep_freed_memory()

    def _encode(self, encodings: list[Encoding]) -> None:
        """All data that the run reads, by the domains that it is of; `splits` and `encoded` become the student's."""
        everything, plan, data = self.splits, self.domains, self.config.data
        self.data: dict[frozenset[int], EncodedSplits] = {}
        for domains_of in {plan.everything, plan.student, *(plan.of_teacher(m.source) for m in self.teachers)}:
            splits = plan.only(everything, domains_of)
            self.data[domains_of] = EncodedSplits.of(
                splits, encodings, self.cache / "tokens", data.length_buckets, self.config.optim.batch_size
            )
        self.splits, self.encoded = plan.only(everything, plan.student), self.data[plan.student]

    def identity(self) -> str:
        """What a checkpoint belongs to: every example and every weight that this run begins with."""
        members = [content_hash(member.network.module) for member in [*self.teachers, self.student]]
        hashes = [
            self.encoded.hashes,
            *(self.data[self.domains.of_teacher(m.source)].hashes for m in self.teachers),
        ]
        return hashlib.sha256(json.dumps([hashes, members]).encode()).hexdigest()

    @property
    def cache(self) -> Path:
        given = self.config.run.cache_dir or os.environ.get("METADISTIL_CACHE") or "~/.cache/metadistil-engine"
        return Path(given).expanduser()

    def _sources(self, hub: Hub) -> tuple[list[ModelSource], ModelSource]:
        models, method = self.config.models, self.config.method.method
        taught = METHODS[method].teachers != "none"
        given = [item.strip() for item in models.teachers.split(",") if item.strip()] if taught else []
        if taught and not given:
            raise UserError(f"--method {method} needs --teachers; name at least one.")
        teachers, (student,) = resolve_models(given, hub), resolve_models([models.student], hub)
        if student.sample:
            raise UserError(
                f"--student is {models.student!r}, but only teachers have further samples; leave the number out."
            )
        return teachers, student

    def _announce(self, sources: list[ModelSource], hub: Hub) -> None:
        embedded = [source.given for source in sources if source.kind == "embedded"]
        if self.splits.source == "embedded":
            embedded.append(f"data {self.config.data.data}")
        if embedded:
            why = (
                "--source embedded was given" if hub.source == "embedded" else f"the hub cannot be reached ({hub.why})"
            )
            self.console.banner("EMBEDDED DEMONSTRATION", f"{', '.join(embedded)}: {why}.\n{DEMONSTRATION}")
        for i, source in enumerate(sources):
            role = "Student" if i == len(sources) - 1 else "Teacher"
            self.console.say(f"{role} {source.name}: {source.describe()}")

    def _member(
        self, source: ModelSource, seed: int, encodings: dict[str, Encoding], keep_head: bool, layers: str | None = None
    ) -> Member:
        """Load a model; its encoding is added to `encodings`, which models with equal tokenizers share."""

        def texts() -> list[str]:
            sample = self.splits.train[0]
            return [*sample["text"], *(sample["pair"] if self.task.pair else [])]

        loaded = load_model(source, self.task, texts, seed, keep_head)
        name = source.name
        if layers is not None:
            keep_layers(loaded.module, choices.layer_numbers(layers))
            name += f"[{layers}]"
        length = min(self.config.data.max_length, loaded.max_length)
        if length < self.config.data.max_length:
            self.console.say(
                f"{name} reads at most {length} tokens; --max-length {self.config.data.max_length} is cut to that."
            )
        encoding = Encoding.of(loaded.tokenizer, length)
        encodings.setdefault(encoding.key, encoding)
        network = Encoder(name, loaded.module, encoding.key, self.config.run.precision, self.compiled)
        return Member(source, network, loaded.tokenizer, loaded.trained_head)

    def _compare_sizes(self) -> None:
        size = self.student.network.size()
        for network in (member.network for member in self.teachers):
            if size > network.size():
                self.console.warn(
                    f"the student has {size:,} parameters, its teacher {network.name} only {network.size():,}; a student "
                    "is meant to be smaller.")  # fmt: skip

    def _say_kernels(self) -> None:
        try:
            chosen = kernels.backend(self.device.type)
        except ValueError as error:
            raise UserError(str(error)) from error
        self.console.say(f"Kernels of the distillation loss: {chosen.name}, {chosen.why}.")

    def _say_compiled(self, compiled: CompiledLayers) -> None:
        compiled.try_out(self.device)
        self.console.say(compiled.describe(METHODS[self.config.method.method].teachers, self.device))
        for network in (member.network for member in [*self.teachers, self.student]):
            if network.module.config.num_hidden_layers == 1:
                self.console.say(f"--compile changes nothing for {network.name}: it has no layer but the last.")
