"""How much each teacher's logits count in their mean: given, or learned."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class TeacherWeights(nn.Module):
    """w = softmax(log w) over K teachers; `learned` weights are a parameter, given ones are constants."""

    def __init__(self, weights: Sequence[float], learned: bool):
        super().__init__()
        self.learned = learned
        log = torch.tensor(weights, dtype=torch.float64).log()
        if learned:
            self.log = nn.Parameter(log)
        else:
            self.register_buffer("log", log)

    def forward(self) -> Tensor:
        """[K], positive, of sum 1"""
        return torch.softmax(self.log, 0)

    @classmethod
    def of(cls, given: Sequence[float] | str | None, teachers: int, like: Tensor) -> TeacherWeights | None:
        """From "learned", K positive numbers (normalised to sum 1), or None; dtype and device are those of `like`.

        Raises ValueError for anything else.
        """
        if given is None:
            return None
        learned = given == "learned"
        if not learned:
            numbers = [] if isinstance(given, str) else [float(w) for w in given]
            if len(numbers) != teachers or not all(w > 0 and w < float("inf") for w in numbers):
                raise ValueError(
                    f"teacher weights are {given!r}; give {teachers} positive numbers, one a teacher, or 'learned'."
                )
        values = [1 / teachers] * teachers if learned else [w / sum(numbers) for w in numbers]
        return cls(values, learned).to(like)
