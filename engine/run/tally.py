"""What step functions return, summed on the device and read at logging steps alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from engine.models.learner import Learner


@dataclass
class Tally:
    """Means of n values over rounds."""

    names: list[str] = field(default_factory=list)
    sums: Tensor | None = None  # [2, n] since the last reading: sums of the finite values, and how many they are
    bad: Tensor | None = None  # []: rounds, one after the other up to now, in which a value was not finite
    rounds: int = 0  # in all

    def add(self, values: dict[str, Tensor]) -> None:
        """A round's values, which stay on the device."""
        now = torch.stack(list(values.values()))
        finite = now.isfinite()
        if self.sums is None:
            self.names, self.sums = list(values), now.new_zeros(2, len(now))
        if self.bad is None:
            self.bad = now.new_zeros(())
        self.sums += torch.stack([torch.where(finite, now, 0), finite.to(now.dtype)])
        self.bad = torch.where(finite.all(), 0, self.bad + 1)
        self.rounds += 1

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON of what was not read yet, for a checkpoint: the next means are of all rounds since the last reading."""
        found = {"sums": self.sums, "bad": self.bad}
        return {n: t for n, t in found.items() if t is not None}, {"names": self.names, "rounds": self.rounds}

    @classmethod
    def restored(cls, tensors: dict[str, Tensor], state: dict[str, Any], device: torch.device) -> Tally:
        return cls(**state, **{name: t.to(device) for name, t in tensors.items()})

    def read(self, learners: Sequence[Learner]) -> tuple[dict[str, float], int, int]:
        """Means of the finite values since the last reading, with them the share of each watched gradient that was below its
        optimizer's eps; the rounds that are `bad`; and how many updates the learners left out since then. The one synchronisation
        of a logging step."""
        skipped = [learner.skipped for learner in learners if learner.skipped is not None]
        watched = {learner.network.name: learner.below_eps for learner in learners if learner.below_eps is not None}
        given = [*self.sums, *watched.values(), torch.stack([self.bad, *skipped])]
        found = torch.cat([t.double() for t in given]).tolist()  # sync: logging step
        n, w = len(self.names), 2 * len(self.names)
        means = {name: s / k for name, s, k in zip(self.names, found[:n], found[n:w], strict=True) if k}
        for name in watched:
            reached, below = found[w : w + 2]
            means |= {f"below_eps/{name}": below / reached} if reached else {}
            w += 2
        self.sums = None
        for count in (*skipped, *watched.values()):
            count.zero_()
        return means, int(found[w]), int(sum(found[w + 1 :]))
