"""One GPU's figures by NVML: which device, each figure, each one missing, and devices that go away."""

import inspect
import os
import sys

import pynvml
import pytest
from fake_nvml import FIGURES, Clock, FakeGpu, FakeNvml, sliced

from engine.telemetry import nvml
from engine.telemetry.nvml import Nvml, Unavailable, throttle_names

UUID = "11111111-aaaa-0000-0000-000000000000"
# Function that says "not supported" -> figures that go with it.
OF_FUNCTION = {
    "nvmlDeviceGetTotalEnergyConsumption": {"energy"},
    "nvmlDeviceGetPowerUsage": {"power"},
    "nvmlDeviceGetUtilizationRates": {"utilization", "memory_utilization"},
    "nvmlDeviceGetClockInfo": {"sm_clock", "memory_clock"},
    "nvmlDeviceGetEnforcedPowerLimit": {"power_limit"},
    "nvmlDeviceGetPcieThroughput": {"pcie_tx", "pcie_rx"},
    "nvmlDeviceGetCurrPcieLinkGeneration": {"pcie_generation"},
    "nvmlDeviceGetCurrPcieLinkWidth": {"pcie_width"},
}
# Newer function -> the older one that is asked then, and the figures.
OLDER = {
    "nvmlDeviceGetMemoryInfo_v2": ("nvmlDeviceGetMemoryInfo", {"memory_used", "memory_reserved", "memory_total"}),
    "nvmlDeviceGetComputeRunningProcesses_v3": ("nvmlDeviceGetComputeRunningProcesses_v2", {"memory_process"}),
    "nvmlDeviceGetTemperatureV": ("nvmlDeviceGetTemperature", {"temperature"}),
    "nvmlDeviceGetCurrentClocksEventReasons": ("nvmlDeviceGetCurrentClocksThrottleReasons", {"throttle_reasons"}),
}


def opened(library, uuid=UUID, environment=None, index=0):
    return Nvml(index, uuid, library, environment or {})


# Figures


def test_every_figure():
    library = FakeNvml()
    device = opened(library)
    assert device.read() == pytest.approx(FIGURES)
    assert device.about == {"name": "NVIDIA H100", "uuid": f"GPU-{UUID}", "mig": False, "driver": "580.10"}
    device.close()
    device.close()
    assert library.opened == 0 and library.calls["nvmlShutdown"] == 1
    library.fail("nvmlSystemGetDriverVersion", "Unknown")
    assert opened(library).about == device.about | {"driver": None}


def test_costly_figures_are_asked_for_seldom():
    library = FakeNvml()
    device = opened(library)
    for sample in range(40):
        device.read(sample)
    asked = {"PowerUsage": 40, "TemperatureV": 10, "ComputeRunningProcesses_v3": 10, "EnforcedPowerLimit": 2,
             "PcieThroughput": 2 * 2}  # fmt: skip
    assert {name: library.calls[f"nvmlDeviceGet{name}"] for name in asked} == asked


@pytest.mark.parametrize("function", OF_FUNCTION)
def test_what_is_not_there_is_left_out_and_not_asked_for_again(function):
    """Whether the driver says so, in one of several ways, or the library is too old to have the function."""
    expected = FIGURES.keys() - OF_FUNCTION[function]
    for error in ("NotSupported", "FunctionNotFound", "NoPermission", "InvalidArgument"):
        library = FakeNvml()
        library.fail(function, error)
        device = opened(library)
        assert device.read().keys() == expected
        asked = library.calls[function]
        assert device.read().keys() == expected and library.calls[function] == asked
    library = FakeNvml()
    library.absent.add(function)
    assert opened(library).read().keys() == expected


@pytest.mark.parametrize("function", OLDER)
def test_older_functions_stand_in(function):
    library, (older, keys) = FakeNvml(), OLDER[function]
    library.fail(function, "FunctionNotFound")
    device, expected = opened(library), FIGURES
    if older == "nvmlDeviceGetMemoryInfo":
        expected = FIGURES | {"memory_used": (10 << 30) + (1 << 29)}
        del expected["memory_reserved"]
    for _ in range(2):
        assert device.read() == pytest.approx(expected) and library.calls[function] == 1
    library.fail(older, "NotSupported")
    assert opened(library).read().keys() == FIGURES.keys() - keys


def test_a_library_and_a_module_of_different_ages():
    library = FakeNvml()
    library.absent |= {"nvmlMemory_v2", "nvmlDeviceGetTemperatureV", "NVMLError_Deprecated", "NVMLError_GpuNotFound"}
    library.absent |= {"NVMLLibraryMismatchError", "nvmlDeviceGetCurrentClocksEventReasons"}
    library.absent |= {f"nvmlDeviceGetComputeRunningProcesses_v{n}" for n in (2, 3)}
    assert opened(library).read().keys() == FIGURES.keys() - {"memory_reserved"}
    library = FakeNvml()
    for version in (2, 3):
        library.fail(f"nvmlDeviceGetComputeRunningProcesses_v{version}", "FunctionNotFound")
    assert opened(library).read().keys() == FIGURES.keys() - {"memory_process"}


@pytest.mark.parametrize("processes", [[], [(1, 1 << 30)], [(os.getpid(), None)]], ids=["none", "others", "unknown"])
def test_own_process_hidden(processes):
    library = FakeNvml(FakeGpu(processes=processes))
    device = opened(library)
    assert device.read().keys() == FIGURES.keys() - {"memory_process"}
    library.gpus[0].processes = [(os.getpid(), 5), (os.getpid(), 6)]  # it may well come later
    assert device.read()["memory_process"] == 11


@pytest.mark.parametrize("error", ["GpuIsLost", "Uninitialized", "DriverNotLoaded", "ResetRequired"])
def test_lost_device(error):
    library = FakeNvml()
    device = opened(library)
    library.fail("nvmlDeviceGetPowerUsage", "Timeout")  # an error that passes leaves a figure out once
    assert "power" not in device.read()
    library.errors.clear()
    assert "power" in device.read()
    library.fail("nvmlDeviceGetUtilizationRates", error)
    with pytest.raises(Unavailable, match="GPU is lost" if error == "GpuIsLost" else "."):
        device.read()


def test_device_that_stays_silent_is_lost():
    library = FakeNvml()
    device = opened(library)
    library.fail("everything", "Unknown")
    assert device.read() == {} and device.read() == {}
    del library.errors["everything"]
    device.read()
    library.fail("everything", "Unknown")
    assert device.read() == {} and device.read() == {}
    with pytest.raises(Unavailable, match="Unknown Error"):
        device.read()
    device = opened(library := FakeNvml())
    library.fail("everything", "NotSupported")
    with pytest.raises(Unavailable, match="supports none"):
        device.read()


def test_energy_counter_alone():
    library = FakeNvml(clock=Clock(20.0))
    device = opened(library)
    assert device.energy() == 6000.0
    library.fail("nvmlDeviceGetTotalEnergyConsumption", "Timeout")
    assert device.energy() is None and device.has("energy")
    library.fail("nvmlDeviceGetTotalEnergyConsumption", "NotSupported")
    assert device.energy() is None and not device.has("energy") and device.has("power")
    assert device.energy() is None


# Opening


def test_nvml_that_cannot_be_opened(monkeypatch):
    """No driver, no such device, no package; what was opened is handed back."""
    library = FakeNvml()
    library.fail("nvmlInit", "DriverNotLoaded")
    with pytest.raises(Unavailable, match="Not Loaded"):
        opened(library)
    assert library.calls["nvmlShutdown"] == 0
    library = FakeNvml()
    with pytest.raises(Unavailable, match="no device 1"):
        opened(library, uuid=None, index=1)
    assert library.opened == 0 and library.calls["nvmlInit"] == 1
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(Unavailable, match="^nvidia-ml-py is not installed$"):
        Nvml(0, None)


def test_instance_has_its_own_memory_and_the_power_of_the_whole():
    library = FakeNvml(sliced(1))
    instance = library.gpus[0].instances[1]
    instance.processes = [(os.getpid(), 77)]
    device = opened(library)
    figures = device.read()
    assert device.about["mig"] and device.about["uuid"].startswith("MIG-0") and "MIG" in device.about["name"]
    assert (figures["memory_used"], figures["memory_total"], figures["memory_process"]) == (1 << 30, 5 << 30, 77)
    assert figures["power"] == 300 and figures["energy"] == 300_000
    asked = library.calls["nvmlDeviceGetPowerUsage"]
    device.read()
    assert library.calls["nvmlDeviceGetPowerUsage"] == asked + 1  # the instance is not asked again
    for function in ("nvmlDeviceGetMemoryInfo_v2", "nvmlDeviceGetMemoryInfo"):
        library.fail(function, "NotSupported", instance)
    assert not {"memory_used", "memory_reserved", "memory_total"} & opened(library).read().keys()  # not the whole GPU's


# Names of reasons, and the real module


def test_throttle_names():
    assert throttle_names(0) == []
    assert throttle_names(0b100100) == ["power cap", "thermal slowdown by software"]
    assert throttle_names(float(1 << 12 | 1)) == ["idle", "bit 12"]
    for bit, name in enumerate(nvml.THROTTLE_REASONS):
        assert getattr(pynvml, f"nvmlClocksThrottleReason{name}") == 1 << bit
        assert getattr(pynvml, f"nvmlClocksEventReason{name}", 1 << bit) == 1 << bit


def test_fake_has_the_real_modules_functions():
    """What the engine asks for and the fake lacks is a figure that test_every_figure misses."""
    assert all(hasattr(pynvml, f"NVMLError_{name}") for name in (*nvml.LOST, *nvml.NEVER))
    for name in (name for name in dir(FakeNvml()) if name.startswith("nvml")):
        ours, theirs = (list(inspect.signature(getattr(of, name)).parameters) for of in (FakeNvml(), pynvml))
        assert ours == theirs, name
