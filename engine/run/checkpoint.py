"""Checkpoints: one safetensors file, written beside and moved into place, so that a kill leaves the old one or the new.

Nothing is pickled: tensors are tensors, the rest is JSON in the file's header.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from engine.errors import UserError

FORMAT = 2  # raised when what a checkpoint holds changes


def save(path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write atomically. `state` must be JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")  # two processes may prepare one teacher
    # sync: a checkpoint is written between steps
    on_cpu = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    try:
        save_file(on_cpu, temporary, metadata={"format": str(FORMAT), "state": json.dumps(state)})
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check(path: Path) -> None:
    """Raises UserError where `load` would, without reading the tensors."""
    _read(path, with_tensors=False)


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state of `save`; raises UserError for a file that is damaged or of another format."""
    return _read(path, with_tensors=True)


def _read(path: Path, with_tensors: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as f:
            metadata = f.metadata() or {}
            names = f.keys() if with_tensors else []
            tensors = {name: f.get_tensor(name) for name in names}
        if metadata.get("format") != str(FORMAT):
            raise UserError(f"Checkpoint {path} has format {metadata.get('format')}, and this version reads only format {FORMAT}; "
                            "start a new run in another --output.")  # fmt: skip
        return tensors, json.loads(metadata["state"])
    except (SafetensorError, OSError, KeyError, ValueError) as e:
        raise UserError(f"Checkpoint {path} cannot be read ({str(e).splitlines()[0]}); start a new run in another "
                        "--output.") from e  # fmt: skip


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers by name, a tied weight once."""
    seen, unique = set(), {}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            unique[name] = tensor
    return unique


@torch.no_grad()
def restore_module(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy `module_tensors` back in place."""
    for name, target in module_tensors(module).items():
        target.copy_(tensors[name])


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """Optimizer state as "<parameter number>.<key>", and "group<number>.step" where a group counts its steps, as apex does."""
    found = optimizer.state_dict()
    tensors = {f"{i}.{key}": value for i, entries in found["state"].items() for key, value in entries.items()}
    for i, group in enumerate(found["param_groups"]):
        if "step" in group:
            tensors[f"group{i}.step"] = torch.as_tensor(group["step"])
    return tensors


@torch.no_grad()
def restore_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Load `optimizer_tensors`. The settings stay those of `optimizer`, tensors among them (a learning rate) the very ones
    that schedules and CUDA graphs hold."""
    state: dict[int, dict[str, Tensor]] = {}
    counts: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        number, key = name.split(".", 1)
        if number.startswith("group"):
            counts[int(number.removeprefix("group"))] = tensor
        else:
            state.setdefault(int(number), {})[key] = tensor
    before = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for i, (group, kept) in enumerate(zip(optimizer.param_groups, before, strict=True)):
        group.update({key: value for key, value in kept.items() if isinstance(value, Tensor)})
        if isinstance(group.get("step"), Tensor):
            group["step"].copy_(counts.get(i, torch.zeros(())))
        elif i in counts:  # a number was saved without dimensions; a new optimizer has no count yet
            device = group["params"][0].device
            group["step"] = counts[i].to(device, copy=True) if counts[i].dim() else int(counts[i])
        else:
            group.pop("step", None)


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries below "prefix/", without it; `prefixed` is its inverse."""
    return {name[len(prefix) + 1 :]: t for name, t in tensors.items() if name.startswith(prefix + "/")}


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": t for name, t in tensors.items()}
