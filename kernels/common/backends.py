"""Which implementation serves a device: Triton on CUDA, C++ on a CPU, plain torch wherever the other is missing."""

import logging
import os
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch

logger = logging.getLogger("engine.kernels")
VARIABLE = "ENGINE_KERNELS"
CHOICES = ("auto", "triton", "cpp", "reference")


class Backend(NamedTuple):
    name: str  # "triton", "cpp" or "reference"
    why: str  # part of a sentence, without a full stop


def _no_library() -> tuple[frozenset[str], str]:
    return frozenset(), "nobody said where the native library is"


# Loads the library of the C++ kernels: its device types, and why there are none. The package that holds these ops sets it.
native: Callable[[], tuple[frozenset[str], str]] = _no_library


def backend(device: str) -> Backend:
    """For tensors on a device of this type ("cpu", "cuda"), decided at the first call and said once in the log.

    $ENGINE_KERNELS forces one. Raises ValueError where it cannot serve the device, or is none of the choices.
    """
    return _decide(device, os.environ.get(VARIABLE) or "auto")


# What torch.compiler.assume_constant_result does, which takes a second to import the compiler for it.
backend._dynamo_marked_constant = True


@cache
def _decide(device: str, choice: str) -> Backend:
    if choice not in CHOICES:
        raise ValueError(f"{VARIABLE} is {choice!r}; it must be one of {', '.join(CHOICES)}.")
    forced = choice != "auto"
    name = choice if forced else {"cuda": "triton", "cpu": "cpp"}.get(device, "reference")
    missing = _missing(name, device)
    if missing and forced:
        raise ValueError(f"{VARIABLE} is {choice!r}, but {missing}; with auto the kernels take what they find.")
    if forced:
        found = Backend(name, f"because {VARIABLE} says so")
    elif missing:
        found = Backend("reference", f"because {missing}")
    else:
        found = Backend(name, f"the usual one on {device}")
    slower = device == "cuda" and found.name == "reference" and not forced
    logger.log(logging.WARNING if slower else logging.INFO, "kernels on %s: %s, %s", device, found.name, found.why)
    return found


def _missing(name: str, device: str) -> str:
    """Why this backend cannot serve this device, as part of a sentence; empty where it can."""
    if name == "reference":
        return ""
    if name == "cpp":
        if device != "cpu":
            return f"the C++ kernels do not serve {device}"
        devices, why = native()
        return "" if device in devices else why
    try:
        import triton
    except ImportError as error:
        return f"triton is not installed ({error})"
    if device == "cuda" or (device == "cpu" and triton.knobs.runtime.interpret):
        return ""
    return f"triton does not serve {device} (on a CPU its interpreter does, with TRITON_INTERPRET=1)"


def module(device: str) -> ModuleType:
    """What holds `kd_first`, `kd_second` and `kd_cotangent` for this device."""
    name = backend(device).name
    if name == "triton":
        from engine.kernels.ops.kd_loss import triton_kernels as kd_triton

        return kd_triton
    if name == "cpp":
        return torch.ops.metadistil
    raise ValueError("the reference has no ops of its own; call engine.kernels, which takes it where it must.")
