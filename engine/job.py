"""One job from configuration to exported student: what it is made of, its phases in order, what it leaves behind."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine import choices, domains, kernels, matching, native, report, teacher_params
from engine.allocator import keep_freed_memory
from engine.answers import Answers, answers_of
from engine.compiling import CompiledLayers
from engine.config import Config
from engine.console import Console
from engine.data.batches import QuizBatches, training_rows
from engine.data.encode import EncodedSplits, Encoding
from engine.data.noise import Noise
from engine.data.splits import load_splits
from engine.errors import UserError
from engine.evaluation import by_domain, predict, primary, score
from engine.features import detach
from engine.hub import Hub
from engine.interrupts import Interrupts
from engine.layer_map import freeze_unmapped
from engine.learner import Learner
from engine.meta_step import MetaStep
from engine.methods import METHODS, Method, State
from engine.models import ModelSource, content_hash, keep_layers, load_model, resolve_models
from engine.monitor import Monitor
from engine.network import Encoder, Network, describe_attention
from engine.objectives import Objective
from engine.output import OutputDirectory, require_directory
from engine.prototypes import expertise
from engine.reptile import Reptile
from engine.teachers import Member, Teacher, make_ready, prepare, typicality_of
from engine.trainer import Phase, Plan, Progress, Trainer
from engine.weights import TeacherWeights

FALLEN = 0.05  # a loss of the primary metric worth a warning


class Job:
    """Builds everything on construction, so that bad input is known before the output directory exists."""

    def __init__(self, config: Config, console: Console):
        self.config, self.console = config, console
        self.answers: list[Answers] = []  # of the teachers, where they are kept
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
        self.teacher_members = [self._member(s, config.run.teacher_seed, encodings, keep) for s in teacher_sources]
        self.student = self._member(student_source, config.run.seed, encodings, True, config.models.student_layers)
        for member in self.teacher_members:
            make_ready(config, member, self.task)
        self._compare_sizes()
        texts = sum(map(len, [*self.splits.train, self.splits.quiz, self.splits.validation, self.splits.test]))
        self.console.say(f"Tokenising {texts:,} texts, {len(encodings)} tokenizer{'s' * (len(encodings) != 1)} ...")
        self._encode(list(encodings.values()))
        student, teachers = self.student.network, [member.network for member in self.teacher_members]
        readers, self.noise = choices.noise_readers(config, student, teachers, console.say), None
        if readers:
            self.noise = Noise(self.splits.train[0], list(encodings.values()), self.encoded.hashes[0], self.cache / "tokens",
                               readers, config.method.noise_kind, config.run.seed)  # fmt: skip
        self.objective = choices.objective(config, self.task, console.say)
        self.matching = None
        if self.objective.feature_loss != "none":
            self.matching = matching.match(config, student, teachers)
        self.given_weights, self.learned_weights = choices.teacher_weights(config, len(teachers)), None
        if METHODS[config.method.method].teachers == "learning":
            for teacher in teachers:
                teacher_params.check(teacher.module, config.method.teacher_params)
            choices.check_checkpointing(config.method.checkpointing, student, teachers)
            choices.layer_maps(config, student, teachers)
        native.prepare(console.say)  # last: it may compile for some seconds
        if self.teacher_members and self.objective.soft_loss == "kl":
            self._say_kernels()
        if self.compiled is not None:
            self._say_compiled(self.compiled)
        if self.device.type == "cpu":
            keep_freed_memory()

    def _encode(self, encodings: list[Encoding]) -> None:
        """All data that the run reads, by the domains that it is of; `splits` and `encoded` become the student's."""
        everything, plan, data = self.splits, self.domains, self.config.data
        self.encoded_by: dict[frozenset[int], EncodedSplits] = {}
        for domains_of in {plan.everything, plan.student, *(plan.of_teacher(m.source) for m in self.teacher_members)}:
            splits = plan.only(everything, domains_of)
            self.encoded_by[domains_of] = EncodedSplits.of(
                splits, encodings, self.cache / "tokens", data.length_buckets, self.config.optim.batch_size
            )
        self.splits, self.encoded = plan.only(everything, plan.student), self.encoded_by[plan.student]

    def run(self, output: OutputDirectory, interrupts: Interrupts) -> None:
        """Prepare the teachers, warm the student up, distil it. Raises Interrupted when a signal stops it."""
        config, method = self.config, self.config.method
        self.monitor = Monitor(output.path)
        with closing(self.monitor):
            self.trainer = Trainer(
                config.run,
                self.task,
                self.device,
                self._identity(),
                output.path,
                self.console,
                self.monitor,
                interrupts,
            )
            typical = [self._typicality(member) for member in self.teacher_members if method.method == "metakd"]
            self.teachers = [self._prepare(member) for member in self.teacher_members]
            if typical:
                self.expertise = self._expertise(typical)
            stages = {"warm up": self._warm_up} if method.student_warmup_epochs else {}
            stages |= {"features": self._features} if self.matching is not None and method.feature_epochs else {}
            stages[method.method] = self._distil
            begun = next((i for i, name in enumerate(stages) if self.trainer.stands_in(name)), 0)
            for stage in list(stages.values())[begun:]:
                stage()

    def _prepare(self, member: Member) -> Teacher:
        plan = self.domains
        learned = plan.of_teacher(member.source)
        data = self.encoded_by[learned]
        teacher = prepare(self.config, member, data, self.objective, self.trainer, self.cache)
        if self.config.method.prepare_method == "meta" and learned != plan.everything:
            unseen = plan.everything - learned
            member.network.module.extras["domain"].average_into(sorted(unseen), sorted(learned))
        return teacher

    def _typicality(self, member: Member) -> Tensor:
        """Of the student's training examples, in the encoder that the teacher starts from."""
        member.network.module.to(self.device)
        everything = self.encoded_by[self.domains.everything]
        return typicality_of(self.config, member.network, self.encoded, 0, self.trainer, self.cache, everything)

    def _expertise(self, typical: list[Tensor]) -> Tensor:
        """What each of the student's training examples counts: the mean of the teachers' expertise on it."""
        train, found = self.encoded.train[0], []
        for t, member in zip(typical, self.teacher_members, strict=True):
            found.append(expertise(t, predict(member.network, train, self.device), train.labels))
        return torch.stack(found).mean(0)

    def _warm_up(self) -> None:
        self._fit("warm up", "finetune", self.config.method.student_warmup_epochs)

    def _features(self) -> None:
        """The student learns its teachers' inner states alone; by no validation, for its head has learned nothing yet."""
        objective = replace(self.objective, on_logits=False)
        method = "metakd" if self.config.method.method == "metakd" else "kd"
        with self.matching.between(self.student.network, [member.network for member in self.teacher_members]):
            self._fit("features", method, self.config.method.feature_epochs, objective=objective, chosen=False)

    def _distil(self) -> None:
        config, method = self.config, self.config.method
        joint, objective = self.matching is not None and not method.feature_epochs, self.objective
        teachers = [member.network for member in self.teacher_members]
        with self.matching.between(self.student.network, teachers) if joint else nullcontext():
            if method.cache_teacher_logits:
                self.answers = [self._answers(teacher) for teacher in teachers]
            if not joint:
                objective = replace(objective, feature_loss="none")
            self._fit(method.method, method.method, config.optim.epochs, config.optim.max_steps, objective, noise=self.noise)

    def close(self, output: OutputDirectory, seconds: float) -> None:
        """Measure every model once on validation and test, export, write the summary, show the table."""
        for member in self.teacher_members:
            detach(member.network.module)  # what it learned for its student's sake alone is not exported
        teachers = [self._measure(teacher.member)[0] | _preparation(teacher) for teacher in self.teachers]
        student, logits = self._measure(self.student)
        student["best_step"] = self.trainer.finished[self.config.method.method].best_step
        self._warn_of_fallen(teachers)
        if self.learned_weights is not None:
            weights = self.learned_weights.module().tolist()  # sync: the training is over
            for entry, weight in zip(teachers, weights, strict=True):
                entry["weight"] = round(weight, 6)
        summary = self._summary(teachers, student, seconds)
        data = f"{self.config.data.data} ({self.splits.source}); " + ", ".join(
            f"{k} {v}" for k, v in summary["sizes"].items()
        )
        for teacher, entry in zip(self.teachers, teachers, strict=True):
            folder = output.path / "teachers" / entry["name"]
            card = report.model_card(summary, entry, "a teacher", data)
            with teacher_params.merged(teacher.member.network.module):
                report.export(teacher.member.network.module, teacher.member.tokenizer, folder, card)
        card = report.model_card(summary, student, "the student", data)
        report.export(self.student.network.module, self.student.tokenizer, output.path / "student", card)
        for split, values in logits.items():
            file = output.path / "predictions" / f"{split}.jsonl"
            report.write_predictions(file, getattr(self.splits, split), values, self.task)
        output.write("summary.json", summary)
        self.trainer.file.unlink(missing_ok=True)
        if summary["source"] == "embedded":
            self.console.banner("EMBEDDED DEMONSTRATION", report.DEMONSTRATION)
        if self.compiled is not None:
            graphs, taken = self.compiled.spent()
            self.console.say(f"torch.compile: {graphs} graphs in {taken:.0f} s, which the times of this run include.")
        self.console.say(f"Results: {output.path} ({seconds:.0f} s)")
        self.console.table(**report.closing_table(summary))

    def _warn_of_fallen(self, teachers: list[dict[str, Any]]) -> None:
        """Meta-updates that ruin a teacher show in the student's figures late or never; say it."""
        metric = primary(self.task)
        for entry in teachers:
            before, after = entry["prepared"]["validation"][metric], entry["metrics"]["validation"][metric]
            if before - after > FALLEN:
                self.console.warn(
                    f"teacher {entry['name']} fell from {metric} {before:.4f} to {after:.4f} while it taught; lower "
                    "--teacher-lr, or warm the student up first (--student-warmup-epochs 1).")  # fmt: skip

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
            self.console.banner("EMBEDDED DEMONSTRATION", f"{', '.join(embedded)}: {why}.\n{report.DEMONSTRATION}")
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
        for network in (member.network for member in self.teacher_members):
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
        for network in (member.network for member in [*self.teacher_members, self.student]):
            if network.module.config.num_hidden_layers == 1:
                self.console.say(f"--compile changes nothing for {network.name}: it has no layer but the last.")

    def _identity(self) -> str:
        """What a checkpoint belongs to: every example and every weight that this run begins with."""
        members = [content_hash(member.network.module) for member in [*self.teacher_members, self.student]]
        hashes = [
            self.encoded.hashes,
            *(self.encoded_by[self.domains.of_teacher(m.source)].hashes for m in self.teacher_members),
        ]
        return hashlib.sha256(json.dumps([hashes, members]).encode()).hexdigest()

    def _fit(
        self, phase_name: str, method: str, epochs: int, max_steps: int | None = None, objective: Objective | None = None,
        chosen: bool = True, noise: Noise | None = None,
    ) -> None:  # fmt: skip
        """One stage of the student; the weights that stay are `chosen` by validation, or else the last."""
        config, train, student = self.config, self.encoded.train[0], self.student.network
        if noise is not None:
            train = train.with_noise(noise)
        optim, settings = config.optim, config.method
        learning = METHODS[method].teachers == "learning"
        plan = Plan(-(-len(train) // optim.batch_size), epochs, max_steps, settings.pilot_steps if learning else 1)
        common = {"warmup_ratio": optim.warmup_ratio, "weight_decay": optim.weight_decay,
                  "max_grad_norm": optim.max_grad_norm, "optimizer": optim.optimizer}  # fmt: skip
        # teachers whose answers are kept have no part in the training: they stay where `_answers` left them
        networks = [] if self.answers else [teacher.member.network for teacher in self.teachers]
        for network in [student, *networks]:
            network.module.to(self.device)  # before its weights are flattened
        learner = Learner.adamw(student, lr=optim.lr, steps=plan.steps, **common)
        objective = objective or self.objective
        state = State(learner, objective, micro_batch=optim.micro_batch_size)
        if method == "metakd":
            train, state.by_example = train.with_columns({"expertise": self.expertise}), "expertise"
        if learning:
            for network in networks:
                teacher_params.restrict(network.module, settings.teacher_params)
                if settings.teacher_params != "all":
                    self.console.say(f"Teacher {network.name} {teacher_params.describe(network.module)}.")
            strategy = self._strategy(METHODS[method], networks)
            learners = [Learner.adamw(n, lr=optim.teacher_lr, steps=plan.rounds, **common) for n in networks]
            state.meta_step = self._meta_step(state.student, networks, learners, strategy, objective)
            if METHODS[method].learn_from == "quiz":
                state.quiz = QuizBatches(
                    self.encoded.quiz.only({student.encoding}),
                    optim.batch_size,
                    settings.quiz_batches,
                    config.run.seed,
                    self.device,
                )
        elif METHODS[method].teachers == "frozen":
            state.teachers, train = networks, train.with_answers([answers.arrays for answers in self.answers])
            weights = self._teacher_weights()
            state.weights = None if weights is None else weights.module().detach()
        validation, seed = self.encoded.validation if chosen else None, config.run.seed
        self.trainer.fit(Phase(phase_name, METHODS[method], state, train, validation, plan, optim.batch_size, seed))

    def _answers(self, teacher: Network) -> Answers:
        """What a frozen teacher answers on the student's training set; then it leaves the device."""
        found = answers_of(teacher, self.encoded.train[0], self.encoded.hashes[0], self.device, self.cache / "answers",
                           self.console)  # fmt: skip
        teacher.move("cpu")
        return found

    def _strategy(self, method: Method, teachers: list[Network]) -> str | Reptile:
        """What moves the teachers. Weights that no layer map names are frozen: before learners are made."""
        if method.learn_from == "quiz":
            return self.config.method.meta_grad
        maps = choices.layer_maps(self.config, self.student.network, teachers)
        for teacher, found in zip(teachers, maps, strict=True):
            self.console.say(found.describe())
            freeze_unmapped(teacher.module, found)
        self.console.say("No quiz batches are drawn: the quiz set stays unused.")
        return Reptile([found.sources for found in maps])

    def _meta_step(
        self,
        student: Learner,
        teachers: list[Network],
        learners: list[Learner],
        strategy: str | Reptile,
        objective: Objective,
    ) -> MetaStep:
        settings, weights = self.config.method, self._teacher_weights()
        if weights is not None and weights.trainable():
            self.learned_weights = weights
            learners = [*learners, Learner.constant(weights, settings.weights_lr)]
        if not isinstance(strategy, Reptile):  # which has no forward-mode pass
            low_precision = self.config.run.precision == "bf16"
            self.console.say(f"Attention: {describe_attention(self.device, low_precision)}.")
        return MetaStep.of(
            student, teachers, learners, weights, objective, pilot_lr=settings.pilot_lr,
            pilot_optimizer=settings.pilot_optimizer, strategy=strategy, checkpointing=settings.checkpointing,
            independent_masks=settings.independent_masks, store=settings.snapshot_store,
            micro_batch_size=self.config.optim.micro_batch_size,
            teacher_alpha=settings.teacher_alpha if METHODS[settings.method].own_loss else None,
        )  # fmt: skip

    def _teacher_weights(self) -> Network | None:
        like = next(self.student.network.module.parameters())
        weights = TeacherWeights.of(self.given_weights, len(self.teacher_members), like)
        return None if weights is None else Network(weights, name="teacher weights")

    def _measure(self, member: Member) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Name, source, parameters and metrics of a model, and its logits, by split."""
        network, splits = member.network, {"validation": self.encoded.validation, "test": self.encoded.test}
        network.module.to(self.device)
        logits = {name: predict(network, split, self.device) for name, split in splits.items()}
        metrics = {name: score(z, splits[name].labels, self.task) for name, z in logits.items()}
        with teacher_params.merged(network.module):  # adapters are not part of what is exported
            size = network.size()
        entry = {"name": network.name, "source": member.source.describe(), "parameters": size, "metrics": metrics}
        if self.task.domains:
            entry["by_domain"] = {name: by_domain(z, splits[name], self.task) for name, z in logits.items()}
        return entry, logits

    def _summary(self, teachers: list[dict[str, Any]], student: dict[str, Any], seconds: float) -> dict[str, Any]:
        phases = {f"prepare {t.member.network.name}": t.progress for t in self.teachers if t.origin != "as given"}
        for member, answers in zip(self.teacher_members, self.answers, strict=False):  # none where none are kept
            phases[f"answers of {member.network.name}"] = Progress(examples=len(answers), seconds=answers.seconds)
        phases |= self.trainer.finished
        train, optim = self.encoded.train[0], self.config.optim
        batches = training_rows(train.widths, optim.batch_size, self.config.run.seed, epoch=0)
        sizes = {f"train{'' if i == 0 else i + 1}": len(sample) for i, sample in enumerate(self.splits.train)}
        return report.summarise(
            self.config, self.task, primary(self.task),
            {"data": self.splits.source, "student": self.student.source.kind,
             "teachers": [member.source.kind for member in self.teacher_members]},
            teachers, student,
            {name: {"seconds": round(p.seconds, 3), "steps": p.step, "skipped": p.skipped,
                    "examples_per_second": round(p.examples_per_second(), 2)} for name, p in phases.items()},
            seconds=round(seconds, 3), padding_waste=round(train.padding_waste(batches), 4),
            peak_memory=report.peak_memory(self.device), device=report.hardware(self.device),
            sizes=sizes | {name: len(getattr(self.splits, name)) for name in ("quiz", "validation", "test")},
            notes=self.splits.notes,
        )  # fmt: skip

    @property
    def cache(self) -> Path:
        given = self.config.run.cache_dir or os.environ.get("METADISTIL_CACHE") or "~/.cache/metadistil-engine"
        return Path(given).expanduser()


def _preparation(teacher: Teacher) -> dict[str, Any]:
    progress = teacher.progress
    prepared = {"validation": progress.best, "best_step": progress.best_step, "seconds": round(progress.seconds, 3)}
    return {"origin": teacher.origin, "sample": teacher.member.source.sample, "prepared": prepared}
