"""Knowledge distillation in which the teacher learns to teach."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.meta_step import MetaStep
    from engine.network import Network, Outputs
    from engine.objectives import Objective

__version__ = "0.1.0"
__all__ = ["MetaStep", "Network", "Objective", "Outputs"]

_HOMES = {"MetaStep": "meta_step", "Network": "network", "Objective": "objectives", "Outputs": "network"}


def __getattr__(name: str):
    """The public classes, imported when first asked for: the command line answers before torch is there."""
    if name not in _HOMES:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"engine.{_HOMES[name]}"), name)
