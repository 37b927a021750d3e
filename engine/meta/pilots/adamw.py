"""AdamW from the moments of the student's own optimizer, as in MetaDistil's Figure 2.

m' = b1 m + (1 - b1) g,  s' = b2 s + (1 - b2) g^2,  r = sqrt(s'/c2) + eps,  c1 = 1 - b1^t,  c2 = 1 - b2^t
phi'  = (1 - eta w) phi - eta m' / (c1 r)                                          (w the weight decay)
v_m'  = v_m - eta v' / (c1 r)
v_s'  = v_s + eta v' m' / (2 c1 r^2 sqrt(c2 s'))
d     = (1 - b1) v_m' + 2 (1 - b2) g v_s'
v_phi = (1 - eta w) v' + H d,  v_m = b1 v_m',  v_s = b2 v_s'
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.meta.pilots import PilotRule
from engine.meta.time_machine import TimeMachine
from engine.models.learner import Learner
from engine.models.network import Network
from engine.params.flat import FlatParameters
from engine.params.optim import FlatAdamW
from engine.params.vectors import Rows, Vector

KNOWN = ("AdamW", "Adam", "FlatAdamW", "FusedAdam")  # whose state is exp_avg, exp_avg_sq, step


class AdamW:
    """AdamW as the student's optimizer would step, without clipping; every row of every table moves."""

    def __init__(self, lr: float, flat: FlatParameters, optimizer: torch.optim.Optimizer):
        kind = type(optimizer).__name__
        theirs = type(optimizer).__module__.startswith(("torch.optim", "engine.", "apex."))
        plain = all(g.get("bias_correction", True) for g in optimizer.param_groups) and getattr(
            optimizer, "adam_w_mode", 1
        )
        if kind not in KNOWN or not theirs or not plain:
            raise ValueError(
                f"an adamw pilot steps with the student's own optimizer, and the derivative of {kind}'s update is not "
                f"known here ({', '.join(KNOWN)} are); use --pilot-optimizer sgd (pilot_optimizer='sgd').")  # fmt: skip
        self.lr, self.flat, self.optimizer = lr, flat, optimizer
        self._settings: list[tuple] | None = None
        self._gathered: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def begin(self) -> None:
        self._settle()
        *moments, count = self._state()
        self._moments, self._count, self._kept = tuple(moments), count, []
        self._cotangents: tuple[Tensor, Tensor] | None = None

    def _settle(self) -> None:
        """betas, eps and the weight decay of every weight [N], found out again only where the optimizer's settings changed."""
        settings = [
            (*g["betas"], g["eps"], g.get("weight_decay"), g.get("amsgrad"), g.get("maximize"), len(g["params"]))
            for g in self.optimizer.param_groups
        ]
        if settings == self._settings:
            return
        groups = self._groups()
        self.decay = torch.zeros_like(self.flat.weights)
        views = self.flat.views(self.decay)
        for name, p in self.flat.parameters.items():
            group = groups[id(p)]
            self.betas, self.eps = group["betas"], group["eps"]
            views[name].fill_(group.get("weight_decay", 0.0))
        self._settings = settings

    def _state(self) -> tuple[Tensor, Tensor, Tensor]:
        """The optimizer's moments [N], [N], to be read only, and its step count [] float64; nothing waits for the device."""
        flat, optimizer = self.flat, self.optimizer
        if isinstance(optimizer, FlatAdamW) and optimizer.flat is flat:
            m, s, count = optimizer.moments()
            return m, s, count.double()
        if self._gathered is None:
            self._gathered = torch.zeros_like(flat.weights), torch.zeros_like(flat.weights)
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        counts, targets, sources = {}, [], []
        m_views, s_views = (flat.views(moment) for moment in self._gathered)
        for name, p in flat.parameters.items():
            state = optimizer.state.get(p, {})
            if "exp_avg" in state:
                targets += [m_views[name], s_views[name]]
                sources += [state["exp_avg"], state["exp_avg_sq"]]
                count = state.get("step", groups[id(p)].get("step", 0))  # apex counts in the group
                counts[id(count)] = count
            else:
                m_views[name].zero_()
                s_views[name].zero_()
        if targets:
            torch._foreach_copy_(targets, sources)
        numbers = [count for count in counts.values() if not isinstance(count, Tensor)]
        found = torch.full((), float(max(numbers, default=0)), dtype=torch.float64, device=flat.weights.device)
        scalars = [count.reshape(()) for count in counts.values() if isinstance(count, Tensor)]
        if scalars:
            found = torch.maximum(found, torch.stack(scalars).max().to(found))
        return *self._gathered, found

    def _groups(self) -> dict[int, dict]:
        """The settings of every weight, by its id; ValueError for a rule that is not the one differentiated here."""
        groups = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        left_out = [name for name, p in self.flat.parameters.items() if id(p) not in groups]
        used = [groups[id(p)] for name, p in self.flat.parameters.items() if name not in left_out]
        adam = type(self.optimizer).__name__ == "Adam"
        reasons = {
            f"does not step {', '.join(left_out[:3])}": left_out,
            "has other betas or eps for other weights": len({(*g["betas"], g["eps"]) for g in used}) > 1,
            "has amsgrad or maximize set": any(g.get("amsgrad") or g.get("maximize") for g in used),
            "has a weight decay that is not decoupled": adam and any(g.get("weight_decay") for g in used),
        }
        for reason, applies in reasons.items():
            if applies:
                raise ValueError(
                    f"an adamw pilot steps with the student's own optimizer, and this one {reason}; use AdamW as it is by "
                    "default, over every trained weight, or --pilot-optimizer sgd (pilot_optimizer='sgd').")  # fmt: skip
        return groups

    @torch.no_grad()
    def advance(self, step: int, gradient: Vector, time_machine: TimeMachine) -> None:
        (b1, b2), g = self.betas, self._whole(gradient)
        m = torch.lerp(g, self._moments[0], b1)
        s = (b2 * self._moments[1]).addcmul_(g, g, value=1 - b2)
        c1, c2 = self._corrections(step)
        r = (s / c2).sqrt_().add_(self.eps)
        move = (m / (c1 * r)).addcmul_(self.decay, self.flat.weights)
        self._moments = m, s
        self._kept.append((g, m, s, c1, c2))
        time_machine.advance(self._vector(move), -self.lr, step)

    @torch.no_grad()
    def pull_back(self, step: int, v: Vector) -> tuple[Vector, Vector]:
        (b1, b2), (g, m, s, c1, c2) = self.betas, self._kept.pop()
        v = self._whole(v)
        v_m, v_s = self._cotangents or (torch.zeros_like(v), torch.zeros_like(v))
        r = (s / c2).sqrt_().add_(self.eps)
        v_m = v_m - self.lr * v / (c1 * r)
        root = (c2 * s).sqrt()
        curve = self.lr * v * m / (2 * c1 * r.square() * root)
        v_s = v_s + torch.where(root > 0, curve, 0)  # g = 0 and s = 0: what it is multiplied with is 0
        self._cotangents = b1 * v_m, b2 * v_s
        if not self._kept:  # the first step: what the round needed may be had by others
            self._moments = self._cotangents = None
        direction = (1 - b1) * v_m + 2 * (1 - b2) * g * v_s
        return self._vector(direction), self._vector(v * (1 - self.lr * self.decay))

    def update(self, step: int, weights: dict[str, Tensor], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        (b1, b2), flat = self.betas, self.flat
        if step == 0:
            self._named = flat.views(self._moments[0]), flat.views(self._moments[1])
        decay, moved, ms, ss = flat.views(self.decay), {}, {}, {}
        c1, c2 = self._corrections(step)
        for name, p in weights.items():
            g = gradients[name]
            ms[name] = m = b1 * self._named[0][name] + (1 - b1) * g
            ss[name] = s = b2 * self._named[1][name] + (1 - b2) * g.square()
            positive = s > 0  # the root's slope at 0 is infinite; there m is 0 and stays it
            root = torch.where(positive, torch.where(positive, s / c2, 1).sqrt(), 0)
            moved[name] = (1 - self.lr * decay[name]) * p - self.lr * m / (c1 * (root + self.eps))
        self._named = ms, ss
        return moved

    def _corrections(self, step: int) -> tuple[Tensor, Tensor]:
        """c1, c2 of a pilot step, [] float64: the count stays on the device, where a CUDA graph finds the present one."""
        t = self._count + (step + 1)
        return 1 - self.betas[0] ** t, 1 - self.betas[1] ** t

    def _whole(self, vector: Vector) -> Tensor:
        """[N]"""
        if not self.flat.tables:
            return vector.dense
        flat = torch.zeros_like(self.flat.weights)
        flat[: self.flat.dense] = vector.dense
        views = self.flat.views(flat, [t.name for t in self.flat.tables])
        for table, part in zip(self.flat.tables, vector.tables, strict=True):
            if isinstance(part, Rows):
                views[table.name].index_copy_(0, part.rows, part.values)
            else:
                views[table.name].copy_(part)
        return flat

    def _vector(self, flat: Tensor) -> Vector:
        views = self.flat.views(flat, [t.name for t in self.flat.tables]) if self.flat.tables else {}
        return Vector(flat[: self.flat.dense], [views[t.name] for t in self.flat.tables])


def of_learner(lr: float, student: Network, learner: Learner | None) -> AdamW:
    """The pilot that steps with the learner's optimizer. Raises ValueError where there is none."""
    if learner is None:
        raise ValueError("an adamw pilot steps with the student's own optimizer; give student_optimizer.")
    return AdamW(lr, student.flat, learner.optimizer)


PILOT = PilotRule(make=of_learner, help="AdamW from the moments of the student's own optimizer")
