"""Which implementation serves a device: Triton on CUDA, C++ on a CPU, plain torch wherever the other is missing."""

import logging
import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

logger = logging.getLogger("engine.kernels")
VARIABLE = "ENGINE_KERNELS"
FILES = {"triton": "triton_kernels", "cpp": "cpp", "reference": "naive"}  # of each op's folder
CHOICES = ("auto", *FILES)


class Backend(NamedTuple):
    name: str  # "triton", "cpp" or "reference"
    why: str  # part of a sentence, without a full stop


def _no_library() -> tuple[frozenset[str], str]:
    return frozenset(), "nobody said where the native library is"


# Loads the library of the C++ kernels. Returns the device types that it serves, and the reason where these are none. The
# package engine.kernels sets it.
native: Callable[[], tuple[frozenset[str], str]] = _no_library


def backend(device: str) -> Backend:
    """For tensors on a device of this type ("cpu", "cuda"), decided at the first call and logged once.

    $ENGINE_KERNELS forces one. Raises ValueError where that one cannot serve the device, or is not one of the choices.
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


def module(op: str, device: str) -> ModuleType:
    """The file of the folder `op` that computes on this device: naive, triton_kernels or cpp."""
    return import_module(f"engine.kernels.ops.{op}.{FILES[backend(device).name]}")
