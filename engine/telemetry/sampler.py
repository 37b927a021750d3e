"""The thread that looks at the device and at this process while a run trains.

It only ever reads, and whatever happens to it is a cause in a string, never an exception in the run. Samples are folded
into figures of the current window as they come, so that a window costs the same however long it is.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from engine.telemetry.energy import Energy
from engine.telemetry.host import Host
from engine.telemetry.nvml import Nvml, Unavailable

if TYPE_CHECKING:
    import torch

WATCH_INTERVAL = 0.005  # seconds between looks at an energy counter whose period is being found
JOIN_SECONDS = 2.0  # a call of NVML that hangs does not keep a run from ending


def _next(due: float, interval: float, now: float) -> float:
    """When to look again; what was missed is not made up for."""
    return due + interval if due + interval > now else now + interval


def _either(a: float, b: float) -> float:
    return int(a) | int(b)


# How a window's samples make one figure: what is not here is their mean.
FOLD: dict[str, Callable[[float, float], float]] = dict.fromkeys(
    ("host/resident", "device/memory_used", "device/memory_reserved", "device/memory_process", "device/temperature"),
    max,
)
FOLD |= dict.fromkeys(
    ("device/memory_total", "device/power_limit", "device/energy", "device/pcie_generation", "device/pcie_width"),
    lambda _, last: last,
)
FOLD["device/throttle_reasons"] = _either  # every reason that there was


@dataclass(frozen=True)
class Window:
    """What was gathered between two calls of `Sampler.window()`."""

    values: dict[str, float] = field(default_factory=dict)  # "host/..." and "device/...", those that are known
    resident: dict[str, int] = field(default_factory=dict)  # most resident bytes seen in each section of the step
    joules: float | None = None  # of the device, during `seconds`
    seconds: float = 0.0  # from the sample that the last joules ended at, so maybe from before the window


class _Folded:
    """The figures of a window so far."""

    def __init__(self):
        self._figures: dict[str, tuple[float, int]] = {}  # the folded value, or a sum; how many

    def add(self, key: str, value: float) -> None:
        before, count = self._figures.get(key, (value, 0))
        if key in FOLD:
            self._figures[key] = (FOLD[key](before, value), 1)
        else:
            self._figures[key] = (before + value if count else value, count + 1)

    def take(self) -> dict[str, float]:
        figures, self._figures = self._figures, {}
        return {key: value if key in FOLD else value / count for key, (value, count) in figures.items()}


class Sampler:
    """Samples of the host and of a device in a daemon thread between `start()` and `close()`.

    Args:
        device: the one that trains; of any but a CUDA device `cause` says that there is no telemetry
        section: names the section that a step is in now; called in the thread
        host_interval, device_interval: seconds between two samples
        library: in place of the module `pynvml`
        clock: seconds, never going back

    After a fork the child's copy does nothing.
    """

    def __init__(
        self,
        device: torch.device,
        section: Callable[[], str],
        *,
        host_interval: float = 0.1,
        device_interval: float = 0.25,
        library: Any = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.device: dict[str, Any] | None = None
        self.cpu_seconds = 0.0  # of one core, spent in the thread
        self._section, self._clock = section, clock
        self._host_interval, self._device_interval = host_interval, device_interval
        self._nvml: Nvml | None = None
        self._energy = Energy(has_counter=False)
        self._lock, self._stop, self._thread = threading.Lock(), threading.Event(), None
        self._pid, self._closed = os.getpid(), False
        self._folded, self._resident = _Folded(), {}
        self._sample, self._host_due, self._device_due = 0, clock(), clock()
        causes = []
        try:
            self._host: Host | None = Host()
        except Exception as error:  # noqa: BLE001 - the device's figures can be had without
            self._host = None
            causes.append(f"no telemetry of the host: {type(error).__name__}: {error}")
        try:
            self._open(device, library)
        except Unavailable as error:
            causes.append(f"no NVML: {error}")
        except Exception as error:  # noqa: BLE001 - a broken installation must not keep a run from training
            causes.append(f"no NVML: {type(error).__name__}: {error}")
        self.cause = "; ".join(causes) or None

    def _open(self, device: torch.device, library) -> None:
        if device.type != "cuda":
            raise Unavailable(f"the device is {device.type}")
        self._nvml = Nvml(*_cuda_device(device), library=library)
        self.device = self._nvml.about
        self._energy = Energy(has_counter=self._nvml.has("energy"))

    def start(self) -> None:
        if self._thread is None and not self._closed:
            thread = threading.Thread(target=self._run, name="telemetry", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # a limit of the system
                self.cause = f"no telemetry: {error}"
                return
            self._thread = thread
            atexit.register(self.close)  # a daemon thread inside of a C library when the interpreter ends may crash it

    def close(self) -> None:
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        self._stop.set()
        atexit.unregister(self.close)
        if self._thread is not None:
            self._thread.join(JOIN_SECONDS)
        if self._nvml is not None and (self._thread is None or not self._thread.is_alive()):
            self._nvml.close()

    def window(self) -> Window:
        """What was gathered since the last call. It asks the device for nothing: some tens of microseconds."""
        if os.getpid() != self._pid:
            return Window()
        try:
            self._look_at_host()
            busy = None if self._host is None else self._host.cpu()
        except Exception as error:  # noqa: BLE001 - the device's figures go on
            self.cause, busy = f"no telemetry: {type(error).__name__}: {error}", None
        with self._lock:
            if busy is not None:
                self._folded.add("host/cpu", busy)
            values, (resident, self._resident) = self._folded.take(), (self._resident, {})
            joules, seconds = self._energy.take() or (None, 0.0)
        return Window(values, resident, joules, seconds)

    def _run(self) -> None:
        wait = 0.0
        try:
            while not self._stop.wait(wait):
                wait = self._tick()
                self.cpu_seconds = time.thread_time()
        except BaseException as error:  # noqa: BLE001 - a thread has nobody to tell but its cause
            self.cause = f"no telemetry: {type(error).__name__}: {error}"

    def _tick(self) -> float:
        """Do what is due; seconds until something is again."""
        now = self._clock()
        if now >= self._host_due:
            self._look_at_host()
            self._host_due = _next(self._host_due, self._host_interval, now)
        due = [self._host_due]
        if self._nvml is not None:
            try:
                due.append(self._tick_device(now))
            except Unavailable as error:
                self._lose(f"no NVML: {error}")
            except Exception as error:  # noqa: BLE001 - the host's figures go on
                self._lose(f"no NVML: {type(error).__name__}: {error}")
        return max(0.0, min(due) - self._clock())

    def _tick_device(self, now: float) -> float:
        if now >= self._device_due:
            self._look_at_device()
            self._device_due = _next(self._device_due, self._device_interval, now)
        elif self._energy.watching:
            at = self._clock()
            self._add_energy(at, self._nvml.energy(), None)
        return min(self._device_due, self._clock() + WATCH_INTERVAL) if self._energy.watching else self._device_due

    def _look_at_host(self) -> None:
        if self._host is None:
            return
        name, resident = self._section(), self._host.resident()
        with self._lock:
            self._folded.add("host/resident", resident)
            self._resident[name] = max(resident, self._resident.get(name, 0))

    def _look_at_device(self) -> None:
        at = self._clock()
        figures = self._nvml.read(self._sample)
        self._sample += 1
        self._add_energy(at, figures.pop("energy", None), figures.get("power"))
        with self._lock:
            for key, value in figures.items():
                self._folded.add(f"device/{key}", value)
            total = self._energy.total
            if total is not None:
                self._folded.add("device/energy", total)

    def _add_energy(self, at: float, counter: float | None, power: float | None) -> None:
        with self._lock:
            self._energy.add(at, counter=counter, power=power)
            if not self._nvml.has("energy"):
                self._energy.without_counter()

    def _lose(self, cause: str) -> None:
        self.cause = cause
        self._nvml.close()
        self._nvml = None


def _cuda_device(device: torch.device) -> tuple[int, str | None]:
    """Its index among CUDA's, and the UUID by which torch knows it, without a prefix; None where torch has no CUDA."""
    import torch

    if not torch.cuda.is_available():
        return device.index or 0, None
    index = torch.cuda.current_device() if device.index is None else device.index
    return index, str(getattr(torch.cuda.get_device_properties(index), "uuid", "")) or None
