"""The sampler's windows, with its clock in hand; its thread, its end, and what it costs."""

import json
import os
import subprocess
import sys
import threading
import time
from itertools import count
from pathlib import Path

import pytest
import torch
from fake_nvml import Clock, FakeGpu, FakeInstance, FakeNvml

from engine.telemetry import host, sampler
from engine.telemetry.sampler import Sampler, Window

ROOT = Path(__file__).parents[1]
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
    assert len(looks) == pytest.approx(200, abs=2)
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
        run(library, watched, 0.05)
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


class Started:
    """A sampler with a thread, and all that Python has to say of threads that die."""

    def __init__(self, monkeypatch, *arguments, **settings):
        self.said = []
        monkeypatch.setattr(threading, "excepthook", self.said.append)
        self.sampler = Sampler(*arguments, **settings)
        self.sampler.start()

    def wait(self, done):
        end = time.monotonic() + 10
        while not done() and time.monotonic() < end:
            time.sleep(0.005)
        assert done()
        return self.sampler


@pytest.mark.parametrize("error", [ValueError("where am I"), SystemExit("out")])
def test_thread_that_dies_leaves_a_cause(monkeypatch, error):
    def section():
        raise error

    started = Started(monkeypatch, CPU, section)
    watched = started.wait(lambda: not started.sampler._thread.is_alive())
    assert watched.cause == f"no telemetry: {type(error).__name__}: {error}"
    assert not started.said
    if isinstance(error, Exception):
        assert "host/cpu" not in watched.window().values
    watched.close()


def test_thread_that_cannot_be_started(monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    watched = Sampler(CPU, str)
    watched.start()
    assert watched.cause == "no telemetry: can't start new thread"
    watched.close()


# The thread


def test_start_and_close_are_idempotent(monkeypatch):
    library = FakeNvml(clock=time.monotonic)
    started = Started(monkeypatch, CUDA, lambda: "quiz", library=library, host_interval=0.005, device_interval=0.01)
    watched, thread = started.sampler, started.sampler._thread
    watched.start()
    assert watched._thread is thread and thread.daemon
    started.wait(lambda: library.calls["nvmlDeviceGetPowerUsage"] > 5)
    watched.close()
    watched.close()
    assert not thread.is_alive() and library.opened == 0 and not started.said
    assert watched.window().values["device/power"] == 300  # what came before the end is not lost
    watched.start()
    assert watched._thread is thread and watched.cause is None
    never = Sampler(CUDA, str, library=library)
    never.close()
    assert library.opened == 0


def test_close_does_not_wait_for_a_call_that_hangs(monkeypatch):
    monkeypatch.setattr(sampler, "JOIN_SECONDS", 0.05)
    library, held, inside = FakeNvml(clock=time.monotonic), threading.Event(), threading.Event()

    def hang(handle):
        inside.set()
        held.wait(10)
        return 1

    library.nvmlDeviceGetPowerUsage = hang
    watched = Sampler(CUDA, str, library=library)
    watched.start()
    assert inside.wait(10)
    began = time.monotonic()
    watched.close()
    assert time.monotonic() - began < 5
    assert library.opened == 1  # it is in use: not taken away
    held.set()
    watched._thread.join(10)


def test_windows_from_another_thread_lose_and_double_nothing(monkeypatch):
    """Every sample is in exactly one window."""
    samples, names = count(), count()
    monkeypatch.setattr(host.Host, "resident", lambda self: next(samples))
    watched = Sampler(CPU, lambda: f"section {next(names)}", host_interval=1e-5)
    watched.start()
    seen = set()
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        peaks = set(watched.window().resident.values())
        assert not peaks & seen
        seen |= peaks
    watched.close()
    seen |= set(watched.window().resident.values())
    assert len(seen) > 100 and seen == set(range(next(samples)))


def test_memory_is_bounded(make):
    library, watched = make()
    run(library, watched, 10)
    sizes = [len(watched._folded._figures), len(watched._resident), len(watched._energy.watch.changes)]
    run(library, watched, 100)
    assert [len(watched._folded._figures), len(watched._resident), len(watched._energy.watch.changes)] == sizes


def test_the_thread_takes_less_than_a_hundredth_of_a_core():
    """Its processor time at the default cadence, calls of NVML aside: 0.4 % of a core of a virtual machine, nearly all of it
    for waking up on cold caches (a sample of the host in a loop takes 10 us, awaken for it 200)."""
    watched = Sampler(CUDA, lambda: "pilot", library=FakeNvml(clock=time.monotonic))
    assert watched.cause is None
    watched.start()
    while not watched._sample or watched._energy.watching:  # once, at the beginning
        time.sleep(0.01)
    assert 0 < watched.cpu_seconds < 0.1
    shares = []
    while len(shares) < 3 and min(shares, default=1) >= 0.01:  # others may be busy on this machine
        start, spent = time.monotonic(), watched.cpu_seconds
        time.sleep(1)
        shares.append((watched.cpu_seconds - spent) / (time.monotonic() - start))
    watched.close()
    assert 0 < min(shares) < 0.01, shares


def test_a_window_is_cheap(make):
    library, watched = make()
    run(library, watched, 6)
    calls = sum(library.calls.values())
    began = time.perf_counter()
    for _ in range(100):
        watched.window()
    assert (time.perf_counter() - began) / 100 < 2e-3  # 0.05 ms; the machine may be busy
    assert sum(library.calls.values()) == calls


# The ends of processes


SCRIPT = """
import os, sys, time
sys.path[:0] = ["tests"]
import torch
from fake_nvml import FakeNvml
from engine.telemetry.sampler import Sampler
library = FakeNvml(clock=time.monotonic)
sampler = Sampler(torch.device("cuda", 0), lambda: "pilot", library=library, host_interval=0.001, device_interval=0.002)
sampler.start()
time.sleep(0.1)
"""


def finished(script, **settings):
    settings = {**os.environ, "CUDA_VISIBLE_DEVICES": "0", **settings}
    return subprocess.run([sys.executable, "-c", SCRIPT + script], cwd=ROOT, env=settings, timeout=60, capture_output=True, text=True)  # fmt: skip


@pytest.mark.parametrize(("end", "status"), [("", 0), ("sys.exit(3)", 3)])
def test_interpreter_that_ends_without_close(end, status):
    """NVML has been handed back by then."""
    check = "import atexit; atexit._run_exitfuncs(); print(sampler.cause, library.opened, sampler._thread.is_alive())\n"
    done = finished(end)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "")
    if not end:
        assert finished(check).stdout == "None 0 False\n"


def test_after_a_fork_the_childs_copy_does_nothing():
    """Even where the lock was held, and the parent goes on."""
    done = finished("""
sampler._lock.acquire()
child = os.fork()
if not child:
    window = sampler.window()
    sampler.close()
    assert not window.values and not library.calls["nvmlShutdown"]
    sys.exit(5)
sampler._lock.release()
_, status = os.waitpid(child, 0)
time.sleep(0.05)
print(os.waitstatus_to_exitcode(status), "device/power" in sampler.window().values, sampler.cause)
sampler.close()
""")
    assert (done.returncode, done.stdout, done.stderr) == (0, "5 True None\n", "")


def test_window_of_nothing():
    assert Window().values == {} and Window().joules is None


def test_clock_of_the_fake():
    clock = Clock(3.0)
    clock.now += 1
    assert clock() == 4.0
