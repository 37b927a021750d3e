"""The meta-step for any modules: pilot, quiz, meta-gradient to every teacher, rewind, real step.

    step = MetaStep(student, [teacher], Objective(temperature=4.0), student_optimizer=..., teacher_optimizers=[...])
    losses = step([(x, y)], [(x_quiz, y_quiz)])

The engine's own `metadistil` is this object, given the encoders of transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from engine.batch import Batch
from engine.losses.objectives import Objective
from engine.losses.teacher_weights import TeacherWeights
from engine.meta.pilots import PILOTS
from engine.meta.problem import Kept, Meta, Problem
from engine.meta.reptile import Reptile
from engine.meta.strategies import STRATEGIES, Strategy
from engine.meta.time_machine import Store, TimeMachine
from engine.models.checkpointing import CHOICES, REFUSED
from engine.models.learner import Learner
from engine.models.network import UNNAMED, Network
from engine.sections import section


class MetaStep:
    """One round of MetaDistil (Zhou, Xu and McAuley, ACL 2022), teachers' logits averaged before the softmax.

    `student` and `teachers` are modules that map `batch.inputs` to logits [B, C] (or to logits and features, or to an
    object with `.logits`), or `Network`s that say how a module reads a batch, or `Learner`s, which bring their optimizer,
    clipping and schedule. The student's and teachers' trainable weights are flattened in place: `state_dict` stays as it
    was, but move modules to their device before. Batches are `(inputs, labels)` pairs or objects with `.inputs` and
    `.labels`.

    objective          the loss of student and teachers; `Objective()` is KL at temperature 5 and cross-entropy, half each
    student_optimizer, teacher_optimizers
                       torch's, each over its module's parameters; whoever schedules them calls their schedulers. Without
                       them only `meta_gradient` can be used
    max_grad_norm      clips the student's and every teacher's gradient to this norm before their steps; None leaves it
    pilot_lr, pilot_optimizer
                       the pilot's step: "sgd", or "adamw" from the moments of `student_optimizer`
    strategy           "exact", "double_backward", "finite_difference" or "first_order" (engine.meta.strategies), or a `Strategy`;
                       or a `Reptile` (engine.meta.reptile), which needs no quizzes and has a pilot step of its own
    teacher_weights    None (the mean), K positive numbers, or "learned": K weights that start equal and follow the same
                       meta-gradient at `weights_lr` (AdamW on their logarithms); or a `Network` or `Learner` of a module
                       that gives them
    teacher_alpha      adds to every teacher's gradient that of its own loss, `objective` with the student as its teacher and
                       this `alpha`: teacher_alpha soft(teacher, student) + (1 - teacher_alpha) hard; None adds nothing
    checkpointing      "none", "student", "teachers" or "both": whose layers are recomputed instead of kept
    independent_masks  new dropout masks for the real step, instead of the pilot's
    micro_batch_size   examples that go through the models at once; gradients are those of the whole batch
    store              where snapshots are kept: "device", or "pinned" host memory

    A step puts the student in train mode and the teachers in eval mode, and leaves them so. Frozen modules that the student
    shares with a teacher stay in train mode, and are in eval mode while the teacher answers.

    Raises ValueError for settings that do not fit; UserError in a step whose model has no forward-mode derivatives.
    """

    def __init__(
        self,
        student: nn.Module | Network | Learner,
        teachers: Sequence[nn.Module | Network | Learner],
        objective: Objective | None = None,
        *,
        student_optimizer: Optimizer | None = None,
        teacher_optimizers: Sequence[Optimizer] = (),
        pilot_lr: float = 1e-3,
        pilot_optimizer: str = "sgd",
        strategy: str | Strategy | Reptile = "exact",
        teacher_weights: Sequence[float] | str | Network | Learner | None = None,
        weights_lr: float = 0.01,
        teacher_alpha: float | None = None,
        checkpointing: str = "none",
        independent_masks: bool = False,
        micro_batch_size: int | None = None,
        max_grad_norm: float | None = 1.0,
        store: Store = "device",
    ):
        if not teachers:
            raise ValueError("a meta-step needs at least one teacher; got none.")
        if len(teacher_optimizers) not in (0, len(teachers)):
            raise ValueError(f"got {len(teacher_optimizers)} optimizers for {len(teachers)} teachers.")
        _check_settings(strategy, pilot_optimizer, teacher_alpha, checkpointing, micro_batch_size)
        names = ["student", *(f"teacher {k}" for k in range(len(teachers)))]
        modules = [_network(given, name) for given, name in zip([student, *teachers], names, strict=True)]
        _check_trainable(modules, names)
        _check_apart(modules)
        optimizers = [student_optimizer, *(teacher_optimizers or [None] * len(teachers))]
        pairs = zip([student, *teachers], modules, optimizers, strict=True)
        learners = [_learner(given, module, optimizer, max_grad_norm) for given, module, optimizer in pairs]
        for module in modules:
            module.flatten()
        weights, weights_learner = _weights(teacher_weights, len(teachers), modules[0], weights_lr)

        self.learner, self.independent_masks = learners[0], independent_masks
        self.learners = [learner for learner in [*learners[1:], weights_learner] if learner is not None]
        self.strategy = STRATEGIES[strategy] if isinstance(strategy, str) else strategy
        objective = objective or Objective()
        keep = self.learner is not None and self.strategy.keeps_graph and not independent_masks
        pilot = (self.strategy.pilot or PILOTS[pilot_optimizer].make)(pilot_lr, modules[0], self.learner)
        self.problem = Problem(
            modules[0], modules[1:], objective, pilot, TimeMachine(modules[0].flat, store), weights, checkpointing, keep,
            micro_batch=micro_batch_size,
            own=None if teacher_alpha is None else replace(objective, alpha=teacher_alpha, feature_loss="none"),
        )  # fmt: skip
        self.strategy.check(self.problem)

    @property
    def weights(self) -> Tensor | None:
        """[K] of the teachers, on their device; None where their logits are simply averaged."""
        network = self.problem.weights
        return None if network is None else network.module().detach()

    def __call__(self, batches: Sequence[Any], quizzes: Sequence[Any]) -> dict[str, Tensor]:
        """Pilot, quiz, a step of every teacher, and the student's real steps; device scalars `loss`, `pilot_loss`, `quiz_loss`.

        The student is put in train mode, the teachers in eval mode, with gradient. Where there is no quiz (`Reptile`),
        `quizzes` may be empty, and there is no `quiz_loss`; with `teacher_alpha` there is a `teacher_loss`, the teachers' mean.
        """
        taught = {id(learner.network) for learner in self.learners}
        if self.learner is None or not all(id(teacher) in taught for teacher in self.problem.teachers):
            raise ValueError("a whole step needs student_optimizer and teacher_optimizers; `meta_gradient` does not.")
        batches, quizzes = _batches(batches), _batches(quizzes) if self.strategy.quizzed else []
        learners = [self.learner, *self.learners]
        for learner in learners:
            learner.flat.check()
            learner.flat.clear_gradients()  # an earlier training may have left some there
        try:
            meta = self._meta(batches, quizzes)
        except BaseException:
            for learner in learners:  # half a meta-gradient is of no use
                learner.flat.clear_gradients()
            raise
        for learner in self.learners:
            learner.update()
        real = [self._real(batch, meta, j) for j, batch in enumerate(batches)]
        return {"loss": torch.stack(real).mean(), **_losses(meta)}

    def meta_gradient(self, batches: Sequence[Any], quizzes: Sequence[Any]) -> dict[str, Tensor]:
        """The gradient of the quiz loss, added to every teacher's `.grad`; the student is left bit for bit as it was.

        (But for weights that its own forward writes. Those of embeddings with a max_norm are taken back.)
        """
        return _losses(self._meta(_batches(batches), _batches(quizzes) if self.strategy.quizzed else []))

    def _meta(self, batches: Sequence[Batch], quizzes: Sequence[Batch]) -> Meta:
        for teacher in self.problem.teachers:
            teacher.flat.check(added=True)
            teacher.module.eval()
        self.problem.student.flat.check(added=True)
        self.problem.student.module.train()  # last: it decides about what it shares with a teacher
        return self.strategy(self.problem, batches, quizzes)

    @section("real step")
    def _real(self, batch: Batch, meta: Meta, number: int) -> Tensor:
        """The student's step on `batch` from the updated teachers, with the pilot's dropout masks unless independent."""
        student, problem, losses, weights = self.learner, self.problem, [], self.weights
        for part, masks in zip(problem.parts(batch), meta.masks[number], strict=True):
            with section("teacher forward"), torch.no_grad():
                taught = [problem.answer(teacher, part.batch) for teacher in problem.teachers]
            if meta.kept is not None:
                outputs, lookups = _resumed(meta.kept)
            elif self.independent_masks:
                outputs, lookups = student.forward(part.batch)
            else:
                with masks.again():
                    outputs, lookups = student.forward(part.batch, repeated=True)
            loss, slopes = part.objective.slopes(outputs, taught, part.batch.labels, weights)
            student.backward(outputs.given(), slopes, lookups)
            losses.append(loss)
        student.update()
        return torch.stack(losses).sum()


def _resumed(kept: Kept):
    """The pilot's forward stands for the real one: same weights, batch and masks. Buffers are set to what it left."""
    kept.buffers.restore()
    return kept.outputs, kept.lookups


def _losses(meta: Meta) -> dict[str, Tensor]:
    found = {"pilot_loss": meta.pilot_loss, "quiz_loss": meta.quiz_loss, "teacher_loss": meta.teacher_loss}
    return {name: loss for name, loss in found.items() if loss is not None}


def _check_settings(
    strategy: str | Strategy | Reptile, pilot_optimizer: str, teacher_alpha: float | None, checkpointing: str, micro_batch: int | None
) -> None:  # fmt: skip
    """Raises ValueError for the first setting that is not allowed."""
    if isinstance(strategy, str):
        _choice("strategy", strategy, STRATEGIES)
    elif not strategy.quizzed and teacher_alpha is not None:
        raise ValueError("teachers that follow the student's weights have no own loss; leave teacher_alpha out.")
    if isinstance(strategy, str) or strategy.pilot is None:
        _choice("pilot_optimizer", pilot_optimizer, PILOTS)
    if checkpointing in REFUSED:
        raise ValueError(f"checkpointing={checkpointing!r} is refused: {REFUSED[checkpointing]}")
    _choice("checkpointing", checkpointing, CHOICES)
    if micro_batch is not None and micro_batch < 1:
        raise ValueError(f"micro_batch_size is {micro_batch}; it must be at least 1, or None.")


def _network(given: nn.Module | Network | Learner, name: str) -> Network:
    if isinstance(given, Learner):
        return given.network
    if isinstance(given, Network):
        given.name = name if given.name == UNNAMED else given.name
        return given
    return Network(given, name=name)


def _learner(given: Any, network: Network, optimizer: Optimizer | None, max_grad_norm: float | None) -> Learner | None:
    """What steps the network: `given` where it is a learner already, None where nothing does."""
    if optimizer is None:
        return given if isinstance(given, Learner) else None
    if isinstance(given, Learner):
        raise ValueError(f"the {network.name} is a Learner, which has its optimizer already; leave the other one out.")
    _check_optimizer(optimizer, network)
    return Learner(network, optimizer, None, max_grad_norm)


def _weights(
    given: Sequence[float] | str | Network | Learner | None, teachers: int, student: Network, lr: float
) -> tuple[Network | None, Learner | None]:
    """The teachers' weights as a network that gives [K], and what steps them where they learn."""
    if isinstance(given, Learner):
        return given.network, given
    if given is None or isinstance(given, Network):
        return given, None
    module = TeacherWeights.of(given, teachers, student.flat.weights)
    network = Network(module, name="teacher weights")
    if not module.learned:
        return network, None
    return network, Learner(network, torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=0.0))


def _batches(given: Sequence[Any]) -> list[Any]:
    """Raises ValueError for what is not a list of batches."""
    if isinstance(given, Tensor | dict) or not isinstance(given, Sequence) or not given:
        raise ValueError("batches and quizzes are lists of one batch or more, each (inputs, labels) or with .inputs and "
                         f".labels; got {type(given).__name__}{'' if given is None or len(given) else ' of nothing'}.")  # fmt: skip
    return [_batch(each) for each in given]


def _batch(given: Any) -> Any:
    if hasattr(given, "labels"):
        return given
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise ValueError(f"a batch is (inputs, labels) or has .inputs and .labels; got {type(given).__name__}.")
    return Batch(labels=given[1], inputs=given[0])


def _check_optimizer(optimizer: Optimizer, network: Network) -> None:
    """Raises ValueError where an optimizer does not step just the weights of its module, all that are trainable among them."""
    given = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    missing = [n for n, p in network.trainable().items() if id(p) not in given]
    strange = [list(p.shape) for i, p in given.items() if i not in {id(p) for p in network.module.parameters()}]
    if missing or strange:
        what = (
            f"does not step {', '.join(missing[:3])}"
            if missing
            else f"also steps weights of another module, as one of {strange[0]}"
        )
        raise ValueError(
            f"the optimizer of the {network.name} {what}; give each module the optimizer of its own weights, in the same order.")  # fmt: skip


def _check_trainable(networks: Sequence[Network], roles: Sequence[str]) -> None:
    """Raises ValueError where one has no weight to train."""
    for network, role in zip(networks, roles, strict=True):
        if not network.trainable():
            called = role if network.name == role else f"{role} ({network.name})"
            raise ValueError(f"the {called} has no weight that requires gradient, so no step can move it; call "
                             "requires_grad_() on what it is to learn with.")  # fmt: skip


def _check_apart(networks: Sequence[Network]) -> None:
    """Raises ValueError where two networks share a trained weight, or one has weights that cannot be stepped."""
    owner: dict[int, str] = {}
    for network in networks:
        for name, p in network.trainable().items():
            if p.dtype not in (torch.float32, torch.float64):
                raise ValueError(f"{name} of the {network.name} is {p.dtype}; keep weights in float32 (.float()) and use "
                                 "autocast in the forward.")  # fmt: skip
            if id(p) in owner:
                raise ValueError(f"the {owner[id(p)]} and the {network.name} share the weight {name}; give each a copy "
                                 "(copy.deepcopy).")  # fmt: skip
        owner |= {id(p): network.name for p in network.trainable().values()}


def _choice(name: str, given: str, allowed) -> None:
    if given not in allowed:
        raise ValueError(f"{name} is {given!r}; it must be one of {', '.join(allowed)}.")
