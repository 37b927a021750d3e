"""The stages of a run: teachers are prepared, the student is warmed up, learns inner states, is distilled."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from engine.data.batches import QuizBatches
from engine.data.noise import Noise
from engine.losses.layer_map import freeze_unmapped
from engine.losses.objectives import Objective
from engine.losses.teacher_weights import TeacherWeights
from engine.meta.meta_step import MetaStep
from engine.meta.reptile import Reptile
from engine.methods import METHODS, Method, State
from engine.models import teacher_params
from engine.models.features import detach
from engine.models.learner import Learner
from engine.models.network import Network, describe_attention
from engine.run import choices
from engine.run.answers import Answers, answers_of
from engine.run.evaluation import predict
from engine.run.prototypes import expertise
from engine.run.setup import Setup
from engine.run.teachers import Member, Teacher, prepare, typicality_of
from engine.run.trainer import Phase, Plan, Trainer


class Stages:
    """Runs them one after the other, from the one that an interrupted run stands in.

    teachers         ready to teach
    answers          what they say to the training set, where that is kept
    learned_weights  of the teachers, where they learn
    """

    def __init__(self, setup: Setup, trainer: Trainer):
        self.setup, self.config, self.trainer, self.device = setup, setup.config, trainer, setup.device
        self.student, self.members = setup.student.network, [member.network for member in setup.teachers]
        self.teachers: list[Teacher] = []
        self.answers: list[Answers] = []
        self.learned_weights: Network | None = None
        self.expertise: Tensor | None = None  # [n] of the student's training examples

    def run(self) -> None:
        """Raises Interrupted when a signal stops it."""
        method = self.config.method
        typical = [self._typicality(member) for member in self.setup.teachers if method.method == "metakd"]
        self.teachers = [self._prepare(member) for member in self.setup.teachers]
        if typical:
            self.expertise = self._expertise(typical)
        stages = {"warm up": self._warm_up} if method.student_warmup_epochs else {}
        stages |= {"features": self._features} if self.setup.matching is not None and method.feature_epochs else {}
        stages[method.method] = self._distil
        begun = next((i for i, name in enumerate(stages) if self.trainer.stands_in(name)), 0)
        for stage in list(stages.values())[begun:]:
            stage()

    def _prepare(self, member: Member) -> Teacher:
        plan = self.setup.domains
        learned = plan.of_teacher(member.source)
        data = self.setup.data[learned]
        teacher = prepare(self.config, member, data, self.setup.objective, self.trainer, self.setup.cache)
        if self.config.method.method != "metakd":
            detach(member.network.module)  # nobody compares domains by it
        elif learned != plan.everything:
            unseen = plan.everything - learned
            member.network.module.extras["domain"].average_into(sorted(unseen), sorted(learned))
        return teacher

    def _typicality(self, member: Member) -> Tensor:
        """Of the student's training examples, in the encoder that the teacher starts from."""
        member.network.module.to(self.device)
        everything = self.setup.data[self.setup.domains.everything]
        return typicality_of(
            self.config, member.network, self.setup.encoded, 0, self.trainer, self.setup.cache, everything
        )

    def _expertise(self, typical: list[Tensor]) -> Tensor:
        """What each of the student's training examples counts: the mean of the teachers' expertise on it."""
        train, found = self.setup.encoded.train[0], []
        for t, member in zip(typical, self.setup.teachers, strict=True):
            found.append(expertise(t, predict(member.network, train, self.device), train.labels))
        return torch.stack(found).mean(0)

    def _warm_up(self) -> None:
        self._fit("warm up", "finetune", self.config.method.student_warmup_epochs)

    def _features(self) -> None:
        """The student learns its teachers' inner states alone; by no validation, for its head has learned nothing yet."""
        objective = replace(self.setup.objective, on_logits=False)
        method = "metakd" if self.config.method.method == "metakd" else "kd"
        with self.setup.matching.between(self.student, self.members):
            self._fit("features", method, self.config.method.feature_epochs, objective=objective, chosen=False)

    def _distil(self) -> None:
        config, method = self.config, self.config.method
        joint, objective = self.setup.matching is not None and not method.feature_epochs, self.setup.objective
        teachers = self.members
        with self.setup.matching.between(self.student, teachers) if joint else nullcontext():
            if method.cache_teacher_logits:
                self.answers = [self._answers(teacher) for teacher in teachers]
            if not joint:
                objective = replace(objective, feature_loss="none")
            self._fit(
                method.method,
                method.method,
                config.optim.epochs,
                config.optim.max_steps,
                objective,
                noise=self.setup.noise,
            )

    def _fit(
        self, phase_name: str, method: str, epochs: int, max_steps: int | None = None, objective: Objective | None = None,
        chosen: bool = True, noise: Noise | None = None,
    ) -> None:  # fmt: skip
        """One stage of the student; the weights that stay are `chosen` by validation, or else the last."""
        config, train, student = self.config, self.setup.encoded.train[0], self.student
        if noise is not None:
            train = train.with_noise(noise)
        optim, settings = config.optim, config.method
        learning = METHODS[method].teachers == "learning"
        plan = Plan(-(-len(train) // optim.batch_size), epochs, max_steps, settings.pilot_steps if learning else 1)
        common = {"warmup_ratio": optim.warmup_ratio, "weight_decay": optim.weight_decay,
                  "max_grad_norm": optim.max_grad_norm, "optimizer": optim.optimizer}  # fmt: skip
        # teachers whose answers are kept have no part in the training: they stay where `_answers` left them
        networks = [] if self.answers else self.members
        for network in [student, *networks]:
            network.module.to(self.device)  # before its weights are flattened
        learner = Learner.adamw(student, lr=optim.lr, steps=plan.steps, **common)
        objective = objective or self.setup.objective
        state = State(learner, objective, micro_batch=optim.micro_batch_size)
        if method == "metakd" and objective.feature_loss != "none":
            train, state.by_example = train.with_columns({"expertise": self.expertise}), "expertise"
        if learning:
            for network in networks:
                teacher_params.restrict(network.module, settings.teacher_params)
                if settings.teacher_params != "all":
                    self.setup.console.say(f"Teacher {network.name} {teacher_params.describe(network.module)}.")
            strategy = self._strategy(METHODS[method], networks)
            learners = [Learner.adamw(n, lr=optim.teacher_lr, steps=plan.rounds, **common) for n in networks]
            state.meta_step = self._meta_step(state.student, networks, learners, strategy, objective)
            if METHODS[method].learn_from == "quiz":
                state.quiz = QuizBatches(
                    self.setup.encoded.quiz.only({student.encoding}),
                    optim.batch_size,
                    settings.quiz_batches,
                    config.run.seed,
                    self.device,
                )
        elif METHODS[method].teachers == "frozen":
            state.teachers, train = networks, train.with_answers([answers.arrays for answers in self.answers])
            weights = self._teacher_weights()
            state.weights = None if weights is None else weights.module().detach()
        validation, seed = self.setup.encoded.validation if chosen else None, config.run.seed
        self.trainer.fit(Phase(phase_name, METHODS[method], state, train, validation, plan, optim.batch_size, seed))

    def _answers(self, teacher: Network) -> Answers:
        """What a frozen teacher answers on the student's training set; then it leaves the device."""
        found = answers_of(teacher, self.setup.encoded.train[0], self.setup.encoded.hashes[0], self.device, self.setup.cache / "answers",
                           self.setup.console)  # fmt: skip
        teacher.move("cpu")
        return found

    def _strategy(self, method: Method, teachers: list[Network]) -> str | Reptile:
        """What moves the teachers. Weights that no layer map names are frozen: before learners are made."""
        if method.learn_from == "quiz":
            return self.config.method.meta_grad
        maps = choices.layer_maps(self.config, self.student, teachers)
        for teacher, found in zip(teachers, maps, strict=True):
            self.setup.console.say(found.describe())
            freeze_unmapped(teacher.module, found)
        self.setup.console.say("No quiz batches are drawn: the quiz set stays unused.")
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
            self.setup.console.say(f"Attention: {describe_attention(self.device, low_precision)}.")
        return MetaStep.of(
            student, teachers, learners, weights, objective, pilot_lr=settings.pilot_lr,
            pilot_optimizer=settings.pilot_optimizer, strategy=strategy, checkpointing=settings.checkpointing,
            independent_masks=settings.independent_masks, store=settings.snapshot_store,
            micro_batch_size=self.config.optim.micro_batch_size,
            teacher_alpha=settings.teacher_alpha if METHODS[settings.method].own_loss else None,
        )  # fmt: skip

    def _teacher_weights(self) -> Network | None:
        like = next(self.student.module.parameters())
        weights = TeacherWeights.of(self.setup.given_weights, len(self.setup.teachers), like)
        return None if weights is None else Network(weights, name="teacher weights")
