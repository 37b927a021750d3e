"""The ops in `torch.ops.metadistil`: what a tracer sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# labels, weights as a tensor, else as numbers, temperature, alpha, ignore_index, reduction
Settings = tuple[Tensor | None, Tensor | None, list[float], float, float, int, str]
SETTINGS = "Tensor? labels, Tensor? weights, float[] constants, float temperature, float alpha, int ignore_index, str reduction"
LIBRARY = torch.library.Library("metadistil", "FRAGMENT")


def register(schema: str, plain: Callable, fake: Callable, autograd: Callable | None = None) -> None:
    LIBRARY.define(schema)
    name = schema.partition("(")[0]
    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, plain, device)
    torch.library.register_fake(f"metadistil::{name}", fake, lib=LIBRARY)
    if autograd:
        LIBRARY.impl(name, autograd, "Autograd")


def below(name: str) -> Callable:
    """The op as it is below autograd, for a forward that is traced."""

    def run(*arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.metadistil, name)(*arguments)

    return run


def like(inputs: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor]:
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t, w in zip(inputs, wanted, strict=True) if w]
