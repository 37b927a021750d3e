"""Operations on flat parameters, each one pass over memory: compiled from `csrc/`, or else in plain torch.

With w weights, g gradient, s snapshot, b the bfloat16 shadow of w that a model computes with:

    pilot_update   s = w;  w = w + alpha g;  b = bf16(w)
    rewind         w = s;  b = bf16(w)                               bit for bit
    adamw          torch.optim.AdamW's step on w and both moments;  b = bf16(w)
    row_axpy       s = w[rows];  w[rows] = w[rows] + alpha g;  b[rows] = bf16(w[rows])
    row_rewind     w[rows] = s;  b[rows] = bf16(w[rows])             bit for bit

All write in place, have no derivative, leave version counters alone (as the time machine does), wait for no device, and
give the same bits however many threads there are. Tensors are contiguous, float32 or float64, one dtype and device for
a call; scalars are tensors [] on that device. Bad arguments raise ValueError, a row outside the table IndexError on a
CPU and a device assert on CUDA.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from engine.errors import UserError
from engine.params import native_build, native_reference
from engine.params.native_build import BuildError

VARIABLE = "METADISTIL_NATIVE"
CHOICES = {"auto", "aot", "jit", "torch"}


@dataclass(frozen=True)
class Backend:
    """What runs the operations, and why it is that."""

    name: str  # "ahead of time", "just in time" or "torch"
    why: str  # part of a sentence, without a full stop
    devices: frozenset[str] = frozenset()  # the device types that the library serves; plain torch has the others


_chosen: Backend | None = None


def backend() -> Backend:
    """Decided at the first call, which may compile for some seconds; raises UserError where $METADISTIL_NATIVE forbids.

    auto (the default): the library that setup.py built; else one compiled just now, or on an earlier day, into
    $METADISTIL_NATIVE_CACHE, or `native/` in $METADISTIL_CACHE or ~/.cache/metadistil-engine; else plain torch. aot, jit
    and torch allow one each.
    """
    global _chosen
    if _chosen is None:
        _chosen = _decide(os.environ.get(VARIABLE) or "auto")
    return _chosen


def prepare(say: Callable[[str], None]) -> Backend:
    """Decide now, and say in one sentence what was decided and what it took."""
    chosen = backend()
    say(f"Native operations: {chosen.name}, {chosen.why}.")
    return chosen


def pilot_update(
    weights: Tensor,  # [N], written
    gradient: Tensor,  # [N]
    snapshot: Tensor,  # [N], written
    alpha: Tensor,  # [] of the weights' dtype
    shadow: Tensor | None = None,  # [N] bfloat16, written
) -> None:
    """s = w; w = w + alpha g; b = bf16(w)."""
    _operations(weights).pilot_update(weights, gradient, snapshot, alpha, shadow)


def rewind(
    weights: Tensor,  # [N], written
    snapshot: Tensor,  # [N]
    shadow: Tensor | None = None,  # [N] bfloat16, written
) -> None:
    """w = s, bit for bit; b = bf16(w)."""
    _operations(weights).rewind(weights, snapshot, shadow)


def adamw(
    weights: Tensor,  # [N], written
    gradient: Tensor,  # [N]
    exp_avg: Tensor,  # [N], written
    exp_avg_sq: Tensor,  # [N], written
    step: Tensor,  # [] float32 or float64: t, this step already counted
    lr: Tensor,  # [] float32 or float64
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    clip: Tensor | None = None,  # [] float32 or float64: the factor of the gradient
    found_inf: Tensor | None = None,  # [] float32 or float64: other than 0 (or NaN), nothing is written
    shadow: Tensor | None = None,  # [N] bfloat16, written
) -> None:
    """One step of AdamW (Loshchilov and Hutter, 2019), as torch.optim.AdamW takes it:

    g = clip g;  m = m + (1 - beta1)(g - m);  v = beta2 v + (1 - beta2) g g
    w = (1 - lr weight_decay) w - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps);  b = bf16(w)
    """
    _operations(weights).adamw(
        weights, gradient, exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps, weight_decay, clip, found_inf, shadow
    )


def row_axpy(
    table: Tensor,  # [V, H], written
    rows: Tensor,  # [n] int64 in 0 ... V - 1, no two alike
    values: Tensor,  # [n, H]
    alpha: Tensor,  # [] of the table's dtype
    snapshot: Tensor | None = None,  # [n, H], written
    shadow: Tensor | None = None,  # [V, H] bfloat16, written where the table is
) -> None:
    """s = w[rows]; w[rows] = w[rows] + alpha g; b[rows] = bf16(w[rows])."""
    _operations(table).row_axpy(table, rows, values, alpha, snapshot, shadow)


def row_rewind(
    table: Tensor,  # [V, H], written
    rows: Tensor,  # [n] int64 in 0 ... V - 1, no two alike
    snapshot: Tensor,  # [n, H]
    shadow: Tensor | None = None,  # [V, H] bfloat16, written where the table is
) -> None:
    """w[rows] = s, bit for bit; b[rows] = bf16(w[rows])."""
    _operations(table).row_rewind(table, rows, snapshot, shadow)


def _operations(tensor: Tensor) -> ModuleType:
    chosen = _chosen or backend()
    return torch.ops.metadistil if tensor.device.type in chosen.devices else native_reference


def _decide(choice: str) -> Backend:
    if choice not in CHOICES:
        raise UserError(f"{VARIABLE} is {choice!r}; it must be auto, aot, jit or torch.")
    if choice == "torch":
        return Backend("torch", f"because {VARIABLE} says so")
    reasons = []
    for name, attempt in {"aot": _ahead_of_time, "jit": _just_in_time}.items():
        if choice in ("auto", name):
            try:
                return attempt()
            except BuildError as error:
                reasons.append(str(error))
    if choice != "auto":
        raise UserError(f"{VARIABLE} is {choice!r}, but {reasons[0]}; with auto the engine takes what it finds.")
    return Backend("torch", f"because {reasons[-1]}")


def _ahead_of_time() -> Backend:
    folder, name = Path(__file__).parents[1], native_build.library_name()
    if not (folder / name).exists():
        raise BuildError(
            "engine/_native-*.so was built for another torch or from other sources"
            if list(folder.glob("_native-*.so"))
            else "the installation has no engine/_native-*.so (python setup.py build_ext --inplace makes it)"
        )
    return Backend("ahead of time", f"in {name}", _load(folder / name))


def _just_in_time() -> Backend:
    cache = Path(os.environ.get("METADISTIL_CACHE") or "~/.cache/metadistil-engine").expanduser() / "native"
    cache = Path(os.environ.get("METADISTIL_NATIVE_CACHE") or cache)
    tools = native_build.Toolchain()
    library = cache / f"metadistil-{tools.key()}.so"
    cuda = "" if tools.nvcc or torch.version.cuda is None else f"; for the CPU only, because {tools.without_cuda}"
    if library.exists():
        with contextlib.suppress(BuildError):  # a damaged file is made again
            return Backend("just in time", f"compiled before into {library}{cuda}", _load(library))
        library.unlink(missing_ok=True)
    start = time.monotonic()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _alone(cache / "lock"):
            if not library.exists():
                tools.build(library)
    except OSError as error:
        raise BuildError(f"{cache} cannot be written: {error.strerror}") from error
    seconds = time.monotonic() - start
    return Backend("just in time", f"compiled in {seconds:.1f} s into {library}{cuda}", _load(library))


@contextlib.contextmanager
def _alone(file: Path):
    """One process at a time, where the file system can; others wait for what it builds. The killed leave no lock."""
    with file.open("w") as lock:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _load(library: Path) -> frozenset[str]:
    """The device types that the loaded library serves."""
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise BuildError(f"{library.name} does not load: {str(error).splitlines()[0]}") from error
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return frozenset(key.lower() for key in ("CPU", "CUDA", "Meta") if has_kernel("metadistil::adamw", key))
