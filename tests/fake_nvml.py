"""A stand-in for the module `pynvml`: GPUs and MIG instances of one's own making, at a time of one's own making.

It has the functions that the engine calls, under their names and with what they return; test_nvml.py compares names,
parameters and constants with the installed module.
"""

import math
import os
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace

CODES = {
    "Uninitialized": 1,
    "InvalidArgument": 2,
    "NotSupported": 3,
    "NoPermission": 4,
    "NotFound": 6,
    "DriverNotLoaded": 9,
    "Timeout": 10,
    "LibraryNotFound": 12,
    "FunctionNotFound": 13,
    "GpuIsLost": 15,
    "ResetRequired": 16,
    "LibRmVersionMismatch": 18,
    "ArgumentVersionMismatch": 25,
    "Deprecated": 26,
    "GpuNotFound": 28,
    "Unknown": 999,
}
TEXTS = {9: "Driver Not Loaded", 12: "NVML Shared Library Not Found", 15: "GPU is lost", 999: "Unknown Error"}


class NVMLError(Exception):
    value = 0

    def __str__(self):
        return TEXTS.get(self.value, f"NVML Error with code {self.value}")

    def __eq__(self, other):  # without a hash, as the real ones are
        return self.value == other.value


ERRORS = {name: type(f"NVMLError_{name}", (NVMLError,), {"value": code}) for name, code in CODES.items()}


class NVMLLibraryMismatchError(Exception):
    """As in the real module no NVMLError."""


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
    joules: object = None  # a function of the time; None: the watts since time 0
    period: float = 0.1  # of the energy counter


class FakeNvml:
    """Give GPUs; `errors[function]` is raised instead of an answer, by that function or for (function, device)."""

    nvmlMemory_v2 = 0x02000028
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    NVML_PCIE_UTIL_TX_BYTES, NVML_PCIE_UTIL_RX_BYTES = 0, 1
    NVMLError, NVMLLibraryMismatchError = NVMLError, NVMLLibraryMismatchError
    # What no MIG instance has by itself.
    ONLY_WHOLE = (
        "nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetPowerUsage", "nvmlDeviceGetEnforcedPowerLimit",
        "nvmlDeviceGetTemperatureV", "nvmlDeviceGetTemperature", "nvmlDeviceGetClockInfo",
        "nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons",
    )  # fmt: skip

    def __init__(self, *gpus: FakeGpu, clock=None):
        self.gpus = list(gpus or [FakeGpu()])
        self.clock = clock or Clock()
        self.errors: dict = {}
        self.absent: set[str] = set()
        self.calls, self.opened = Counter(), 0
        for name, kind in ERRORS.items():
            setattr(self, f"NVMLError_{name}", kind)

    def __getattribute__(self, name):
        if name.startswith(("nvml", "NVML")) and name in object.__getattribute__(self, "absent"):
            raise AttributeError(f"module 'pynvml' has no attribute {name!r}")
        return object.__getattribute__(self, name)

    def fail(self, function: str, error: str, device=None) -> None:
        self.errors[function if device is None else (function, id(device))] = ERRORS[error]()

    def _call(self, function: str, device=None) -> None:
        self.calls[function] += 1
        for key in (function, (function, id(device)), "everything"):
            if key in self.errors:
                raise self.errors[key]
        if not self.opened and function not in ("nvmlInit", "nvmlShutdown"):
            raise ERRORS["Uninitialized"]()
        if isinstance(device, FakeInstance) and function in self.ONLY_WHOLE:
            raise ERRORS["NotSupported"]()

    def _parent(self, device) -> FakeGpu:
        return next(gpu for gpu in self.gpus if gpu is device or device in gpu.instances)

    def nvmlInit(self):
        self._call("nvmlInit")
        self.opened += 1

    def nvmlShutdown(self):
        self._call("nvmlShutdown")
        self.opened -= 1

    def nvmlSystemGetDriverVersion(self):
        self._call("nvmlSystemGetDriverVersion")
        return "580.10"

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
        raise ERRORS["NotFound"]()

    def nvmlDeviceGetUUID(self, handle):
        self._call("nvmlDeviceGetUUID", handle)
        return handle.uuid

    def nvmlDeviceGetName(self, handle):
        self._call("nvmlDeviceGetName", handle)
        return handle.name if isinstance(handle, FakeGpu) else f"{self._parent(handle).name} MIG 1g.5gb"

    def nvmlDeviceGetPciInfo(self, handle):
        self._call("nvmlDeviceGetPciInfo", handle)
        return SimpleNamespace(domain=0, bus=handle.bus, device=0)

    def nvmlDeviceGetMigMode(self, device):
        self._call("nvmlDeviceGetMigMode", device)
        return [int(bool(device.instances))] * 2

    def nvmlDeviceGetMaxMigDeviceCount(self, device):
        self._call("nvmlDeviceGetMaxMigDeviceCount", device)
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, device, index):
        self._call("nvmlDeviceGetMigDeviceHandleByIndex", device)
        if index >= len(device.instances) or device.instances[index] is None:
            raise ERRORS["NotFound"]()
        return device.instances[index]

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, migDevice):
        self._call("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", migDevice)
        return self._parent(migDevice)

    def nvmlDeviceGetGpuInstanceId(self, device):
        self._call("nvmlDeviceGetGpuInstanceId", device)
        return device.gpu_instance

    def nvmlDeviceGetComputeInstanceId(self, device):
        self._call("nvmlDeviceGetComputeInstanceId", device)
        return device.compute_instance

    def nvmlDeviceGetMemoryInfo(self, handle, version=None):
        self._call("nvmlDeviceGetMemoryInfo_v2" if version else "nvmlDeviceGetMemoryInfo", handle)
        reserved = getattr(handle, "reserved", 0)
        if version:
            return SimpleNamespace(version=version, total=handle.total, reserved=reserved, free=0, used=handle.used)
        return SimpleNamespace(total=handle.total, free=0, used=handle.used + reserved)

    def _processes(self, function, handle):
        self._call(function, handle)
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in handle.processes]

    def nvmlDeviceGetComputeRunningProcesses_v3(self, handle):
        return self._processes("nvmlDeviceGetComputeRunningProcesses_v3", handle)

    def nvmlDeviceGetComputeRunningProcesses_v2(self, handle):
        return self._processes("nvmlDeviceGetComputeRunningProcesses_v2", handle)

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        try:
            return self._processes("nvmlDeviceGetComputeRunningProcesses_v3", handle)
        except ERRORS["FunctionNotFound"] as error:
            raise NVMLLibraryMismatchError from error

    def nvmlDeviceGetUtilizationRates(self, handle):
        self._call("nvmlDeviceGetUtilizationRates", handle)
        gpu, memory = self._parent(handle).utilization
        return SimpleNamespace(gpu=gpu, memory=memory)

    def nvmlDeviceGetClockInfo(self, handle, type):
        self._call("nvmlDeviceGetClockInfo", handle)
        return {self.NVML_CLOCK_SM: 1980, self.NVML_CLOCK_MEM: 2619}[type]

    def nvmlDeviceGetTemperatureV(self, handle, sensor, version=0x100000C):
        self._call("nvmlDeviceGetTemperatureV", handle)
        return handle.temperature

    def nvmlDeviceGetTemperature(self, handle, sensor):
        self._call("nvmlDeviceGetTemperature", handle)
        return handle.temperature

    def nvmlDeviceGetPowerUsage(self, handle):
        self._call("nvmlDeviceGetPowerUsage", handle)
        watts = handle.watts(self.clock()) if callable(handle.watts) else handle.watts
        return round(watts * 1000)

    def nvmlDeviceGetEnforcedPowerLimit(self, handle):
        self._call("nvmlDeviceGetEnforcedPowerLimit", handle)
        return 700_000

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        self._call("nvmlDeviceGetTotalEnergyConsumption", handle)
        moved = math.floor(self.clock() / handle.period + 1e-9) * handle.period
        return round(1000 * (handle.joules(moved) if handle.joules else handle.watts * moved))

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle):
        self._call("nvmlDeviceGetCurrentClocksEventReasons", handle)
        return handle.reasons

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):
        self._call("nvmlDeviceGetCurrentClocksThrottleReasons", handle)
        return handle.reasons

    def nvmlDeviceGetPcieThroughput(self, device, counter):
        self._call("nvmlDeviceGetPcieThroughput", device)
        return {self.NVML_PCIE_UTIL_TX_BYTES: 12, self.NVML_PCIE_UTIL_RX_BYTES: 34}[counter]

    def nvmlDeviceGetCurrPcieLinkGeneration(self, handle):
        self._call("nvmlDeviceGetCurrPcieLinkGeneration", handle)
        return 5

    def nvmlDeviceGetCurrPcieLinkWidth(self, handle):
        self._call("nvmlDeviceGetCurrPcieLinkWidth", handle)
        return 16


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
