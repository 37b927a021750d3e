"""Which domains the student and each teacher learn from (Meta-KD's settings: one domain, mixed, scarce, held out)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

import numpy as np
from datasets import Dataset

from engine.config import Config
from engine.data.splits import Splits, Task
from engine.errors import UserError
from engine.methods import METHODS
from engine.models.load import ModelSource


@dataclass(frozen=True)
class DomainPlan:
    """Domains by number, in the order of `Task.domains`; None stands for all of them."""

    names: tuple[str, ...]
    target: int | None  # the student's
    teachers: str  # --teacher-domains
    fraction: float

    def scarce(self, splits: Splits) -> Splits:
        """`splits` with only a part of the target's training examples, in proportion to the classes and one of each at
        least; the examples of a smaller part are among those of a larger one."""
        if self.fraction == 1:
            return splits
        return replace(splits, train=[_part(train, self.target, self.fraction) for train in splits.train])

    @property
    def everything(self) -> frozenset[int]:
        return frozenset(range(len(self.names)))

    @property
    def student(self) -> frozenset[int]:
        """The domains that the student learns from and is measured on."""
        return self.everything if self.target is None else frozenset([self.target])

    def of_teacher(self, source: ModelSource) -> frozenset[int]:
        """The domains that the teacher of `source` learns from and is chosen on."""
        if source.domain is not None:
            return frozenset([source.domain])
        chosen = {"all": self.everything, "target": self.student, "others": self.everything - self.student}
        return chosen[self.teachers]

    def only(self, splits: Splits, domains: frozenset[int]) -> Splits:
        """The examples of these domains. Raises UserError where a split has none."""
        return splits if domains == self.everything else _only(splits, domains)

    def sources(self, teachers: list[ModelSource]) -> list[ModelSource]:
        """With --teacher-domains each, every teacher once a domain, named after it."""
        if self.teachers != "each":
            return teachers
        plain = [_plain(name) for name in self.names]
        plain = [name if plain.count(name) == 1 else f"{name}-{k}" for k, name in enumerate(plain)]
        return [
            replace(source, name=f"{source.name}-{name}", domain=k)
            for source in teachers
            for k, name in enumerate(plain)
        ]


def plan(config: Config, task: Task) -> DomainPlan:
    """The plan of a run's settings; raises UserError where they do not fit each other or the data."""
    data = config.data
    if data.domain_column is None:
        _refuse_without_domains(config)
        return DomainPlan((), None, "all", 1.0)
    names, target = task.domains, None
    if data.target_domain != "all":
        if data.target_domain not in names:
            raise UserError(f"--target-domain is {data.target_domain!r}; the training data has the domains {', '.join(names)}; "
                            "give one of them, or all.")  # fmt: skip
        target = names.index(data.target_domain)
    elif data.target_fraction < 1:
        raise UserError(
            f"--target-fraction {data.target_fraction} takes a part of one domain; name that domain with --target-domain."
        )
    elif data.teacher_domains == "others":
        raise UserError(
            "--teacher-domains others leaves out the student's domain; name that domain with --target-domain."
        )
    _refuse_several(config, task, target)
    return DomainPlan(names, target, data.teacher_domains, data.target_fraction)


def _refuse_without_domains(config: Config) -> None:
    data, method = config.data, config.method
    wanted = {
        f"--target-domain {data.target_domain}": data.target_domain != "all",
        f"--target-fraction {data.target_fraction}": data.target_fraction < 1,
        f"--teacher-domains {data.teacher_domains}": data.teacher_domains != "all",
        f"--method {method.method}": METHODS[method.method].meta_teachers,
        f"--prepare-method {method.prepare_method}": method.prepare_method in ("multitask", "meta"),
    }
    for what, given in wanted.items():
        if given:
            raise UserError(f"{what} needs to know the domain of each example; name the column of the domains "
                            "with --domain-column.")  # fmt: skip


def _refuse_several(config: Config, task: Task, target: int | None) -> None:
    """What needs several domains and classes."""
    data, method = config.data, config.method
    meta_teachers = METHODS[method.method].meta_teachers
    if meta_teachers and method.prepare_method != "meta":
        raise UserError(f"--method {method.method} learns from meta-teachers, and --prepare-method {method.prepare_method} makes none; "
                        "leave it out, or use --method kd.")  # fmt: skip
    prepare = f"--prepare-method {method.prepare_method}" if not meta_teachers else f"--method {method.method}"
    if method.prepare_method == "finetune":
        if len(task.domains) < 2 and data.teacher_domains in ("others", "each"):
            raise UserError(f"--teacher-domains {data.teacher_domains} needs several domains, and --domain-column "
                            f"{data.domain_column} has only {task.domains[0]!r}; leave it out.")  # fmt: skip
        return
    if task.kind == "regression":
        raise UserError(f"{prepare} compares the classes of several domains, and this is a regression; use --method kd with "
                        "--prepare-method finetune.")  # fmt: skip
    left = len(task.domains) - (data.teacher_domains == "others")
    if left < 2 or data.teacher_domains == "each" or (data.teacher_domains == "target" and target is not None):
        given = f" of --teacher-domains {data.teacher_domains}" if len(task.domains) > 1 else ""
        instead = "--method kd" if meta_teachers else "--prepare-method finetune"
        raise UserError(f"{prepare} learns from several domains, and a teacher{given} has only one; give data with more, "
                        f"--teacher-domains all, or {instead}.")  # fmt: skip
    if method.prepare_method == "multitask" and data.teacher_domains == "others":
        raise UserError(
            "--prepare-method multitask has no head for a domain that it never saw; use --teacher-domains all."
        )


def _only(splits: Splits, domains: frozenset[int]) -> Splits:
    def pick(dataset: Dataset) -> Dataset:
        return dataset.select(np.flatnonzero(np.isin(dataset["domain"][:], list(domains))))

    parts = {name: pick(getattr(splits, name)) for name in ("quiz", "validation", "test")}
    train = [pick(train) for train in splits.train]
    for name, part in [*(("training", part) for part in train), *parts.items()]:
        if not len(part):
            shown = ", ".join(splits.task.domains[k] for k in sorted(domains))
            raise UserError(f"The {name} set has no example of the domain {shown}; give more rows of it.")
    return replace(splits, train=train, **parts)


def _plain(name: str) -> str:
    """Fit for a file."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)


def _part(train: Dataset, target: int, fraction: float) -> Dataset:
    """The rows are in random order already, so that the first ones of each class are a random part."""
    domains, labels = np.array(train["domain"][:]), np.array(train["label"][:])
    if labels.dtype.kind == "f":
        labels = np.zeros(len(labels))  # a regression
    keep = domains != target
    for label in np.unique(labels):
        rows = np.flatnonzero((domains == target) & (labels == label))
        keep[rows[: math.ceil(round(fraction * len(rows), 6))]] = True  # 0.07 * 100 is a little more than 7
    return train.select(np.flatnonzero(keep))
