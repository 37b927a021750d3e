"""A phase of training: what it trains on which batches, how long, and how far it has come."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from engine.data.encoded import EncodedSplit
from engine.methods import Method, State
from engine.models.network import Network
from engine.telemetry.telemetry import Costs


@dataclass(frozen=True)
class Plan:
    """How long a phase is. `max_steps`, where given, overrides `epochs` in both directions."""

    batches: int  # an epoch
    epochs: int
    max_steps: int | None = None
    round_size: int = 1  # batches a step function takes at once: the pilot steps

    @property
    def steps(self) -> int:
        """Optimizer steps of the student."""
        return self.max_steps or self.batches * self.epochs

    @property
    def rounds(self) -> int:
        """Calls of the step function, which are the optimizer steps of teachers that learn. A round ends with its epoch."""
        epochs, rest = divmod(self.steps, self.batches)
        return epochs * -(-self.batches // self.round_size) + -(-rest // self.round_size)


@dataclass
class Phase:
    """One stretch of training: preparing a teacher, warming up the student, distilling it."""

    name: str
    method: Method
    state: State
    train: EncodedSplit
    validation: EncodedSplit | None  # None: nothing is chosen by it, the last weights stay
    plan: Plan
    batch_size: int
    seed: int

    def learning_teachers(self) -> list[Network]:
        return [] if self.state.meta_step is None else list(self.state.meta_step.problem.teachers)


@dataclass
class Progress:
    """Where a phase stands: all of a checkpoint that is not a tensor."""

    step: int = 0
    examples: int = 0
    seconds: float = 0.0  # of training, without validations and checkpoints
    skipped: int = 0  # updates that were left out because their gradient was not finite
    best_step: int = 0
    best: dict[str, float] = field(default_factory=dict)  # validation metrics at best_step
    costs: Costs = field(default_factory=Costs)

    @classmethod
    def of(cls, saved: dict[str, Any]) -> Progress:
        """From what `asdict` made of one."""
        return cls(**saved | {"costs": Costs(**saved.get("costs", {}))})

    def examples_per_second(self) -> float:
        return self.examples / self.seconds if self.seconds else 0.0

    def crossed(self, every: int, taken: int) -> bool:
        """Whether the last `taken` steps reached a multiple of `every`."""
        return self.step // every > (self.step - taken) // every
