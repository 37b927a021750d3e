"""A run in small: the stages of engine.run.stages on models and batches at hand, a few steps of each, under a ledger.

Nothing is trained for its result and no data is read, so it serves fake models (engine.profiling.estimate) as well as real
ones, which is how the estimate is checked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from engine.batch import Batch
from engine.config import Config
from engine.data.labels import Task
from engine.errors import UserError
from engine.methods import METHODS, State
from engine.models.network import Encoder, Network
from engine.profiling.blueprints import Blueprint
from engine.profiling.ledger import Ledger
from engine.run import choices
from engine.run.losses import plan_losses
from engine.run.members import Member, Models
from engine.run.phase import Phase, Progress
from engine.run.resume import Resume
from engine.run.setup import Setup
from engine.run.stages import Stages
from engine.run.teachers import Teacher, fine_tuning
from engine.telemetry.flops import FlopCounter

STEPS = 2  # the first makes what stays: gradients, moments, snapshots


@dataclass
class Act:
    """A phase that was rehearsed."""

    name: str
    ledger: Ledger
    flops: int  # of its last step; with several pilot steps, of a whole round


class Rehearsal:
    """Builds the models on the host, as a run does, and `run` takes the phases one after another.

    `acts` are those that were rehearsed. Without `follow` no ledger listens, and its figures are 0. Raises UserError for
    settings that do not fit the models, or that cannot be rehearsed.
    """

    def __init__(
        self, config: Config, task: Task, student: Blueprint, teachers: Sequence[Blueprint], device: torch.device,
        follow: bool = True,
    ):  # fmt: skip
        refuse(config)
        self.config, self.device, self.follow, self.acts = config, device, follow, []
        self.resume = Resume(Path(), identity="")  # no run was interrupted
        if METHODS[config.method.method].teachers == "none":
            teachers = []
        choices.resolve_defaults(config, student.source, [t.source for t in teachers])
        member, *members = [self._member(each) for each in [student, *teachers]]
        models = Models(member, members, encodings=[], compiled=None)
        self.task, self.networks = task, [member.network, *models.taught()]
        losses = plan_losses(config, task, member.network, models.taught(), _silent)
        examples, console = SimpleNamespace(encoded=_Encoded(config), noise=None), SimpleNamespace(say=_silent)
        self._stages = _Stages(Setup(config, console, device, Path(), models, examples, losses), self)

    def _member(self, blueprint: Blueprint) -> Member:
        """Models of as many words are taken to have one tokenizer."""
        module = blueprint.build()
        network = Encoder(blueprint.source.name, module, f"{module.config.vocab_size} words", self.config.run.precision)
        return Member(blueprint.source, network, None, blueprint.trained_head)

    def run(self) -> list[Act]:
        self._stages.run()
        return self.acts

    # --- in the trainer's place

    def fit(self, phase: Phase) -> Progress:
        """Some steps of a phase, on batches as long and as large as they can be."""
        state = phase.state
        for network in state.networks():
            network.move(self.device)
        batches, quizzes = self.batches(phase)
        ledger = self.ledger(state, [*batches, *quizzes])
        counter = FlopCounter()
        with ledger.following() if self.follow else nullcontext():
            for step in range(STEPS):
                with counter if self.follow and step == STEPS - 1 else nullcontext():
                    phase.method.step(state, batches, quizzes)
                state.advance(len(batches))
        ledger.known = tuple  # which would keep the phase's optimizers alive
        self.acts.append(Act(phase.name, ledger, counter.total))
        return Progress()

    def batches(self, phase: Phase) -> tuple[list[Batch], list[Batch]]:
        """Of a round, and its quizzes: full, and as long as they can be."""
        quiz, batches = phase.state.quiz, self._batches(phase, phase.plan.round_size)
        return batches, [] if quiz is None else self._batches(phase, quiz.count, quiz.batch_size)

    def ledger(self, state: State, batches: Sequence[Batch], **options: Any) -> Ledger:
        """One that knows what these models, their optimizers and the batches hold."""
        inputs = list(_tensors(batches))
        shapes = [s for network in self.networks for s in _weight_shapes(network)]
        shapes += [s for learner in state.learners() for s in _vector_shapes(learner.network)]
        return Ledger(lambda: _known(self.networks, state, inputs), shapes, **options)

    def _batches(self, phase: Phase, count: int, size: int | None = None) -> list[Batch]:
        kept = self._stages.kept_answers
        return [self.batch(phase.state.networks(), size or phase.batch_size, kept) for _ in range(count)]

    def batch(self, networks: Sequence[Network], size: int, kept: Sequence[Sequence[torch.Size]] = ()) -> Batch:
        """Random words, none of them padding; `kept` are the shapes of an example's answers, of each teacher."""
        shape, inputs = (size, self.config.data.max_length), {}
        for network in networks:
            ids = torch.randint(1, network.module.config.vocab_size, shape, device=self.device)
            inputs[network.encoding] = {"input_ids": ids, "attention_mask": torch.ones_like(ids),
                                        "token_type_ids": torch.zeros_like(ids)}  # fmt: skip
        if self.task.kind == "regression":
            labels = torch.rand(size, device=self.device)
        else:
            labels = torch.randint(self.task.num_labels, (size,), device=self.device)
        answers = [[torch.zeros(size, *each, device=self.device) for each in shapes] for shapes in kept]
        return Batch(labels, inputs, answers)


def refuse(config: Config) -> None:
    """Raises UserError for settings that do not go together, or whose memory is not estimated."""
    choices.refuse(config)
    method = config.method
    for name, known in {"method": not METHODS[method.method].meta_teachers, "prepare_method": method.prepare_method in (None, "finetune"),
                        "teacher_domains": config.data.teacher_domains != "each", "compile": not config.run.compile}.items():  # fmt: skip
        if not known:
            value = getattr(method, name, getattr(config.data, name, ""))
            raise UserError(f"--{name.replace('_', '-')} {value}".rstrip() + " is not estimated: what it makes depends on the "
                            "data or on a compiler; leave it out.")  # fmt: skip


@dataclass
class _Stages(Stages):
    """Teachers are prepared without data, a cache or a validation; `kept_answers` are shapes of an example's, by teacher."""

    kept_answers: list[list[torch.Size]] = field(default_factory=list)

    def prepare(self, member: Member) -> Teacher:
        config, network, members = self.setup.config, member.network, self.setup.models.teachers
        network.move(self.setup.device)
        if member.trained_head:
            return Teacher(member, "as given", Progress())
        later = members[members.index(member) + 1 :]
        if any(
            not each.trained_head and _alike(each, member) for each in later
        ):  # which finds this one in its place as well
            return Teacher(member, "fine-tuned", Progress())
        train = self.setup.examples.encoded.train[0]
        self.trainer.fit(fine_tuning(config, member, self.setup.losses.objective, METHODS["finetune"], train, None))
        network.flat.release_gradients()
        return Teacher(member, "fine-tuned", Progress())

    def answer(self, teacher: Network) -> Any:
        with torch.no_grad(), teacher.in_mode(train=False):
            given = teacher(self.trainer.batch([teacher], 1)).given()
        self.kept_answers.append([t.shape[1:] for t in given])
        teacher.move("cpu")
        return SimpleNamespace(arrays=[])


def _alike(one: Member, other: Member) -> bool:
    return one.network.module.config.to_dict() == other.network.module.config.to_dict()


class _Split:
    """As many examples as there are said to be."""

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def only(self, encodings: set[str]) -> _Split:
        return self

    def with_answers(self, answers: list) -> _Split:
        return self


class _Encoded:
    def __init__(self, config: Config):
        self.train, self.quiz, self.validation = [_Split(config.data.train_size)], _Split(config.data.quiz_size), None


def _silent(_: str) -> None:
    pass


def _weight_shapes(network: Network) -> Iterator[torch.Size]:
    return (p.shape for p in network.module.parameters())


def _vector_shapes(network: Network) -> Iterator[torch.Size]:
    """Of what holds a number for each weight, with and without its tables."""
    yield from (network.flat.weights.shape, torch.Size([network.flat.dense]))


def _known(networks: Sequence[Network], state: State, inputs: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """What lives as long as the models do."""
    for network in networks:
        for p in network.module.parameters():
            yield "weights", p
            if p.grad is not None:
                yield "gradients", p.grad
        yield from (("weights", t) for t in [*network.module.buffers(), *network.copies()])
    for learner in state.learners():
        yield from (("optimizer", t) for entries in learner.optimizer.state.values() for t in _tensors(entries))
    if state.meta_step is not None:
        yield from (("snapshots", t) for t in state.meta_step.problem.time_machine.held())
    yield from (("inputs", t) for t in inputs)


def _tensors(tree: Any) -> Iterator[Tensor]:
    yield from (leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor))
