"""What a step takes beside time: growth of resident memory, floating-point operations."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from typing import Any

from engine.telemetry.flops import FlopCounter


def growth(step: Callable[[], Any]) -> int:
    """The highest resident memory in a step over what was resident before it, in bytes: the larger of two steps, after one
    that allocates what is kept."""
    step()
    found = []
    for _ in range(2):
        release()
        before = memory("VmRSS")
        reset_peak()
        step()
        found.append(memory("VmHWM") - before)
    return max(found)


def flops(step: Callable[[], Any]) -> int:
    """Of the matrix products and fused attention of one step, a multiplication and an addition counted as two.

    What is computed again, as fused attention does in its backward, counts again.
    """
    with FlopCounter() as counter:
        step()
    return counter.total


def memory(field: str) -> int:
    """Bytes of /proc/self/status: VmRSS is resident now, VmHWM its highest since `reset_peak`."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(field + ":"))


def release() -> None:
    """Give back what was freed: glibc keeps it resident, and a step would then seem to need nothing."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def reset_peak() -> None:
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")
