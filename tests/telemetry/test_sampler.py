"""The sampler's windows, with its clock in hand; its thread has test_sampler_thread.py."""

import json
import sys
import time

import pytest
import torch
from fake_nvml import FakeGpu, FakeInstance, FakeNvml

from engine.telemetry import host, sampler
from engine.telemetry.sampler import Sampler

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def no_torch_device(monkeypatch):
    """On a machine with a GPU too, it is the fake one that is looked at."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def make():
    """Samplers whose clock is the fake library's, closed at the end; `run` lets time pass without a thread."""
    made = []

    def make(*gpus, device=CUDA, section=lambda: "pilot", **settings):
        library = FakeNvml(*gpus)
        made.append(Sampler(device, section, library=library, clock=library.clock, **settings))
        return library, made[-1]

    yield make
    for each in made:
        each.close()


def run(library, sampler, seconds):
    """Ticks as the thread makes them, in fake time."""
    end = library.clock.now + seconds
    while library.clock.now < end - 1e-9:
        library.clock.now += max(min(sampler._tick(), end - library.clock.now), 1e-4)


# Causes


def test_no_gpu_telemetry_on_a_cpu():
    watched = Sampler(CPU, lambda: "pilot", library=FakeNvml())
    assert watched.cause == "no NVML: the device is cpu" and watched.device is None
    watched.close()


def test_no_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert Sampler(CUDA, str).cause == "no NVML: nvidia-ml-py is not installed"


def test_no_driver():
    """The real module where there is no driver, as on a machine without a GPU; its words where there is none here."""
    library = FakeNvml()
    library.fail("nvmlInit", "LibraryNotFound")
    assert Sampler(CUDA, str, library=library).cause == "no NVML: NVML Shared Library Not Found"
    real = Sampler(CUDA, str)
    assert real.cause is None or real.cause.startswith("no NVML: ")
    real.close()


def test_broken_package_is_a_cause():
    cause = Sampler(CUDA, str, library=object()).cause
    assert cause.startswith("no NVML: AttributeError")


def test_device_that_torch_names_by_uuid(monkeypatch):
    gpus = [FakeGpu("GPU-aa", bus=1), FakeGpu("GPU-bb", bus=2)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    named = {0: "bb", 1: "aa"}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: type("Properties", (), {"uuid": named[i]}))
    for device, expected in (("cuda", "GPU-bb"), ("cuda:0", "GPU-bb"), ("cuda:1", "GPU-aa")):
        watched = Sampler(torch.device(device), str, library=FakeNvml(*gpus))
        assert watched.device["uuid"] == expected
        watched.close()


def test_device_of_the_environment_where_torch_does_not_tell(monkeypatch):
    gpus = [FakeGpu("GPU-aa", bus=1), FakeGpu("GPU-bb", bus=2)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    watched = Sampler(CUDA, str, library=FakeNvml(*gpus))
    assert watched.device == {"name": "NVIDIA H100", "uuid": "GPU-bb", "mig": False, "driver": "580.10"}
    assert json.loads(json.dumps(watched.device)) == watched.device
    watched.close()


# Windows


def test_a_window_holds_every_key(make):
    library, watched = make()
    run(library, watched, 6)
    window = watched.window()
    assert window.values.keys() == {"host/resident", "host/cpu"} | {
        f"device/{key}"
        for key in (
            "memory_used", "memory_reserved", "memory_total", "memory_process", "utilization", "memory_utilization",
            "sm_clock", "memory_clock", "temperature", "power", "power_limit", "energy", "throttle_reasons",
            "pcie_tx", "pcie_rx", "pcie_generation", "pcie_width",
        )
    }  # fmt: skip
    assert window.values["device/memory_used"] == 10 << 30
    assert window.values["device/throttle_reasons"] == 0 and isinstance(window.values["device/throttle_reasons"], int)
    assert window.values["device/energy"] == pytest.approx(6 * 300, rel=0.1)
    assert not window.whole_device
    assert watched.window().values.keys() == {"host/resident", "host/cpu"}  # nothing of the device since


def test_means_maxima_last_values_and_all_reasons(make):
    gpu = FakeGpu()
    library, watched = make(gpu, device_interval=1.0)
    for utilization, temperature, used, watts, reasons in (
        (10, 50, 5, 100, 4),
        (20, 80, 9, 200, 0),
        (60, 60, 7, 300, 32),
    ):
        for _ in range(4):  # temperature and reasons are asked for at each fourth sample
            gpu.utilization, gpu.temperature, gpu.used, gpu.watts = (utilization, 1), temperature, used, watts
            gpu.reasons = reasons
            watched._look_at_device()
            library.clock.now += 1
    gpu.total = 1
    watched._look_at_device()
    values = watched.window().values
    assert values["device/utilization"] == pytest.approx((40 + 80 + 240 + 60) / 13)
    assert values["device/power"] == pytest.approx((400 + 800 + 1200 + 300) / 13)
    assert values["device/temperature"] == 80 and values["device/memory_used"] == 9
    assert values["device/memory_total"] == 1
    assert values["device/throttle_reasons"] == 36
    watched._look_at_device()
    assert watched.window().values["device/utilization"] == 60  # nothing of an earlier window


def test_cadences(make):
    library, watched = make()
    run(library, watched, 3)  # an energy counter is watched for at most 2 s at first
    looked, asked = watched._host.resident, library.calls["nvmlDeviceGetPowerUsage"]
    looks = []
    watched._host.resident = lambda: looks.append(0) or looked()
    counters = library.calls["nvmlDeviceGetTotalEnergyConsumption"]
    run(library, watched, 10)
    assert len(looks) == pytest.approx(100, abs=2)
    assert library.calls["nvmlDeviceGetPowerUsage"] - asked == pytest.approx(40, abs=1)
    assert library.calls["nvmlDeviceGetTotalEnergyConsumption"] - counters == pytest.approx(40, abs=1)


def test_what_was_missed_is_not_made_up_for(make):
    library, watched = make()
    run(library, watched, 3)
    before = library.calls["nvmlDeviceGetPowerUsage"]
    library.clock.now += 60  # the machine slept
    run(library, watched, 0.2)
    assert library.calls["nvmlDeviceGetPowerUsage"] - before == 1


def test_resident_peaks_by_section(make, monkeypatch):
    now = {"section": "pilot", "resident": 5}
    library, watched = make(device=CPU, section=lambda: now["section"])
    monkeypatch.setattr(watched._host, "resident", lambda: now["resident"])
    for section, resident in (("pilot", 5), ("quiz", 9), ("pilot", 7), ("quiz", 3), ("logging", 4)):
        now.update(section=section, resident=resident)
        run(library, watched, 0.1)
    window = watched.window()
    assert window.resident == {"pilot": 7, "quiz": 9, "logging": 4}
    assert window.values["host/resident"] == 9
    now["resident"] = 2
    assert watched.window().resident == {"logging": 2}


def test_host_figures_are_this_processs():
    watched = Sampler(CPU, lambda: "pilot")
    watched.window()
    held = bytearray(64 << 20)
    began = time.process_time()
    while time.process_time() - began < 0.1:
        pass
    window = watched.window()
    assert 20 < window.values["host/cpu"] < 1000  # it may have to share its core, or have helpers
    assert window.values["host/resident"] > len(held)
    assert window.resident == {"pilot": window.values["host/resident"]}
    assert (window.joules, window.seconds, window.whole_device) == (None, 0.0, False)
    watched.close()


def test_cpu_needs_time_to_have_passed(monkeypatch):
    clock = {"time": 5.0, "busy": 1.0}
    monkeypatch.setattr(host.time, "monotonic", lambda: clock["time"])
    monkeypatch.setattr(host.time, "process_time", lambda: clock["busy"])
    counted = host.Host()
    assert counted.cpu() is None
    clock.update(time=7.0, busy=4.0)
    assert counted.cpu() == 150
    clock.update(time=8.0)
    assert counted.cpu() == 0


# Energy


def test_joules_of_windows(make):
    library, watched = make(FakeGpu(watts=250.0))
    run(library, watched, 0.5)
    assert watched.window().joules is None and watched.energy_source is None  # not known yet
    run(library, watched, 5)
    first = watched.window()
    assert watched.energy_source == "counter"
    assert 4.5 < first.seconds <= 5.5 and first.joules == pytest.approx(250 * first.seconds, rel=0.03)
    run(library, watched, 0.5)
    assert watched.window().joules is None  # too short for a counter that moves every 0.1 s
    run(library, watched, 1)
    carried = watched.window()
    assert carried.seconds == pytest.approx(1.5, abs=0.26)
    assert carried.joules == pytest.approx(250 * carried.seconds, rel=0.1)


def test_the_counter_is_watched_for_a_bounded_time(make):
    library, watched = make(FakeGpu(watts=0.0))  # it never moves
    run(library, watched, 2.1)
    asked = library.calls["nvmlDeviceGetTotalEnergyConsumption"]
    assert asked < 450
    run(library, watched, 1)
    assert library.calls["nvmlDeviceGetTotalEnergyConsumption"] - asked <= 5

    library, watched = make()
    run(library, watched, 0.02)
    library.fail("nvmlDeviceGetTotalEnergyConsumption", "Timeout")  # nor does it answer
    run(library, watched, 3)
    asked = library.calls["nvmlDeviceGetTotalEnergyConsumption"]
    run(library, watched, 1)
    assert library.calls["nvmlDeviceGetTotalEnergyConsumption"] - asked <= 5
    assert watched.energy_source == "power"


def test_power_is_integrated_without_a_counter(make):
    library, watched = make(FakeGpu(watts=lambda now: 100 + 10 * (now - 1000)))
    library.fail("nvmlDeviceGetTotalEnergyConsumption", "NotSupported")
    watched.close()
    watched = Sampler(CUDA, str, library=library, clock=library.clock)
    run(library, watched, 4.01)
    window = watched.window()
    assert watched.energy_source == "power" and window.seconds == pytest.approx(4, abs=0.001)
    assert window.joules == pytest.approx(100 * 4 + 5 * 16, abs=0.1)
    assert window.values["device/energy"] == pytest.approx(window.joules)
    watched.close()


def test_counter_that_is_taken_back_while_it_is_watched(make):
    library, watched = make()
    run(library, watched, 0.1)
    library.fail("nvmlDeviceGetTotalEnergyConsumption", "NotSupported")
    run(library, watched, 0.5)
    assert watched.energy_source == "power" and not watched._energy.watching
    assert watched.window().joules == pytest.approx(150, abs=0.1)


def test_energy_of_an_instance_is_the_whole_gpus(make):
    library, watched = make(FakeGpu(instances=[FakeInstance("MIG-1")]))
    assert watched.device["mig"]
    run(library, watched, 3)
    window = watched.window()
    assert watched.whole >= {"device/power", "device/temperature"} and "device/memory_used" not in watched.whole
    assert window.whole_device and window.joules == pytest.approx(300 * window.seconds, rel=0.05)
    library.fail("everything", "GpuIsLost")
    run(library, watched, 1)
    assert watched.window().whole_device


# Errors during the run


@pytest.mark.parametrize("when", ["while the counter is watched", "later"])
def test_lost_device_ends_its_part_alone(make, when):
    library, watched = make()
    run(library, watched, 0.1 if when != "later" else 3)
    library.fail("everything", "GpuIsLost")
    run(library, watched, 1)
    assert watched.cause == "no NVML: GPU is lost"
    asked = sum(library.calls.values())
    watched.window()
    run(library, watched, 1)
    assert sum(library.calls.values()) == asked
    assert watched.window().values.keys() == {"host/resident", "host/cpu"}
    assert watched.device["name"] == "NVIDIA H100"


def test_error_of_an_unknown_kind_ends_the_devices_part_alone(make):
    library, watched = make()
    library.errors["nvmlDeviceGetPowerUsage"] = OSError("what is this")
    run(library, watched, 1)
    assert watched.cause == "no NVML: OSError: what is this" and library.opened == 0
    assert "host/resident" in watched.window().values


# Costs


def test_memory_is_bounded(make):
    library, watched = make()
    run(library, watched, 10)
    sizes = [len(watched._folded._figures), len(watched._resident), len(watched._energy.watch.changes)]
    run(library, watched, 100)
    assert [len(watched._folded._figures), len(watched._resident), len(watched._energy.watch.changes)] == sizes


def test_a_window_is_cheap(make):
    library, watched = make()
    run(library, watched, 6)
    calls = sum(library.calls.values())
    began = time.perf_counter()
    for _ in range(100):
        watched.window()
    assert (time.perf_counter() - began) / 100 < 2e-3  # 0.05 ms; the machine may be busy
    assert sum(library.calls.values()) == calls


def test_a_host_that_cannot_be_read_is_a_cause(monkeypatch):
    monkeypatch.setattr(sampler, "Host", lambda: (_ for _ in ()).throw(ImportError("No module named 'psutil'")))
    watched = Sampler(CPU, lambda: "pilot")
    watched.start()
    assert watched.window().values == {}
    assert (
        watched.cause == "no telemetry of the host: ImportError: No module named 'psutil'; no NVML: the device is cpu"
    )
    watched.close()
