"""The time machine beside copies as people make them: weights kept and brought back, bit for bit, in GB/s.

    snapshot    keep every weight, bring it back: each is read and written twice, 4 x 4 bytes a weight
    pilot       keep every weight, add a step, bring it back: weights and step read, weights and snapshot written, then snapshot
                read and weights written, 6 x 4 bytes a weight. Who needs more passes is slower by them

    time machine            engine.meta.time_machine over one flat buffer
    time machine, pinned    the same, snapshots in pinned host memory; on CUDA
    time machine, rows      the same, embeddings by the rows that 32 sentences of 128 tokens look up; on a CPU, in a pilot
    one buffer              a plain copy of one flat buffer, and back: what memory gives
    foreach                 torch._foreach_copy_ of all weights into tensors made once, and back
    deepcopy                copy.deepcopy(module.state_dict()), then load_state_dict

DistilBERT's size, random weights. On CUDA also what snapshots in pinned memory add to a whole meta-step. Every way is
compared bit for bit before it is timed.

    pytest bench/bench_time_machine.py --benchmark-json time-machine.json
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bench.devices import Host
from bench.replay import Group, Run, interleaved
from bench.step_cases import SIZES, Case, NotCaptured, Setting, Size, engine_step, graph_step, model
from bench.step_truth import WrongError, deterministic
from engine.meta.time_machine import TimeMachine
from engine.params.flat import FlatParameters
from engine.params.vectors import Rows, Vector

CUDA = torch.cuda.is_available()
BUDGET = 3.0  # seconds of timing, all implementations together
SCALE = -0.3
PASSES = {"snapshot": 4, "pilot": 6}  # bytes moved, over the bytes of the weights
LOOKED_UP = 32 * 128
WAYS = ["time machine", "one buffer", "foreach", "deepcopy"]
STORES = ["device", "pinned"]


class Machine:
    """engine.meta.time_machine."""

    def __init__(self, module: nn.Module, store: str = "device", by_rows: bool = False):
        self.module, self.flat = module, FlatParameters(module, 2048 if by_rows else None)
        self.machine, self.step = TimeMachine(self.flat, store), self._step()
        self.moved = sum(t.numel() for t in self._values()) if by_rows else self.flat.weights.numel()

    def _step(self) -> Vector:
        flat = self.flat
        generator = torch.Generator(flat.weights.device).manual_seed(1)
        whole = torch.randn(flat.weights.shape, generator=generator, device=flat.weights.device)
        tables = []
        for table in flat.tables:
            rows = torch.arange(0, len(table.weight), max(1, len(table.weight) // LOOKED_UP), device=whole.device)
            tables.append(Rows(rows, flat.views(whole, [table.name])[table.name][rows]))
        return Vector(whole[: flat.dense], tables)

    def _values(self) -> list[Tensor]:
        return [self.step.dense, *(t.values for t in self.step.tables)]

    def keep(self) -> None:
        self.machine.snapshot()

    def keep_and_move(self) -> None:
        self.machine.advance(self.step, SCALE)

    def back(self) -> None:
        self.machine.rewind()


class OneBuffer(Machine):
    def __init__(self, module: nn.Module):
        super().__init__(module)
        self.kept = torch.empty_like(self.flat.weights)

    def keep(self) -> None:
        self.kept.copy_(self.flat.weights)

    def keep_and_move(self) -> None:
        self.keep()
        self.flat.weights.add_(self.step.dense, alpha=SCALE)

    def back(self) -> None:
        self.flat.weights.copy_(self.kept)


class Foreach:
    """Of a module that is not flattened."""

    def __init__(self, module: nn.Module):
        self.module, self.weights = module, [p.data for p in module.parameters()]
        self.kept = [torch.empty_like(p) for p in self.weights]
        generator = torch.Generator(self.weights[0].device).manual_seed(1)
        self.step = [torch.randn(p.shape, generator=generator, device=p.device) for p in self.weights]
        self.moved = sum(p.numel() for p in self.weights)

    def keep(self) -> None:
        torch._foreach_copy_(self.kept, self.weights)

    def keep_and_move(self) -> None:
        self.keep()
        torch._foreach_add_(self.weights, self.step, alpha=SCALE)

    def back(self) -> None:
        torch._foreach_copy_(self.weights, self.kept)


class DeepCopy(Foreach):
    def keep(self) -> None:
        self.kept = copy.deepcopy(self.module.state_dict())

    def back(self) -> None:
        self.module.load_state_dict(self.kept)


def implementations(device: Host, name: str, module: nn.Module) -> dict[str, Machine | Foreach]:
    """Each over a copy of the module."""
    makers = {"time machine": Machine, "one buffer": OneBuffer, "foreach": Foreach, "deepcopy": DeepCopy}
    if device.name == "cuda":
        makers["time machine, pinned"] = lambda m: Machine(m, store="pinned")
    elif name == "pilot":
        makers["time machine, rows"] = lambda m: Machine(m, by_rows=True)
    return {n: make(copy.deepcopy(module)) for n, make in makers.items()}


def validate(name: str, found: Machine | Foreach) -> None:
    """A pilot step moves the weights along the step, and going back restores every bit, also of what somebody else wrote.

    Raises WrongError.
    """
    weights = dict(found.module.named_parameters())
    before = {n: p.detach().clone() for n, p in weights.items()}
    for _ in range(2):  # the storage is used again
        if name == "snapshot":
            found.keep()
            with torch.no_grad():
                torch._foreach_add_([p.data for p in weights.values()], 1.0)  # as an optimizer would
        else:
            found.keep_and_move()
            step = found.step if isinstance(found.step, list) else _by_name(found)
            for (n, p), s in zip(weights.items(), step, strict=True):
                # one rounding of the product and one of the sum, or both at once
                if not torch.allclose(p.data, before[n] + SCALE * s, rtol=1e-6, atol=1e-6):
                    raise WrongError(f"{type(found).__name__}, {name}: {n} did not move along the step.")
        if any(torch.equal(p, before[n]) for n, p in weights.items()):
            raise WrongError(f"{type(found).__name__}, {name}: there was nothing to bring back.")
        found.back()
        if wrong := [n for n, p in weights.items() if not torch.equal(p, before[n])]:
            raise WrongError(f"{type(found).__name__}, {name}: {', '.join(wrong[:3])} did not come back bit for bit.")


def _by_name(found: Machine) -> list[Tensor]:
    """The step in the order of the module's parameters."""
    flat, step = found.flat, found.step
    views = flat.views(step.dense, flat.dense_names)
    views |= {t.name: part.dense(t.weight) for t, part in zip(flat.tables, step.tables, strict=True)}
    return [views[n] for n, _ in found.module.named_parameters()]


def groups(small: bool, full: bool) -> dict[str, tuple[tuple[str, Size | Setting], list[str]]]:
    size, where = SIZES["miniature distilbert" if small else "base"], torch.device("cuda" if CUDA else "cpu")
    ways = {name: [*WAYS, *(["time machine, pinned"] if CUDA else [])] for name in PASSES}
    if not CUDA:
        ways["pilot"].append("time machine, rows")
    found = {name: ((name, size), rows) for name, rows in ways.items()}
    if CUDA:  # on a CPU both stores are plain memory
        steps = [Setting(Case("metadistil", 32, 128, 1, precision), size, where) for precision in ("fp32", "bf16")]
        rows = [f"{store}{how}" for store in STORES for how in ("", ", graph")]
        found |= {f"meta-step-{each.case.precision}": (("meta-step", each), rows) for each in steps}
    return found


def test_time_machine(play):
    play()


def measured(given: tuple[str, Size | Setting], device: Host, budget: float | None) -> Group:
    """A pass over all weights of a student's size, or whole meta-steps of a setting."""
    name, what = given
    if name == "meta-step":
        return meta_steps(what, device, budget)
    return copies(name, model(what, what.student_layers, student=True).to(device.device), device, budget)


def copies(name: str, module: nn.Module, device: Host, budget: float | None) -> Group:
    """The ways of a pass. Raises WrongError before timing."""
    found = implementations(device, name, module)
    for each in found.values():
        validate(name, each)
    keep = {n: each.keep if name == "snapshot" else each.keep_and_move for n, each in found.items()}

    def there_and_back(n: str):
        keep[n]()
        found[n].back()

    rounds = interleaved(device, {n: Run(lambda n=n: there_and_back(n)) for n in found}, budget)
    common = {"device": device.name, "pass": name, "weights": sum(p.numel() for p in module.parameters())}
    if rounds:
        common["copy_rate"] = device.rate
    return Group({n: common | {"bytes": PASSES[name] * 4 * each.moved} for n, each in found.items()}, rounds)


def meta_steps(
    setting: Setting, device: Host, budget: float | None, stores: Sequence[str] = STORES, capture=None
) -> Group:
    """Whole meta-steps by store, eager and as a graph. Raises WrongError before timing."""
    same_weights(setting, stores)
    gc.collect()
    runs, failed = {}, {}
    for store in stores:
        runs[store] = Run(engine_step(setting, store=store)[1])
        try:
            runs[f"{store}, graph"] = Run(graph_step(setting, capture, store=store)[1])
        except NotCaptured as error:
            failed[f"{store}, graph"] = str(error)
    case = setting.case
    common = {
        "device": device.name, "pass": "meta-step", "batch": case.batch, "length": case.length,
        "precision": case.precision, "models": setting.size.title,
    }  # fmt: skip
    return Group({n: dict(common) for n in runs}, interleaved(device, runs, budget), failed=failed)


def same_weights(setting: Setting, stores: Sequence[str]) -> None:
    """Two steps from the same weights move them alike whatever the store. Raises WrongError.

    Not bit for bit, since a store's pilot step may round once or twice. The pilot step is so large that a rewind which did not
    happen would show.
    """
    moves = []
    with deterministic():
        for store in stores:
            state, call = engine_step(setting, dropout=False, store=store, pilot_lr=1.0)
            before = [each.network.flat.weights.clone() for each in state.learners()]
            call(), call()
            after = [each.network.flat.weights for each in state.learners()]
            moves.append([a - b for a, b in zip(after, before, strict=True)])
    for store, moved in zip(stores[1:], moves[1:], strict=True):
        off = max(((a - b).norm() / a.norm()).item() for a, b in zip(moves[0], moved, strict=True))
        if not off <= 1e-2:
            raise WrongError(
                f"meta-steps with the {store} store end {off:.0e} from where they do with the {stores[0]} store."
            )
