"""The sampler's windows, with its clock in hand; its thread has test_sampler_thread.py."""

import json
import sys

import pytest
import torch
from fake_nvml import FIGURES, FakeGpu, FakeNvml, error

from engine.telemetry import host, sampler
from engine.telemetry.sampler import Sampler

pytestmark = pytest.mark.usefixtures("no_torch_device")
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
COUNTER, POWER = "nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetPowerUsage"


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


def test_no_telemetry_of_the_device_or_the_host_is_a_cause(monkeypatch):
    without = FakeNvml()
    without.fail("nvmlInit", "LibraryNotFound")
    for device, library, cause in (
        (CPU, FakeNvml(), "no NVML: the device is cpu"),
        (CUDA, without, "no NVML: NVML Shared Library Not Found"),
        (CUDA, object(), "no NVML: AttributeError"),  # a broken package
        (CUDA, None, ("no NVML: ", "None")),  # the real one, where there may be no driver
    ):
        watched = Sampler(device, str, library=library)
        assert str(watched.cause).startswith(cause) and (watched.device is None or watched.cause is None)
        watched.close()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert Sampler(CUDA, str).cause == "no NVML: nvidia-ml-py is not installed"
    monkeypatch.setattr(sampler, "Host", lambda: (_ for _ in ()).throw(ImportError("No module named 'psutil'")))
    watched = Sampler(CPU, str)
    assert watched.window().values == {}
    said = "no telemetry of the host: ImportError: No module named 'psutil'; no NVML: the device is cpu"
    assert watched.cause == said
    watched.close()


def test_device_that_torch_names_by_uuid(monkeypatch):
    """Where torch does not tell, the environment does."""
    gpus, named = [FakeGpu("GPU-aa", bus=1), FakeGpu("GPU-bb", bus=2)], {0: "bb", 1: "aa"}

    def device(name):
        watched = Sampler(torch.device(name), str, library=FakeNvml(*gpus))
        watched.close()
        return watched.device

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert device("cuda:0") == {"name": "NVIDIA H100", "uuid": "GPU-bb", "mig": False, "driver": "580.10"}
    assert json.loads(json.dumps(device("cuda:0"))) == device("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: type("Properties", (), {"uuid": named[i]}))
    assert [device(name)["uuid"] for name in ("cuda", "cuda:0", "cuda:1")] == ["GPU-bb", "GPU-bb", "GPU-aa"]


# Windows


def test_a_window_holds_every_key_and_asks_the_device_for_nothing(make):
    library, watched = make()
    run(library, watched, 6)
    calls, window, again = sum(library.calls.values()), watched.window(), watched.window()
    assert sum(library.calls.values()) == calls
    assert window.values.keys() == {"host/resident", "host/cpu"} | {f"device/{key}" for key in FIGURES}
    assert window.values["device/memory_used"] == 10 << 30
    assert window.values["device/throttle_reasons"] == 0 and isinstance(window.values["device/throttle_reasons"], int)
    assert window.values["device/energy"] == pytest.approx(6 * 300, rel=0.1)
    assert again.values.keys() <= {"host/resident", "host/cpu"}  # nothing of the device since


def test_means_maxima_last_values_and_all_reasons(make):
    gpu = FakeGpu()
    library, watched = make(gpu, device_interval=1.0)
    for share, gpu.temperature, gpu.used, gpu.watts, gpu.reasons in (
        (10, 50, 5, 100, 4),
        (20, 80, 9, 200, 0),
        (60, 60, 7, 300, 32),
    ):
        gpu.utilization = (share, 1)
        for _ in range(4):  # temperature and reasons are asked for at each fourth sample
            watched._look_at_device()
            library.clock.now += 1
    gpu.total = 1
    watched._look_at_device()
    values, expected = (
        watched.window().values,
        {"temperature": 80, "memory_used": 9, "memory_total": 1, "throttle_reasons": 36},
    )
    expected |= {"utilization": (40 + 80 + 240 + 60) / 13, "power": (400 + 800 + 1200 + 300) / 13}
    assert {key: values[f"device/{key}"] for key in expected} == pytest.approx(expected)
    watched._look_at_device()
    assert watched.window().values["device/utilization"] == 60  # nothing of an earlier window


def test_cadences(make):
    """Of the host, the device and its counter; what was missed is not made up for."""
    library, watched = make()
    run(library, watched, 3)  # an energy counter is watched for at most 2 s at first
    looked, looks, before = watched._host.resident, [], library.calls.copy()
    watched._host.resident = lambda: looks.append(0) or looked()
    run(library, watched, 10)
    assert len(looks) == pytest.approx(100, abs=2)
    for call in (POWER, COUNTER):
        assert library.calls[call] - before[call] == pytest.approx(40, abs=1)
    before = library.calls[POWER]
    library.clock.now += 60  # the machine slept
    run(library, watched, 0.2)
    assert library.calls[POWER] - before == 1


def test_resident_peaks_by_section(make, monkeypatch):
    now = []
    library, watched = make(device=CPU, section=lambda: now[-1][0])
    monkeypatch.setattr(watched._host, "resident", lambda: now[-1][1])
    for each in (("pilot", 5), ("quiz", 9), ("pilot", 7), ("quiz", 3), ("logging", 4)):
        now.append(each)
        run(library, watched, 0.1)
    window = watched.window()
    assert window.resident == {"pilot": 7, "quiz": 9, "logging": 4} and window.values["host/resident"] == 9
    now.append(("logging", 2))
    assert watched.window().resident == {"logging": 2}


def test_host_figures_are_this_processs(monkeypatch):
    held, clock = bytearray(64 << 20), {"time": 5.0, "busy": 1.0}
    monkeypatch.setattr(host.time, "monotonic", lambda: clock["time"])
    monkeypatch.setattr(host.time, "process_time", lambda: clock["busy"])
    counted = host.Host()
    assert counted.resident() > len(held) and counted.cpu() is None  # it needs time to have passed
    clock.update(time=7.0, busy=4.0)
    assert counted.cpu() == 150
    clock.update(time=8.0)
    assert counted.cpu() == 0


# Energy


def test_joules_of_windows(make):
    library, watched = make(FakeGpu(watts=250.0))
    for seconds, known in (
        (0.5, 0),
        (5, 5.5),
        (0.5, 0),
        (1, 1.5),
    ):  # not known yet, and too short for 0.1 s of a counter
        run(library, watched, seconds)
        window = watched.window()
        assert window.seconds == pytest.approx(known, abs=0.26)
        assert window.joules == (pytest.approx(250 * window.seconds, abs=26) if known else None)
    assert watched._energy.source == "counter"


def test_counter_that_is_taken_back_while_it_is_watched(make):
    library, watched = make()
    run(library, watched, 0.1)
    library.fail(COUNTER, "NotSupported")
    run(library, watched, 0.5)
    assert watched._energy.source == "power" and not watched._energy.watching
    assert watched.window().joules == pytest.approx(150, abs=0.1)


# Errors during the run


@pytest.mark.parametrize(("call", "error", "cause"), [
    ("everything", error("GpuIsLost"), "GPU is lost"), (POWER, OSError("what is this"), "OSError: what is this"),
])  # fmt: skip
@pytest.mark.parametrize("after", [0.1, 3], ids=["while the counter is watched", "later"])
def test_lost_device_ends_its_part_alone(make, after, call, error, cause):
    library, watched = make()
    run(library, watched, after)
    library.errors[call] = error
    run(library, watched, 1)
    assert watched.cause == f"no NVML: {cause}" and library.calls["nvmlShutdown"] == 1
    asked = sum(library.calls.values())
    watched.window()
    run(library, watched, 1)
    assert sum(library.calls.values()) == asked
    assert watched.window().values.keys() == {"host/resident", "host/cpu"}
    assert watched.device["name"] == "NVIDIA H100"
