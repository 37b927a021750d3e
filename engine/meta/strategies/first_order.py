"""First order: the walk back with all of the student's weights but those of its last layer held constant in the teachers.

Only what the pilot step does to the logits' own layer is differentiated. Neither the quiz loss nor the forward-mode pass then
goes through the encoder. The cheapest; biased.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from engine.batch import Batch
from engine.errors import UserError
from engine.meta.forward_mode import forward_mode
from engine.meta.problem import Meta, Problem
from engine.meta.strategies import Strategy
from engine.meta.walk_back import walk_back
from engine.models.network import Network, Outputs


def first_order(problem: Problem, pilots: Sequence[Batch], quizzes: Sequence[Batch]) -> Meta:
    """Exact in the student's last layer, blind to all others."""
    return walk_back(forward_mode, problem, pilots, quizzes, taped=True, only=last_layer)


def last_layer(student: Network, outputs: Outputs) -> list[str]:
    """Names of the trained weights of the layer that gives the logits: the last `nn.Linear` of C outputs.

    Raises UserError where the student has none.
    """
    classes = outputs.logits.shape[-1]
    found = [n for n, m in student.module.named_modules() if isinstance(m, nn.Linear) and m.out_features == classes]
    names = [n for n in student.flat.parameters if found and n.rpartition(".")[0] == found[-1]]
    if not names:
        raise UserError(
            f"first_order needs a last layer that is a trained nn.Linear of {classes} outputs; the student ({student.name}) "
            "has none. Use --meta-grad exact (strategy= in Python).")  # fmt: skip
    return names


STRATEGY = Strategy(gradient=first_order, help="through the student's last layer only, biased", values="biased")
