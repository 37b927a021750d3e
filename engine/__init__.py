"""Knowledge distillation in which the teacher learns to teach."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.losses.objectives import Objective
    from engine.meta.meta_step import MetaStep
    from engine.models.network import Network, Outputs

__version__ = "0.1.0"
__all__ = ["MetaStep", "Network", "Objective", "Outputs"]

_HOMES = {
    "MetaStep": "meta.meta_step",
    "Network": "models.network",
    "Objective": "losses.objectives",
    "Outputs": "models.network",
}


def __dir__() -> list[str]:
    return [*globals(), *__all__]


def __getattr__(name: str):
    """The public classes, imported when first asked for: the command line answers before torch is there."""
    if name not in _HOMES:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"engine.{_HOMES[name]}"), name)
