"""What this process takes of its machine; its children (workers that load data) are not counted."""

from __future__ import annotations

import time


class Host:
    def __init__(self):
        import psutil  # here, so that what only reads a device does without

        self._process = psutil.Process()
        self._last = (time.monotonic(), time.process_time())

    def resident(self) -> int:
        """Bytes of physical memory that the process has, libraries and mapped files included."""
        return self._process.memory_info().rss

    def cpu(self) -> float | None:
        """Percent of one core since the last call (200: two cores busy); None where no time has passed.

        By the clock of the process rather than psutil, which counts in ticks of 10 ms: a step may be shorter.
        """
        now = (time.monotonic(), time.process_time())
        seconds, busy = now[0] - self._last[0], now[1] - self._last[1]
        if seconds <= 0:
            return None
        self._last = now
        return 100 * busy / seconds
