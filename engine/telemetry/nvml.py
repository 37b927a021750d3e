"""One GPU's state by NVML, through the module `pynvml` of nvidia-ml-py.

Every figure is optional by itself: what a device, a driver or a library does not have is left out, and not asked for again.
In MIG mode a figure that an instance does not have is that of the whole GPU; memory never is. Units are those of the
metrics: bytes, bytes a second, percent, MHz, degrees Celsius, watts, joules.

torch.cuda reads four of these figures by the same module (utilization, power_draw, temperature, clock_rate), but no energy,
throttling, PCIe or MIG instance; hence not by it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from engine.telemetry.visible import Instance, Unresolved, find

# Bits of nvmlDeviceGetCurrentClocksEventReasons, in NVML's order; a test compares them with nvidia-ml-py's constants.
THROTTLE_REASONS = {
    "GpuIdle": "idle",
    "ApplicationsClocksSetting": "application clocks",
    "SwPowerCap": "power cap",
    "HwSlowdown": "hardware slowdown",
    "SyncBoost": "sync boost",
    "SwThermalSlowdown": "thermal slowdown by software",
    "HwThermalSlowdown": "thermal slowdown by hardware",
    "HwPowerBrakeSlowdown": "power brake",
    "DisplayClockSetting": "display clocks",
    "BoardLimit": "board limit",
    "Reliability": "reliability limit",
}
LOST = ("GpuIsLost", "Uninitialized", "DriverNotLoaded", "LibRmVersionMismatch", "ResetRequired", "GpuNotFound")
NEVER = ("NotSupported", "FunctionNotFound", "NoPermission", "ArgumentVersionMismatch", "InvalidArgument", "Deprecated")
SILENT_SAMPLES = 3  # so many without a single answer, and the device counts as lost


class Unavailable(Exception):
    """There is no, or no longer any, telemetry of the device; the message is the cause."""


Way = Callable[[Any, Any], dict[str, float]]  # (library, handle) -> figures


@dataclass
class Field:
    """Figures that come from one call, and the ways to ask for them, newest first."""

    name: str
    ways: tuple[Way, ...]
    every: int = 1  # samples from one question to the next: a call may cost a millisecond, those of PCIe 20
    own: bool = False  # an instance's own figure or none: that of the whole GPU would mislead


def _memory(library, handle) -> dict[str, float]:
    memory = library.nvmlDeviceGetMemoryInfo(handle, version=library.nvmlMemory_v2)
    return {"memory_used": memory.used, "memory_reserved": memory.reserved, "memory_total": memory.total}


def _memory_v1(library, handle) -> dict[str, float]:
    memory = library.nvmlDeviceGetMemoryInfo(handle)  # what the driver reserves is part of `used` here
    return {"memory_used": memory.used, "memory_total": memory.total}


def _of_this_process(function: str) -> Way:
    def way(library, handle) -> dict[str, float]:
        # In a container the numbers may be those of the host: then ours is not among them.
        ours = [each for each in getattr(library, function)(handle) if each.pid == os.getpid()]
        known = [each.usedGpuMemory for each in ours if each.usedGpuMemory is not None]
        return {"memory_process": sum(known)} if known else {}

    return way


def _utilization(library, handle) -> dict[str, float]:
    rates = library.nvmlDeviceGetUtilizationRates(handle)
    return {"utilization": rates.gpu, "memory_utilization": rates.memory}


def _number(key: str, function: str, *constants: str, factor: float = 1) -> Way:
    """`function(handle, *constants)` times `factor`."""

    def way(library, handle) -> dict[str, float]:
        return {key: factor * getattr(library, function)(handle, *(getattr(library, name) for name in constants))}

    return way


def _fields() -> list[Field]:
    processes = [f"nvmlDeviceGetComputeRunningProcesses{version}" for version in ("_v3", "_v2", "")]
    reasons = ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")
    sensors = ("nvmlDeviceGetTemperatureV", "nvmlDeviceGetTemperature")
    pcie = "nvmlDeviceGetPcieThroughput"  # in KB/s, taken as 1000 bytes
    return [
        # First, for they are booked to the time at which a sample begins.
        Field("energy", (_number("energy", "nvmlDeviceGetTotalEnergyConsumption", factor=1e-3),)),
        Field("power", (_number("power", "nvmlDeviceGetPowerUsage", factor=1e-3),)),
        Field("memory", (_memory, _memory_v1), own=True),
        Field("utilization", (_utilization,)),
        Field("sm_clock", (_number("sm_clock", "nvmlDeviceGetClockInfo", "NVML_CLOCK_SM"),)),
        Field("memory_process", tuple(map(_of_this_process, processes)), every=4, own=True),
        Field("memory_clock", (_number("memory_clock", "nvmlDeviceGetClockInfo", "NVML_CLOCK_MEM"),), every=4),
        Field("temperature", tuple(_number("temperature", name, "NVML_TEMPERATURE_GPU") for name in sensors), every=4),
        Field("throttle_reasons", tuple(_number("throttle_reasons", name) for name in reasons), every=4),
        Field("power_limit", (_number("power_limit", "nvmlDeviceGetEnforcedPowerLimit", factor=1e-3),), every=20),
        Field("pcie_tx", (_number("pcie_tx", pcie, "NVML_PCIE_UTIL_TX_BYTES", factor=1000),), every=20),
        Field("pcie_rx", (_number("pcie_rx", pcie, "NVML_PCIE_UTIL_RX_BYTES", factor=1000),), every=20),
        Field("pcie_generation", (_number("pcie_generation", "nvmlDeviceGetCurrPcieLinkGeneration"),), every=20),
        Field("pcie_width", (_number("pcie_width", "nvmlDeviceGetCurrPcieLinkWidth"),), every=20),
    ]


@dataclass
class _Asked:
    """A field and what is left to try for it: (way, handle)."""

    field: Field
    tries: list[tuple[Way, Any]] = field(default_factory=list)


class Nvml:
    """Readings of CUDA's device `index`, until `close()`.

    Raises:
        Unavailable: the library, the driver or the device is not there.
    """

    def __init__(self, index: int, uuid: str | None, library=None, environment: Mapping[str, str] | None = None):
        self._library = library = library if library is not None else _library()
        self._lost, self._never = _errors(library, LOST), (AttributeError, *_errors(library, NEVER))
        self._never += (getattr(library, "NVMLLibraryMismatchError", AttributeError),)
        self._silent, self._open = 0, False
        try:
            library.nvmlInit()
            self._open = True
            found = find(library, index, uuid, os.environ if environment is None else environment)
            self.mig = isinstance(found, Instance)
            gpu = library.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(found.handle) if self.mig else found.handle
            self.about = self._about(found)
        except (library.NVMLError, Unresolved) as error:
            self.close()
            raise Unavailable(str(error)) from error
        except BaseException:
            self.close()
            raise
        handles = [found.handle, gpu] if self.mig else [gpu]
        self._asked = [
            _Asked(each, [(way, handle) for handle in handles[: 1 if each.own else None] for way in each.ways])
            for each in _fields()
        ]

    def _about(self, found) -> dict[str, Any]:
        asked = {
            "name": lambda: self._library.nvmlDeviceGetName(found.handle),  # an instance's names its profile too
            "driver": self._library.nvmlSystemGetDriverVersion,
        }
        about = {"name": None, "uuid": found.uuid, "mig": self.mig, "driver": None}
        for key, ask in asked.items():
            with suppress(self._library.NVMLError):
                about[key] = ask()
        return about

    def has(self, name: str) -> bool:
        """Whether field `name` is still asked for."""
        return any(asked.field.name == name for asked in self._asked)

    def read(self, sample: int = 0) -> dict[str, float]:
        """The figures due at this sample, counted from 0; at 0 all are.

        Raises:
            Unavailable: the device is gone.
        """
        due = [asked for asked in self._asked if sample % asked.field.every == 0]
        answers = [self._ask(asked) for asked in due]
        self._asked = [asked for asked in self._asked if asked.tries]
        if not self._asked:
            raise Unavailable("the device supports none of the figures")
        known = [answer for answer in answers if isinstance(answer, dict)]
        errors = [answer for answer in answers if isinstance(answer, Exception)]
        self._silent = self._silent + 1 if errors and not known else 0
        if self._silent >= SILENT_SAMPLES:
            raise Unavailable(str(errors[0]))
        return {key: value for answer in known for key, value in answer.items()}

    def energy(self) -> float | None:
        """The energy counter in joules, alone; None where it says nothing now. Raises as `read` does."""
        for asked in self._asked:
            if asked.field.name == "energy" and asked.tries:
                answer = self._ask(asked)
                self._asked = [each for each in self._asked if each.tries]
                return answer["energy"] if isinstance(answer, dict) else None
        return None

    def _ask(self, asked: _Asked) -> dict[str, float] | Exception | None:
        """The figures; the error of a call that may do better next time; None where nothing is left to try."""
        while asked.tries:
            way, handle = asked.tries[0]
            try:
                return way(self._library, handle)
            except self._lost as error:
                raise Unavailable(str(error)) from error
            except self._never:
                del asked.tries[0]
            except self._library.NVMLError as error:
                return error
        return None

    def close(self) -> None:
        """Hand NVML back; what it says to that is of no interest."""
        if self._open:
            self._open = False
            with suppress(self._library.NVMLError):
                self._library.nvmlShutdown()


def throttle_names(mask: int) -> list[str]:
    """What keeps the clocks down, in words, for a value of "device/throttle_reasons"; [] where nothing does."""
    names = list(THROTTLE_REASONS.values())
    bits = [bit for bit in range(int(mask).bit_length()) if int(mask) >> bit & 1]
    return [names[bit] if bit < len(names) else f"bit {bit}" for bit in bits]


def _library():
    try:
        import pynvml
    except ModuleNotFoundError as error:
        raise Unavailable("nvidia-ml-py is not installed") from error
    return pynvml


def _errors(library, names: tuple[str, ...]) -> tuple[type[Exception], ...]:
    """The library's exceptions of these names; an old one has fewer."""
    classes = (getattr(library, f"NVMLError_{name}", None) for name in names)
    return tuple(each for each in classes if each is not None)
