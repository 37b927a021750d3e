"""AdamW over flat parameters, in three implementations, and one step of any optimizer that never waits for the device.

    optimizer = adamw("torch", flat, lr=6e-5, weight_decay=0.01)
    step(optimizer, flat, clip, found_inf)

flat     `FlatAdamW`: a pass a decay group; clipping and the bf16 shadow's refresh are in the same pass
torch    torch.optim.AdamW(fused=True), capturable on CUDA
apex     NVIDIA apex's FusedAdam in its AdamW mode, capturable: read at NVIDIA/apex, apex/optimizers/fused_adam.py, and
         csrc/multi_tensor_adam.cu for what its kernels do with found_inf
"""

from __future__ import annotations

import importlib
import inspect
from contextlib import contextmanager
from functools import lru_cache
from importlib.machinery import PathFinder
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from engine.errors import UserError
from engine.params import native
from engine.params.flat import FlatParameters

Kind = Literal["flat", "torch", "apex"]
SETTINGS = {"betas": (0.9, 0.999), "eps": 1e-8}
FRESH = {"step": 0, "mu_product": 1}  # what torch's optimizers begin with that is no moment
AT_HAND = {"cpu"}  # devices whose scalars the host may read in a step
BUILD = "build it from the source in NVIDIA's GitHub repository NVIDIA/apex, or use --optimizer flat or torch"


def adamw(kind: Kind, flat: FlatParameters, lr: float | Tensor, weight_decay: float) -> Optimizer:
    """AdamW over every trained weight of `flat`: matrices decay, vectors do not.

    `lr` may be a scalar tensor on the weights' device, float32 (or float64 for `flat`). On CUDA a number becomes one, since
    a CUDA graph would keep the number; a schedule fills it in place, from the number itself (`initial_lr`), so that the
    rates are the same to the last bit. Raises UserError where `check` does.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"optimizer is {kind!r}; it must be one of {', '.join(get_args(Kind))}.")
    device = flat.weights.device
    check(kind, device)
    if kind == "flat":
        optimizer = FlatAdamW(flat, weight_decay=weight_decay, **SETTINGS)
    elif kind == "torch":
        optimizer = torch.optim.AdamW(
            _groups(flat, weight_decay), fused=True, capturable=device.type == "cuda", **SETTINGS
        )
        optimizer._warned_capturable_if_run_uncaptured = True  # the warm-up steps of a graph are no mistake
    else:
        optimizer = _fused_adam()(_groups(flat, weight_decay), adam_w_mode=True, capturable=True, **SETTINGS)
    for group in optimizer.param_groups:
        group["lr"] = lr
    if not isinstance(lr, Tensor) and (device.type == "cuda" or kind == "apex"):
        _rates_as_tensors(optimizer, lr, flat.weights.dtype if kind == "flat" else torch.float32)  # what kernels read
    return optimizer


def _rates_as_tensors(optimizer: Optimizer, lr: float, dtype: torch.dtype) -> None:
    for group in optimizer.param_groups:
        group["lr"] = torch.full((), lr, dtype=dtype, device=group["params"][0].device)
        group["initial_lr"] = lr  # which LambdaLR would make of the tensor, rounded


def check(kind: Kind, device: torch.device) -> None:
    """Raises UserError where --optimizer `kind` cannot step weights on `device`."""
    if kind == "apex":
        if device.type != "cuda":
            raise UserError(
                f"--optimizer apex needs a CUDA device, and this run is on {device.type}; use --optimizer flat or torch."
            )
        _fused_adam()


def _fused_adam() -> type[Optimizer]:
    """NVIDIA's class; UserError where it is not there. What has its name only is not imported."""
    found = find_spec("apex")
    if found is None:
        raise UserError(f"--optimizer apex needs NVIDIA's apex, which is not installed; {BUILD}.")
    if PathFinder.find_spec("apex.optimizers", found.submodule_search_locations or []) is None:
        raise UserError(
            "--optimizer apex needs NVIDIA's apex, but the apex installed here is another package (PyPI's is an unrelated "
            f"web-authentication toolkit); uninstall that, and for NVIDIA's {BUILD}.")  # fmt: skip
    try:
        importlib.import_module("amp_C")  # its compiled kernels
        return importlib.import_module("apex.optimizers").FusedAdam
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"--optimizer apex needs NVIDIA's apex with its CUDA extensions, and they do not load ({_line(error)}); {BUILD}."
        ) from error


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _groups(flat: FlatParameters, weight_decay: float) -> list[dict[str, Any]]:
    """With and without decay; one that has no members is left out."""
    parameters = list(flat.parameters.values())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


# --- one step of any optimizer


@torch.no_grad()
def step(
    optimizer: Optimizer, flat: FlatParameters, clip: Tensor | None = None, found_inf: Tensor | None = None
) -> None:
    """A step from `flat`'s gradients times `clip`; where `found_inf` is not 0, or NaN, nothing moves: neither weights nor
    moments nor step counts.

    Both are device scalars ([] float32); the host reads neither. The bf16 shadow is written along. `FlatAdamW` and what
    follows the protocol of torch's GradScaler (the fused optimizers of torch, apex's capturable FusedAdam) look at
    `found_inf` themselves. An optimizer of another kind is left out on a CPU, where reading a scalar waits for nothing; elsewhere
    it steps, from gradients of 0, and what it moved is taken back from copies (`_taken_back` says what of its state cannot be).
    `fused=True` saves their memory and time.
    """
    if isinstance(optimizer, FlatAdamW):
        optimizer.step(clip=clip, found_inf=found_inf)
        return
    gradients = flat.gradients  # every `.grad` is a view into it
    flag = None if found_inf is None else (found_inf != 0).float()  # the kernels compare with 1
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        if clip is not None:
            gradients.mul_(clip)
        if found_inf is None or (found_inf.device.type in AT_HAND and found_inf == 0):
            optimizer.step()
        elif found_inf.device.type not in AT_HAND:
            gradients.masked_fill_(found_inf != 0, 0)
            with _taken_back(optimizer, flat, found_inf != 0):
                optimizer.step()
    elif _takes_scaler(type(optimizer)):
        _step_with_scaler(optimizer, clip, flag)
    else:
        try:
            optimizer.grad_scale = None if clip is None else clip.float().reciprocal()  # torch divides by it
            optimizer.found_inf = flag
            optimizer.step()
        finally:
            del optimizer.grad_scale, optimizer.found_inf
    if flat.shadow is not None:  # fused kernels leave alone the version counters that would show it to be stale
        flat.shadow.copy_(flat.weights)


@contextmanager
def _taken_back(optimizer: Optimizer, flat: FlatParameters, bad: Tensor):
    """Where `bad` [] is true, the weights and the optimizer's state are after the body as they were before it.

    That is every tensor of its state on the device of `bad`. What is no tensor or lies elsewhere goes on: a count on the host (of a
    CUDA optimizer without `capturable=True`) is one step ahead after such an update. State that the body makes, in an optimizer's
    first step, is what gradients and weights of 0 make of it, which is 0 for moments, and begins at `FRESH`. SGD's dampening
    then counts from the second update on.
    """
    weights, before = flat.weights.clone(), {place: t.clone() for place, t in _state(optimizer, bad.device).items()}
    # for state that begins in the body: some optimizers add weight decay to the gradient
    flat.weights.masked_fill_(bad, 0)
    try:
        yield
    finally:
        torch.where(bad, weights, flat.weights, out=flat.weights)
        for place, now in _state(optimizer, bad.device).items():
            if place in before:
                torch.where(bad, before[place], now, out=now)
            elif place[1] in FRESH:
                now.masked_fill_(bad, FRESH[place[1]])


def _state(optimizer: Optimizer, device: torch.device) -> dict[tuple[int, str], Tensor]:
    """The tensors on `device` that the optimizer keeps of each parameter and each group."""
    owners = [*((id(p), entries) for p, entries in optimizer.state.items()), *enumerate(optimizer.param_groups)]
    return {
        (owner, key): t for owner, entries in owners for key, t in entries.items()
        if isinstance(t, Tensor) and t.device == device
    }  # fmt: skip


@lru_cache
def _takes_scaler(kind: type[Optimizer]) -> bool:
    return "grad_scaler" in inspect.signature(kind.step).parameters


def _step_with_scaler(optimizer: Optimizer, clip: Tensor | None, flag: Tensor | None) -> None:
    """apex's way. It counts a step before it looks at found_inf, and takes the count back in the next step, by a flag of its
    own that the second group already finds set; so the counts are kept here."""
    groups = optimizer.param_groups
    device = groups[0]["params"][0].device
    for group in groups:
        if "step" not in group:
            group["step"] = torch.zeros(1, dtype=torch.int32, device=device)
    before = [group["step"].clone() for group in groups]
    optimizer._dummy_overflow_buf.zero_()
    flag = torch.zeros((), device=device) if flag is None else flag
    clip = torch.ones((), device=device) if clip is None else clip
    optimizer.step(grad_scaler=_Scaler(device, clip, flag))
    for group, count in zip(groups, before, strict=True):
        group["step"].copy_(count + (1 - flag).to(count.dtype))


class _Scaler:
    """What apex asks of torch's GradScaler."""

    def __init__(self, device: torch.device, clip: Tensor, flag: Tensor):
        self._flags = {device: flag}
        self._scale = clip.double().reciprocal()  # of which apex takes the reciprocal in float64: `clip` again

    def _check_inf_per_device(self, optimizer: Optimizer) -> dict[torch.device, Tensor]:
        return self._flags

    def _get_scale_async(self) -> Tensor:
        return self._scale


class FlatAdamW(Optimizer):
    """torch.optim.AdamW's update (Loshchilov and Hutter 2019) on the flat buffers.

    Two parameter groups, with and without weight decay; their state is by parameter, as torch's, so that checkpoints
    of either can be read by the other. A weight that no loss depends on has a gradient of 0 here, and so it decays. A
    group's learning rate is a number, or a scalar tensor on the weights' device (float32 or float64) that each step reads.
    """

    def __init__(
        self, flat: FlatParameters, lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.01,
    ):  # fmt: skip
        self.flat = flat
        self._moments = torch.zeros_like(flat.weights), torch.zeros_like(flat.weights)
        self._lrs: list[Tensor] = []
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(_groups(flat, weight_decay), defaults)

    def _span(self, group: dict) -> slice:
        """Where a group stands in the flat buffers: they are laid out by it."""
        return slice(0, self.flat.no_decay) if group["params"][0].ndim < 2 else slice(self.flat.no_decay, None)

    def _link(self) -> None:
        """Every parameter's state is a view; a state that was loaded is copied in first, where there is none it is zero."""
        flat = self.flat
        names = {id(p): name for name, p in flat.parameters.items()}
        exp_avg, exp_avg_sq = (flat.views(m) for m in self._moments)
        self._step = flat.weights.new_zeros((), dtype=torch.float32)
        for group in self.param_groups:
            for p in group["params"]:
                name, state = names[id(p)], self.state[p]
                for key, view in (("exp_avg", exp_avg[name]), ("exp_avg_sq", exp_avg_sq[name])):
                    if key not in state:
                        view.zero_()
                    elif state[key].data_ptr() != view.data_ptr():
                        view.copy_(state[key])
                    state[key] = view
                if "step" in state:
                    self._step.copy_(state["step"])
                state["step"] = self._step
        self._lrs = [flat.weights.new_zeros(()) for _ in self.param_groups]

    @torch.no_grad()
    def step(self, closure=None, *, clip: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        """One update from `flat.gradients`, times the device scalar `clip`; nothing moves where `found_inf` is not 0."""
        if closure is not None:
            raise ValueError("FlatAdamW takes no closure.")
        if not self.state:  # new, or taken back to that by the time machine
            self._link()
        flat, shadow = self.flat, self.flat.shadow
        self._step += 1 if found_inf is None else (found_inf == 0).to(self._step.dtype)
        for group, own in zip(self.param_groups, self._lrs, strict=True):
            lr = group["lr"]
            span = self._span(group)
            native.adamw(
                flat.weights[span], flat.gradients[span], self._moments[0][span], self._moments[1][span], self._step,
                lr if isinstance(lr, Tensor) else own.fill_(lr), *group["betas"], group["eps"], group["weight_decay"],
                clip, found_inf, None if shadow is None else shadow[span],
            )  # fmt: skip

    @torch.no_grad()
    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """exp_avg [N], exp_avg_sq [N] and the step count [] float32, the ones that the next step writes."""
        if not self.state:  # as in `step`, but what has no state keeps none
            for moment in self._moments:
                moment.zero_()
            self._step = self.flat.weights.new_zeros((), dtype=torch.float32)
        return (*self._moments, self._step)

    def state_dict(self) -> dict:
        """As torch's: every parameter has a step count of its own."""
        found = super().state_dict()
        state = {i: {**entries, "step": entries["step"].clone()} for i, entries in found["state"].items()}
        return {**found, "state": state}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._link()
