"""What a step takes: seconds, growth of resident memory, floating-point operations."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from engine.telemetry.flops import FlopCounter


def measure(step: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """Median of `rounds` steps with the extremes, after one that allocates what is kept and two whose memory is read.

    `growth` is the highest resident memory in a step over what was resident before it, in bytes.
    """
    step()
    growth = []
    for _ in range(2):
        release()
        before = memory("VmRSS")
        reset_peak()
        step()
        growth.append(memory("VmHWM") - before)
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return {"seconds": median(seconds), "fastest": min(seconds), "slowest": max(seconds), "growth": max(growth)}


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
