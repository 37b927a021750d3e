"""What a method's step works on: learners, teachers and their weights, the meta-step, quiz batches."""

from __future__ import annotations

from collections.abc import Sequence

from engine.config import OptimConfig
from engine.data.batches import QuizBatches
from engine.losses.layer_map import freeze_unmapped
from engine.losses.objectives import Objective
from engine.losses.teacher_weights import TeacherWeights
from engine.meta.meta_step import MetaStep
from engine.meta.reptile import Reptile
from engine.methods import Method, State
from engine.models import teacher_params
from engine.models.learner import Learner
from engine.models.network import Network, describe_attention
from engine.run import choices
from engine.run.setup import Setup


def learner(network: Network, optim: OptimConfig, lr: float, steps: int) -> Learner:
    """`network` with AdamW as the settings have it; it must stand on its device already, for its weights are flattened."""
    return Learner.adamw(network, lr=lr, steps=steps, warmup_ratio=optim.warmup_ratio, weight_decay=optim.weight_decay,
                         max_grad_norm=optim.max_grad_norm, optimizer=optim.optimizer)  # fmt: skip


def teacher_weights(setup: Setup, student: Network) -> Network | None:
    """--teacher-weights as a network without inputs, where the student stands; None for equal ones."""
    like = next(student.module.parameters())
    weights = TeacherWeights.of(setup.losses.teacher_weights, len(setup.models.teachers), like)
    return None if weights is None else Network(weights, name="teacher weights")


def let_teachers_learn(
    setup: Setup, state: State, method: Method, teachers: Sequence[Network], objective: Objective, rounds: int
) -> Network | None:
    """Give `state` the meta-step, and the quiz where teachers learn from it; returns the teachers' weights that learn too."""
    optim, settings, say = setup.config.optim, setup.config.method, setup.console.say
    for teacher in teachers:
        teacher_params.restrict(teacher.module, settings.teacher_params)
        if settings.teacher_params != "all":
            say(f"Teacher {teacher.name} {teacher_params.describe(teacher.module)}.")
    strategy = _strategy(setup, method, teachers)
    learners = [learner(teacher, optim, optim.teacher_lr, rounds) for teacher in teachers]
    state.meta_step, learned = meta_step(setup, state.student, method, learners, objective, strategy)
    if method.learn_from == "quiz":
        for each in learners:
            each.watched = True
        say(f"Attention: {describe_attention(setup.device, setup.config.run.precision == 'bf16')}.")
        quiz = setup.examples.encoded.quiz.only({state.student.network.encoding})
        state.quiz = QuizBatches(quiz, optim.batch_size, settings.quiz_batches, setup.config.run.seed, setup.device)
    return learned


def meta_step(
    setup: Setup, student: Learner, method: Method, teachers: Sequence[Learner], objective: Objective, strategy: str | Reptile
) -> tuple[MetaStep, Network | None]:  # fmt: skip
    """The meta-step as the settings have it, and the teachers' weights where they learn."""
    settings, weights, learned = setup.config.method, teacher_weights(setup, student.network), None
    if weights is not None and weights.trainable():
        learned = weights
        weights = Learner.constant(weights, settings.weights_lr)
    return MetaStep(
        student, teachers, objective, teacher_weights=weights, pilot_lr=settings.pilot_lr,
        pilot_optimizer=settings.pilot_optimizer, strategy=strategy, checkpointing=settings.checkpointing,
        independent_masks=settings.independent_masks, store=settings.snapshot_store,
        micro_batch_size=setup.config.optim.micro_batch_size, teacher_alpha=settings.teacher_alpha if method.own_loss else None,
    ), learned  # fmt: skip


def _strategy(setup: Setup, method: Method, teachers: Sequence[Network]) -> str | Reptile:
    """What moves the teachers. Weights that no layer map names are frozen, so learners are made later."""
    if method.learn_from == "quiz":
        return setup.config.method.meta_grad
    maps = choices.layer_maps(setup.config, setup.models.student.network, teachers)
    for teacher, found in zip(teachers, maps, strict=True):
        setup.console.say(found.describe())
        freeze_unmapped(teacher.module, found)
    setup.console.say("No quiz batches are drawn: the quiz set stays unused.")
    return Reptile([found.sources for found in maps])
