"""What memory a configuration needs, and which one fits: the run in small on fake tensors, and what tensors do not show.

    found = estimate(config, task, student, teachers, torch.device("cuda"))       # blueprints, no weights
    found.tensors, found.reserve, found.total, found.categories

Peaks of tensors agree with what torch's CPU allocator counts in the same steps, mostly to 0.2 %, at worst 5 % too high
(checkpointed layers: autograd adds gradients in place, unless tensors are fake); tests/profiling/test_estimate.py. The reserve is
assumed, item by item, and says so. No figure was measured on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from typing import Any

import torch

from engine.config import Config
from engine.data.labels import Task
from engine.meta.strategies import STRATEGIES
from engine.methods import METHODS
from engine.profiling.blueprints import Blueprint
from engine.profiling.pretend import pretending
from engine.profiling.rehearsal import Rehearsal

MIB = 2**20
CONTEXT = 600 * MIB  # CUDA's own, with the kernels of torch and cuBLAS that are loaded; 400 to 700 by driver and GPU
CUBLAS = 32 * MIB  # what torch gives cuBLAS on a Hopper GPU; 8 elsewhere
PROCESS = 600 * MIB  # Python with torch and transformers, measured on x86 Linux with torch 2.13
FRAGMENTS = 0.05  # of the tensors: what an allocator holds in gaps
RANK = {
    "exact": 0,
    "approximate": 1,
    "biased": 2,
}  # by what a strategy computes; those of the exact meta-gradient first


@dataclass(frozen=True)
class Estimate:
    """Bytes, of the phase that needs most."""

    device: str
    phase: str
    tensors: int  # most that are live at once
    reserve: dict[str, int]  # what tensors do not show, by what it is for; assumed
    categories: dict[str, int]  # of the tensors, at that moment (engine.profiling.ledger)
    section: str  # in which it is
    sections: dict[str, int]  # most live tensors in each section
    phases: dict[str, int]  # most live tensors in each phase
    flops: float  # of a student's step in the run's last phase
    assumptions: list[str]

    @property
    def total(self) -> int:
        return self.tensors + sum(self.reserve.values())


@dataclass(frozen=True)
class Setting:
    """What a search goes over; flags of engine.train by their names."""

    meta_grad: str
    checkpointing: str
    batch_size: int
    micro_batch_size: int | None
    max_length: int
    precision: str
    snapshot_store: str

    @classmethod
    def of(cls, config: Config) -> Setting:
        flat = config.to_flat()
        return cls(**{f.name: flat[f.name] for f in fields(cls)})

    def applied(self, config: Config) -> Config:
        return Config.from_flat(config.to_flat() | asdict(self))

    def changes(self, config: Config) -> dict[str, Any]:
        """Flags that make `config` this."""
        before = config.to_flat()
        return {name: value for name, value in asdict(self).items() if before[name] != value}


@dataclass(frozen=True)
class Found:
    setting: Setting
    estimate: Estimate

    def fits(self, budget: int) -> bool:
        return self.estimate.total <= budget

    def cost(self) -> tuple:
        """Less is better: exact gradients, then operations an example, then fewer parts and no copies to the host."""
        s, e = self.setting, self.estimate
        parts = 1 if s.micro_batch_size is None else math.ceil(s.batch_size / s.micro_batch_size)
        return RANK[STRATEGIES[s.meta_grad].values], e.flops / s.batch_size, parts, s.snapshot_store != "device"


def estimate(
    config: Config, task: Task, student: Blueprint, teachers: Sequence[Blueprint], device: torch.device
) -> Estimate:
    """The peak of a run, on a CPU or on one CUDA GPU, which need not be there. Takes seconds and computes nothing.

    `config` is left as it is. Raises UserError for settings that do not fit, or are not estimated.
    """
    config = Config.from_flat(config.to_flat())
    with pretending(device):
        acts = Rehearsal(config, task, student, teachers, device).run()
        kind = device.type
        most = max(acts, key=lambda act: act.ledger.peak(kind))
        ledger, rounds = most.ledger, config.method.pilot_steps if METHODS[config.method.method].learn_from else 1
        tensors = ledger.peak(kind)
        copy = sum(math.prod(p.shape) * 4 for p in student.build().parameters())
        items, assumptions = _cuda(config, tensors) if kind == "cuda" else _host(tensors, copy)
        return Estimate(
            kind, most.name, tensors, items, ledger.at_peak(kind), ledger.peak_section(kind), ledger.by_section(kind),
            {act.name: act.ledger.peak(kind) for act in acts}, acts[-1].flops / rounds, assumptions,
        )  # fmt: skip


def _cuda(config: Config, tensors: int) -> tuple[dict[str, int], list[str]]:
    found = {"CUDA context": CONTEXT, "cuBLAS workspace": CUBLAS, "allocator": int(FRAGMENTS * tensors)}
    assumptions = [
        f"the CUDA context with its kernels takes {CONTEXT // MIB} MiB (400 to 700, by driver and GPU)",
        f"cuBLAS has a workspace of {CUBLAS // MIB} MiB (8 on GPUs other than Hopper's)",
        f"gaps in torch's allocator take {FRAGMENTS:.0%} of the tensors",
        "fused attention is the memory-efficient kernel, and the engine's native operations are compiled for CUDA",
        "kernels' own workspaces are not counted",
    ]
    if config.run.cuda_graphs != "off":
        assumptions.append(
            "CUDA graphs share one pool, as big as the largest step, and the blocks of their warm-up are given back"
        )
    return found, assumptions


def _host(tensors: int, copy: int) -> tuple[dict[str, int], list[str]]:
    found = {"process": PROCESS, "best weights": copy, "allocator": int(FRAGMENTS * tensors)}
    return found, [
        f"Python with torch and transformers takes {PROCESS // MIB} MiB; data sets are not counted",
        "the student's best weights so far are kept beside the present ones",
        f"gaps in the C library's allocator take {FRAGMENTS:.0%} of the tensors",
        "kernels' own workspaces are not counted",
    ]


def settings(config: Config, **given: Sequence[Any] | None) -> list[Setting]:
    """Every combination of the values given for fields of `Setting`; those of `config` where none are."""
    base = asdict(Setting.of(config))
    values = [given.get(name) or [value] for name, value in base.items()]
    return [Setting(*each) for each in product(*values)]


def search(
    of: Callable[[Setting], Estimate], asked: Sequence[Setting], budget: int | None, wider: Iterable[list[Setting]] = ()
) -> list[Found]:  # fmt: skip
    """The asked settings with their estimates; where there is a budget that none fits, group by group also `wider` ones, up
    to the first group in which one does."""
    found = [Found(each, of(each)) for each in asked]
    for group in wider if budget is not None else ():
        if any(each.fits(budget) for each in found):
            break
        known = {each.setting for each in found}
        found += [Found(each, of(each)) for each in dict.fromkeys(group) if each not in known]
    return found


def cheapest(found: Sequence[Found], budget: int) -> Found | None:
    """Of those that fit."""
    return min((each for each in found if each.fits(budget)), key=Found.cost, default=None)


def wider(config: Config, device: torch.device, given: dict[str, Sequence[Any]]) -> Iterator[list[Setting]]:
    """What saves memory at the cost of time, and then of precision, in groups. What is `given` stays."""
    learning, batch = METHODS[config.method.method].learn_from, max(given.get("batch_size", [config.optim.batch_size]))
    layers = {None: ["none"], "weights": ["none", "student"]}.get(learning, ["none", "student", "teachers", "both"])
    ends, parts = [layers[0], layers[-1]], [math.ceil(batch / n) for n in (2, 4, 8, 16) if n <= batch]
    stores = ["device", "pinned"] if device.type == "cuda" and learning else ["device"]
    groups: list[dict[str, Sequence[Any]]] = [
        {"checkpointing": layers},
        *({"checkpointing": ends, "micro_batch_size": [part]} for part in parts),
        {"checkpointing": ends, "micro_batch_size": parts[-1:], "snapshot_store": stores},
        {"checkpointing": ends, "micro_batch_size": [None, *parts], "snapshot_store": stores, "precision": ["bf16"]},
    ]
    for group in groups:
        yield settings(config, **(group | given))
