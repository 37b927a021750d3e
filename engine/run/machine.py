"""Step 5: make this machine ready: compiled operations, kernels, threads, the allocator."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine import kernels
from engine.config import Config
from engine.errors import UserError
from engine.methods import METHODS
from engine.models.compiling import CompiledLayers
from engine.models.load import ModelSource
from engine.models.network import Network
from engine.params import native
from engine.run.allocator import keep_freed_memory
from engine.screen.console import Console


def suit_threads(device: torch.device, sources: Sequence[ModelSource]) -> None:
    """One thread on a CPU for embedded models: their operations are too small to share."""
    if device.type == "cpu" and all(source.kind == "embedded" for source in sources):
        torch.set_num_threads(1)


def prepare_machine(
    config: Config, device: torch.device, networks: Sequence[Network], compiled: CompiledLayers | None,
    fused: bool, console: Console,
) -> None:  # fmt: skip
    """Compile what training needs and say what it computes with; it may take some seconds. Changes no model.

    `fused` says whether the soft loss takes fused kernels. Raises UserError where these cannot be had.
    """
    native.prepare(console.say)
    if fused:
        _say_kernels(device, console)
    if compiled is not None:
        compiled.try_out(device)
        console.say(compiled.describe(METHODS[config.method.method].teachers, device))
        for network in networks:
            if network.module.config.num_hidden_layers == 1:
                console.say(
                    f"--compile changes nothing for {network.name}: a model's last layer is not compiled, and it has no other."
                )
    if device.type == "cpu":
        keep_freed_memory()


def _say_kernels(device: torch.device, console: Console) -> None:
    try:
        chosen = kernels.backend(device.type)
    except ValueError as error:
        raise UserError(str(error)) from error
    console.say(f"Kernels of the distillation loss: {chosen.name}, {chosen.why}.")
