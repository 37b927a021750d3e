"""Other tensors in the place of a module's own, for the length of a pass."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager

from torch import Tensor, nn


def every(module: nn.Module) -> list[nn.Module]:
    """The module and all below it, each once; in a fraction of the time of `modules()`, which a pass would notice."""
    found, waiting = {module}, [module]
    for m in waiting:
        for child in m._modules.values():
            if child is not None and child not in found:
                found.add(child)
                waiting.append(child)
    return waiting


@contextmanager
def swapped(module: nn.Module, tensors: Mapping[str, Tensor]):
    """In the body `tensors` (by the names of `named_parameters` and `named_buffers`) stand in for the module's own.

    A parameter that stands in several places (tied weights, a submodule that has two names) is replaced in all of them, each
    place once; torch.func.functional_call replaces one that is reached by two names twice, and puts the stand-in back.
    Raises KeyError for a name that the module does not have.
    """
    places: dict[int, list[tuple[dict[str, Tensor | None], str]]] = {}
    for m in every(module):
        for holder in (m._parameters, m._buffers):
            for key, own in holder.items():
                if own is not None:
                    places.setdefault(id(own), []).append((holder, key))
    found: dict[str, nn.Module] = {"": module}
    wanted = [(place, tensor) for name, tensor in tensors.items() for place in places[id(_own(found, name))]]
    before = [(holder, key, holder[key]) for (holder, key), _ in wanted]
    try:
        for (holder, key), tensor in wanted:
            holder[key] = tensor
        yield
    finally:
        for holder, key, tensor in reversed(before):
            holder[key] = tensor


def _own(found: dict[str, nn.Module], name: str) -> Tensor:
    """The tensor of that name; `found` holds the modules that were looked up so far, by their paths."""
    path, _, key = name.rpartition(".")
    module = _module(found, path)
    own = module._parameters.get(key)
    if own is None:
        own = module._buffers.get(key)
    if own is None:
        raise KeyError(name)
    return own


def _module(found: dict[str, nn.Module], path: str) -> nn.Module:
    if path not in found:
        above, _, key = path.rpartition(".")
        child = _module(found, above)._modules.get(key)
        if child is None:
            raise KeyError(path)
        found[path] = child
    return found[path]
