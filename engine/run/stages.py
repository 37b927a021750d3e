"""Step 7, the stages of a run: teachers are prepared, the student is warmed up, learns inner states, is distilled."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from engine.data.noise import Noise
from engine.losses.objectives import Objective
from engine.methods import METHODS, Method, State
from engine.models.features import detach
from engine.models.network import Network
from engine.run.answers import Answers, answers_of
from engine.run.evaluation import predict
from engine.run.members import Member
from engine.run.phase import Phase, Plan
from engine.run.prototypes import expertise
from engine.run.setup import Setup
from engine.run.states import learner, let_teachers_learn, teacher_weights
from engine.run.teachers import Teacher, prepare, typicality_of
from engine.run.trainer import Trainer


@dataclass
class Stages:
    """Runs them one after the other, from the one that an interrupted run stands in. Models are trained in place.

    teachers         ready to teach
    answers          what they say to the training set, where that is kept
    learned_weights  of the teachers, where they learn
    expertise        [n] of the student's training examples, where meta-teachers teach
    """

    setup: Setup
    trainer: Trainer
    teachers: list[Teacher] = field(default_factory=list)
    answers: list[Answers] = field(default_factory=list)
    learned_weights: Network | None = None
    expertise: Tensor | None = None

    @property
    def method(self) -> Method:
        return METHODS[self.setup.config.method.method]

    def run(self) -> None:
        """Raises Interrupted when a signal stops it."""
        method, members = self.setup.config.method, self.setup.models.teachers
        typical = [self._typicality(member) for member in members if self.method.meta_teachers]
        self.teachers = [self.prepare(member) for member in members]
        if typical:
            self.expertise = self._expertise(typical)
        stages = {"warm up": self._warm_up} if method.student_warmup_epochs else {}
        stages |= (
            {"features": self._features} if self.setup.losses.matching is not None and method.feature_epochs else {}
        )
        stages[method.name] = self._distil
        begun = next((i for i, name in enumerate(stages) if self.trainer.resume.stands_in(name)), 0)
        for stage in list(stages.values())[begun:]:
            stage()

    def prepare(self, member: Member) -> Teacher:
        teacher = prepare(self.setup, member, self.trainer)
        domains = self.setup.examples.domains
        learned = domains.of_teacher(member.source)
        if not self.method.meta_teachers:
            detach(member.network.module)  # nobody compares domains by it
        elif learned != domains.everything:
            unseen = domains.everything - learned
            member.network.module.extras["domain"].average_into(sorted(unseen), sorted(learned))
        return teacher

    def answer(self, teacher: Network) -> Answers:
        """What a frozen teacher answers on the student's training set; then it leaves the device."""
        encoded = self.setup.examples.encoded
        found = answers_of(teacher, encoded.train[0], encoded.hashes[0], self.setup.device, self.setup.cache / "answers",
                           self.setup.console)  # fmt: skip
        teacher.move("cpu")
        return found

    def _typicality(self, member: Member) -> Tensor:
        """Of the student's training examples, in the encoder that the teacher starts from."""
        member.network.move(self.setup.device)
        examples = self.setup.examples
        return typicality_of(self.setup, member.network, examples.encoded, 0, examples.everything)

    def _expertise(self, typical: list[Tensor]) -> Tensor:
        """What each of the student's training examples counts: the mean of the teachers' expertise on it."""
        train, found = self.setup.examples.encoded.train[0], []
        for t, network in zip(typical, self.setup.models.taught(), strict=True):
            found.append(expertise(t, predict(network, train, self.setup.device), train.labels))
        return torch.stack(found).mean(0)

    def _warm_up(self) -> None:
        self._fit(
            "warm up", METHODS["finetune"], self.setup.config.method.student_warmup_epochs, self.setup.losses.objective
        )

    def _features(self) -> None:
        """The student learns its teachers' inner states alone; by no validation, for its head has learned nothing yet."""
        settings, losses, models = self.setup.config.method, self.setup.losses, self.setup.models
        objective = replace(losses.objective, on_logits=False)
        with losses.matching.between(models.student.network, models.taught()):
            self._fit("features", METHODS["kd"], settings.feature_epochs, objective, chosen=False)

    def _distil(self) -> None:
        config, losses, models = self.setup.config, self.setup.losses, self.setup.models
        method, objective, teachers = config.method, losses.objective, models.taught()
        joint = losses.matching is not None and not method.feature_epochs
        with losses.matching.between(models.student.network, teachers) if joint else nullcontext():
            if method.cache_teacher_logits:
                self.answers = [self.answer(teacher) for teacher in teachers]
            if not joint:
                objective = replace(objective, feature_loss="none")
            self._fit(method.name, self.method, config.optim.epochs, objective, config.optim.max_steps,
                      noise=self.setup.examples.noise)  # fmt: skip

    def _fit(
        self, phase: str, method: Method, epochs: int, objective: Objective, max_steps: int | None = None,
        chosen: bool = True, noise: Noise | None = None,
    ) -> None:  # fmt: skip
        """One stage of the student; the weights that stay are `chosen` by validation, or else the last."""
        setup, encoded = self.setup, self.setup.examples.encoded
        optim, settings, train = setup.config.optim, setup.config.method, encoded.train[0]
        if noise is not None:
            train = train.with_noise(noise)
        learning = method.teachers == "learning"
        plan = Plan(-(-len(train) // optim.batch_size), epochs, max_steps, settings.pilot_steps if learning else 1)
        # teachers whose answers are kept have no part in the training: they stay where `answer` left them
        student, teachers = setup.models.student.network, [] if self.answers else setup.models.taught()
        for network in [student, *teachers]:
            network.move(setup.device)
        state = State(learner(student, optim, optim.lr, plan.steps), objective, micro_batch=optim.micro_batch_size)
        if self.expertise is not None and method.teachers == "frozen" and objective.feature_loss != "none":
            train, state.by_example = train.with_columns({"expertise": self.expertise}), "expertise"
        if learning:
            self.learned_weights = let_teachers_learn(setup, state, method, teachers, objective, plan.rounds)
        elif method.teachers == "frozen":
            state.teachers, train = teachers, train.with_answers([answers.arrays for answers in self.answers])
            weights = teacher_weights(setup, student)
            state.weights = None if weights is None else weights.module().detach()
        validation = encoded.validation if chosen else None
        self.trainer.fit(Phase(phase, method, state, train, validation, plan, optim.batch_size, setup.config.run.seed))
