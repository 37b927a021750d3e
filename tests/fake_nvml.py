"""A stand-in for the module `pynvml`: GPUs and MIG instances of one's own making, at a time of one's own making.

It has the functions that the engine calls, under their names and with what they return; constants and errors are the real
module's. test_nvml.py compares names and parameters.
"""

import functools
import math
import os
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace

import pynvml


def error(name: str) -> pynvml.NVMLError:
    return getattr(pynvml, f"NVMLError_{name}")()


class Clock:
    def __init__(self, now: float = 1000.0):
        self.now = now

    def __call__(self) -> float:
        return self.now


@dataclass(eq=False)
class FakeInstance:
    uuid: str
    gpu_instance: int = 1
    compute_instance: int = 0
    used: int = 1 << 30
    total: int = 5 << 30
    processes: list = field(default_factory=list)


@dataclass(eq=False)
class FakeGpu:
    uuid: str = "GPU-11111111-aaaa-0000-0000-000000000000"
    name: str = "NVIDIA H100"
    bus: int = 1
    used: int = 10 << 30
    reserved: int = 1 << 29
    total: int = 80 << 30
    instances: list = field(default_factory=list)  # None: an empty slot
    processes: list = field(default_factory=lambda: [(os.getpid(), 3 << 30), (1, 1 << 30)])
    reasons: int = 0
    temperature: int = 50
    utilization: tuple = (90, 40)
    watts: object = 300.0  # or a function of the time
    period: float = 0.1  # of the energy counter


def of_processes(handle):
    return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in handle.processes]


# What the simple ones of the library's functions answer.
ANSWERS = {
    "nvmlSystemGetDriverVersion": lambda: "580.10",
    "nvmlDeviceGetUUID": lambda handle: handle.uuid,
    "nvmlDeviceGetPciInfo": lambda handle: SimpleNamespace(domain=0, bus=handle.bus, device=0),
    "nvmlDeviceGetMigMode": lambda device: [int(bool(device.instances))] * 2,
    "nvmlDeviceGetMaxMigDeviceCount": lambda device: 7,
    "nvmlDeviceGetGpuInstanceId": lambda device: device.gpu_instance,
    "nvmlDeviceGetComputeInstanceId": lambda device: device.compute_instance,
    "nvmlDeviceGetComputeRunningProcesses_v3": of_processes,
    "nvmlDeviceGetComputeRunningProcesses_v2": of_processes,
    "nvmlDeviceGetClockInfo": lambda handle, type: {pynvml.NVML_CLOCK_SM: 1980, pynvml.NVML_CLOCK_MEM: 2619}[type],
    "nvmlDeviceGetTemperatureV": lambda handle, sensor, version=0x100000C: handle.temperature,
    "nvmlDeviceGetTemperature": lambda handle, sensor: handle.temperature,
    "nvmlDeviceGetEnforcedPowerLimit": lambda handle: 700_000,
    "nvmlDeviceGetCurrentClocksEventReasons": lambda handle: handle.reasons,
    "nvmlDeviceGetCurrentClocksThrottleReasons": lambda handle: handle.reasons,
    "nvmlDeviceGetPcieThroughput": lambda device, counter: {pynvml.NVML_PCIE_UTIL_TX_BYTES: 12,
                                                            pynvml.NVML_PCIE_UTIL_RX_BYTES: 34}[counter],
    "nvmlDeviceGetCurrPcieLinkGeneration": lambda handle: 5,
    "nvmlDeviceGetCurrPcieLinkWidth": lambda handle: 16,
}  # fmt: skip
# What no MIG instance has by itself.
ONLY_WHOLE = {f"nvmlDeviceGet{name}" for name in (
    "TotalEnergyConsumption", "PowerUsage", "EnforcedPowerLimit", "TemperatureV", "Temperature", "ClockInfo",
    "CurrentClocksEventReasons", "CurrentClocksThrottleReasons",
)}  # fmt: skip


class FakeNvml:
    """Give GPUs; `errors[function]` is raised instead of an answer, by that function or for (function, device)."""

    def __init__(self, *gpus: FakeGpu, clock=None):
        self.gpus = list(gpus or [FakeGpu()])
        self.clock = clock or Clock()
        self.errors: dict = {}
        self.absent: set[str] = set()
        self.calls, self.opened = Counter(), 0
        for name, answer in ANSWERS.items():
            setattr(self, name, self._asked(name, answer))

    def __getattribute__(self, name):
        if name.startswith(("nvml", "NVML")) and name in object.__getattribute__(self, "absent"):
            raise AttributeError
        return object.__getattribute__(self, name)

    def __getattr__(self, name):
        if name in self.absent or not name.startswith(("NVML", "nvmlMemory")):
            raise AttributeError(f"module 'pynvml' has no attribute {name!r}")
        return getattr(pynvml, name)

    def fail(self, function: str, kind: str, device=None) -> None:
        self.errors[function if device is None else (function, id(device))] = error(kind)

    def _asked(self, name, answer):
        @functools.wraps(answer)
        def call(*given):
            self._call(name, *given[:1])
            return answer(*given)

        return call

    def _call(self, function: str, device=None) -> None:
        self.calls[function] += 1
        for key in (function, (function, id(device)), "everything"):
            if key in self.errors:
                raise self.errors[key]
        if not self.opened and function not in ("nvmlInit", "nvmlShutdown"):
            raise error("Uninitialized")
        if isinstance(device, FakeInstance) and function in ONLY_WHOLE:
            raise error("NotSupported")

    def _parent(self, device) -> FakeGpu:
        return next(gpu for gpu in self.gpus if gpu is device or device in gpu.instances)

    def nvmlInit(self):
        self._call("nvmlInit")
        self.opened += 1

    def nvmlShutdown(self):
        self._call("nvmlShutdown")
        self.opened -= 1

    def nvmlDeviceGetCount(self):
        self._call("nvmlDeviceGetCount")
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index):
        self._call("nvmlDeviceGetHandleByIndex", self.gpus[index])
        return self.gpus[index]

    def nvmlDeviceGetHandleByUUID(self, uuid):
        self._call("nvmlDeviceGetHandleByUUID")
        devices = [each for gpu in self.gpus for each in (gpu, *gpu.instances) if each is not None]
        for device in devices:
            if device.uuid == uuid:
                return device
        raise error("NotFound")

    def nvmlDeviceGetName(self, handle):
        self._call("nvmlDeviceGetName", handle)
        return handle.name if isinstance(handle, FakeGpu) else f"{self._parent(handle).name} MIG 1g.5gb"

    def nvmlDeviceGetMigDeviceHandleByIndex(self, device, index):
        self._call("nvmlDeviceGetMigDeviceHandleByIndex", device)
        if index >= len(device.instances) or device.instances[index] is None:
            raise error("NotFound")
        return device.instances[index]

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, migDevice):
        self._call("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", migDevice)
        return self._parent(migDevice)

    def nvmlDeviceGetMemoryInfo(self, handle, version=None):
        self._call("nvmlDeviceGetMemoryInfo_v2" if version else "nvmlDeviceGetMemoryInfo", handle)
        reserved = getattr(handle, "reserved", 0)
        if version:
            return SimpleNamespace(version=version, total=handle.total, reserved=reserved, free=0, used=handle.used)
        return SimpleNamespace(total=handle.total, free=0, used=handle.used + reserved)

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        try:
            self._call("nvmlDeviceGetComputeRunningProcesses_v3", handle)
        except pynvml.NVMLError_FunctionNotFound as e:
            raise pynvml.NVMLLibraryMismatchError from e
        return of_processes(handle)

    def nvmlDeviceGetUtilizationRates(self, handle):
        self._call("nvmlDeviceGetUtilizationRates", handle)
        gpu, memory = self._parent(handle).utilization
        return SimpleNamespace(gpu=gpu, memory=memory)

    def nvmlDeviceGetPowerUsage(self, handle):
        self._call("nvmlDeviceGetPowerUsage", handle)
        watts = handle.watts(self.clock()) if callable(handle.watts) else handle.watts
        return round(watts * 1000)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        self._call("nvmlDeviceGetTotalEnergyConsumption", handle)
        moved = math.floor(self.clock() / handle.period + 1e-9) * handle.period
        return round(1000 * handle.watts * moved)


def sliced(count=2, **settings) -> FakeGpu:
    """A GPU in MIG mode; its first slot is empty."""
    instances = [FakeInstance(f"MIG-{n}0000000-0000-0000-0000-000000000000", 7 + n, n) for n in range(count)]
    return FakeGpu(instances=[None, *instances], **settings)


# What the engine makes of the answers of a FakeGpu at the clock's first time.
FIGURES = {
    "energy": 300_000.0,
    "power": 300.0,
    "memory_used": 10 << 30,
    "memory_reserved": 1 << 29,
    "memory_total": 80 << 30,
    "memory_process": 3 << 30,
    "utilization": 90,
    "memory_utilization": 40,
    "sm_clock": 1980,
    "memory_clock": 2619,
    "temperature": 50,
    "throttle_reasons": 0,
    "power_limit": 700.0,
    "pcie_tx": 12_000,
    "pcie_rx": 34_000,
    "pcie_generation": 5,
    "pcie_width": 16,
}
