"""ReptileDistil's update of the teachers, first order and without a quiz, as a strategy of the meta-step.

    phi_fast  = phi - eta (g / (|g| + eps) + w phi),  g the clipped gradient of the distillation loss    (engine.meta.first_adamw)
    theta_k.grad += theta_k - phi_fast    weight by weight of the layer map (engine.losses.layer_map), the mean where two are mapped

The step is the first one of a new AdamW at a constant rate; the teachers are frozen while it is made. The rate follows no
schedule: a warm-up would begin at zero. Source: Ma et al., "Reptile for knowledge distillation", COLING 2022.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from engine.batch import Batch
from engine.meta.first_adamw import first_adamw
from engine.meta.passes import pilot_pass
from engine.meta.problem import Meta, Problem
from engine.models.network import Network
from engine.params.flat import Lookups
from engine.sections import section


class Reptile:
    """A strategy (engine.meta.strategies) over batches alone, one a round.

    `sources` holds, teacher by teacher, the names of the student's weights for each weight that the teacher trains: those
    of `LayerMap.sources`. What the map leaves out is to be frozen (`freeze_unmapped`): an optimizer would let it decay.
    """

    keeps_graph, quizzed, pilot = True, False, staticmethod(first_adamw)

    def __init__(self, sources: Sequence[Mapping[str, Sequence[str]]]):
        self.sources = list(sources)

    def check(self, problem: Problem) -> None:
        """Raises ValueError where the map is not that of these teachers' trained weights."""
        if len(self.sources) != len(problem.teachers):
            raise ValueError(f"got maps for {len(self.sources)} teachers, and {len(problem.teachers)} teachers.")
        for teacher, sources in zip(problem.teachers, self.sources, strict=True):
            left = [name for name in teacher.flat.parameters if name not in sources]
            if left:
                raise ValueError(f"{', '.join(left[:3])} of the {teacher.name} is trained, but in no map; freeze it "
                                 "(engine.losses.layer_map.freeze_unmapped).")  # fmt: skip

    def __call__(self, problem: Problem, batches: Sequence[Batch], quizzes: Sequence[Batch] = ()) -> Meta:
        """The student is left as it was, the differences in the teachers' `.grad`."""
        if len(batches) != 1:
            raise ValueError(f"ReptileDistil takes one batch a round; got {len(batches)}.")
        parts, pieces, gradient = problem.parts(batches[0]), [], None
        with problem.time_machine.excursion():
            problem.pilot.begin()
            for part in parts:
                piece, g = pilot_pass(problem, part, single=len(parts) == 1, frozen=True)
                gradient = g if gradient is None else gradient.plus(g)
                pieces.append(piece)
            with section("pilot"):
                problem.pilot.advance(0, gradient, problem.time_machine)
            for teacher, sources in zip(problem.teachers, self.sources, strict=True):
                _pull(problem.student, teacher, sources)
        loss = torch.stack([piece.loss for piece in pieces]).sum()
        return Meta(loss, None, [[piece.before.random for piece in pieces]], pieces[0].kept)


@section("teacher update")
@torch.no_grad()
def _pull(student: Network, teacher: Network, sources: Mapping[str, Sequence[str]]) -> None:
    """Add theta - phi to the teacher's gradients. Here phi is the student's weights as they now stand."""
    phi = dict(student.module.named_parameters())
    wanted = {n: [phi[source] for source in sources[n]] for n in teacher.flat.parameters}
    means = [several[0] if len(several) == 1 else torch.stack(several).mean(0) for several in wanted.values()]
    differences = torch._foreach_sub([teacher.flat.parameters[n] for n in wanted], means)
    teacher.flat.add(dict(zip(wanted, differences, strict=True)), Lookups(), [])
