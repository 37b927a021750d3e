"""Joules of stretches of time, from a GPU's energy counter or from samples of its power.

A counter loses nothing, but it moves only every so often, and NVML does not say how often: a stretch between two readings
may be wrong by one such period. Its joules are given out only once they cover ten periods, and carried over until then.
Power samples are integrated by the trapezoid rule over the times that they were taken at. Times are seconds of one
monotonic clock.

Libraries such as zeus give the difference of two readings, which is zero or a whole period for a stretch as short as a step.
"""

from __future__ import annotations

PERIODS = 10  # a stretch's two ends are then wrong by a tenth of it at most
WATCH_SECONDS, WATCH_CHANGES = 2.0, 8
WRAPS = (2**32 / 1000, 2**64 / 1000)  # joules at which a counter of 32 or 64 bits in millijoules begins anew
MOST_WATTS = 5000.0  # no device draws more: what would need more is no wrap but a reset


class Counter:
    """Running sums of a counter's joules and of the seconds that they cover; time across a reset is in neither."""

    def __init__(self):
        self.joules = self.seconds = 0.0
        self._last: tuple[float, float] | None = None

    def add(self, time: float, value: float) -> None:
        if self._last is None:
            self._last = (time, value)
            return
        seconds, step = time - self._last[0], value - self._last[1]
        if seconds <= 0:
            return
        if step < 0:
            step = next((wrap + step for wrap in WRAPS if 0 <= wrap + step <= MOST_WATTS * seconds), step)
        self._last = (time, value)
        if step >= 0:
            self.joules += step
            self.seconds += seconds


class Trapezoid:
    """Running sums of power's integral and of the seconds that it covers."""

    def __init__(self):
        self.joules = self.seconds = 0.0
        self._last: tuple[float, float] | None = None

    def add(self, time: float, watts: float) -> None:
        if self._last is not None:
            seconds = time - self._last[0]
            if seconds <= 0:
                return
            self.joules += seconds * (watts + self._last[1]) / 2
            self.seconds += seconds
        self._last = (time, watts)


class Watch:
    """Finds how often a counter moves, from readings in quick succession.

    It is over when the counter moved WATCH_CHANGES times, or after WATCH_SECONDS.
    """

    def __init__(self):
        self.changes: list[float] = []  # when it was seen to have moved
        self._first: float | None = None
        self._value: float | None = None
        self.over = False

    def add(self, time: float, value: float | None) -> None:
        """A reading of the counter; None where it gave no answer."""
        if self.over:
            return
        if self._first is None:
            self._first = time
        if value is not None:
            if self._value is not None and value != self._value:
                self.changes.append(time)
            self._value = value
        self.over = len(self.changes) >= WATCH_CHANGES or time - self._first >= WATCH_SECONDS

    @property
    def period(self) -> float | None:
        """Seconds; None before it moved three times. Readings that are too seldom make it too long, which is the safe side."""
        if len(self.changes) < 3:
            return None
        return (self.changes[-1] - self.changes[0]) / (len(self.changes) - 1)


class Energy:
    """Joules of windows, from whatever the device offers.

    The counter is used where it is seen to move; power where there is no counter, or one that stands still. Until that
    is known, windows are carried over.
    """

    def __init__(self, has_counter: bool):
        self.counter, self.power, self.watch = Counter(), Trapezoid(), Watch()
        self._has_counter = has_counter
        self._given = (0.0, 0.0)
        self._source: str | None = None

    def add(self, time: float, *, counter: float | None = None, power: float | None = None) -> None:
        """A sample: the counter in joules, the power in watts, or both."""
        self.watch.add(time, counter)
        if counter is not None:
            self.counter.add(time, counter)
        if power is not None:
            self.power.add(time, power)

    def without_counter(self) -> None:
        """The device said that it has none."""
        self._has_counter = False

    @property
    def watching(self) -> bool:
        """The counter is to be read as often as can be."""
        return self._has_counter and not self.watch.over

    @property
    def source(self) -> str | None:
        """ "counter" or "power", for good; None while that is not known, or neither is there."""
        if self._source is None and not self.watching:
            slow = bool(self.watch.changes) and not self.power.seconds  # better than nothing
            if self._has_counter and (self.watch.period is not None or slow):
                self._source = "counter"
            elif self.power.seconds:
                self._source = "power"
        return self._source

    @property
    def total(self) -> float | None:
        """Joules since the first sample."""
        return {"counter": self.counter.joules, "power": self.power.joules, None: None}[self.source]

    def take(self) -> tuple[float, float] | None:
        """(joules, the seconds that they cover) since the last one taken; None while that is too short to tell."""
        source = self.source
        if source is None:
            return None
        sums = self.counter if source == "counter" else self.power
        joules, seconds = sums.joules - self._given[0], sums.seconds - self._given[1]
        period = (self.watch.period or WATCH_SECONDS) if source == "counter" else 0.0
        if seconds <= 0 or seconds < PERIODS * period * (1 - 1e-9):
            return None
        self._given = (sums.joules, sums.seconds)
        return joules, seconds
