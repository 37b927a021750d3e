"""What torch's CPU allocator gives out during a call, from the events of its profiler, which are exact at any size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def allocated(call: Callable[[], Any]) -> int:
    """The most bytes that were given out at once, over what was there before; what the call returns is included.

    It sees what an operation allocates for itself, which the ledger does not. Resident memory would also show what the C library
    keeps of freed blocks.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        kept = call()
    del kept
    events = (e for e in found.profiler.kineto_results.events() if e.name() == "[memory]")
    now = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest
