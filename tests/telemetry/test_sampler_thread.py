"""The sampler's thread: how it starts, dies and ends, what it costs, and the ends of processes."""

import subprocess
import sys
import threading
import time
from itertools import count
from pathlib import Path

import pytest
import torch
from fake_nvml import FakeNvml

from engine.telemetry import host, sampler
from engine.telemetry.sampler import Sampler

ROOT = Path(__file__).parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
pytestmark = pytest.mark.usefixtures("no_torch_device")


@pytest.fixture
def said(monkeypatch):
    """All that Python has to say of threads that die."""
    said = []
    monkeypatch.setattr(threading, "excepthook", said.append)
    return said


def wait(done):
    end = time.monotonic() + 10
    while not done() and time.monotonic() < end:
        time.sleep(0.005)
    assert done()


@pytest.mark.parametrize("error", [ValueError("where am I"), SystemExit("out")])
def test_thread_that_dies_or_cannot_be_started_leaves_a_cause(monkeypatch, said, error):
    def fail(*_):
        raise error

    watched = Sampler(CPU, fail)
    watched.start()
    wait(lambda: not watched._thread.is_alive())
    assert watched.cause == f"no telemetry: {type(error).__name__}: {error}" and not said
    if isinstance(error, Exception):
        assert "host/cpu" not in watched.window().values
    watched.close()
    error = RuntimeError("can't start new thread")
    monkeypatch.setattr(threading.Thread, "start", fail)
    watched = Sampler(CPU, str)
    watched.start()
    assert watched.cause == "no telemetry: can't start new thread"
    watched.close()


# The thread


def test_start_and_close_are_idempotent(said):
    library = FakeNvml(clock=time.monotonic)
    watched = Sampler(CUDA, lambda: "quiz", library=library, host_interval=0.005, device_interval=0.01)
    watched.start()
    thread = watched._thread
    watched.start()
    assert watched._thread is thread and thread.daemon
    wait(lambda: library.calls["nvmlDeviceGetPowerUsage"] > 5)
    watched.close()
    watched.close()
    assert not thread.is_alive() and library.opened == 0 and not said
    assert watched.cpu_seconds > 0
    assert watched.window().values["device/power"] == 300  # what came before the end is not lost
    watched.start()
    assert watched._thread is thread and watched.cause is None
    Sampler(CUDA, str, library=library).close()  # never started
    assert library.opened == 0


def test_close_does_not_wait_for_a_call_that_hangs(monkeypatch):
    monkeypatch.setattr(sampler, "JOIN_SECONDS", 0.05)
    library, held = FakeNvml(clock=time.monotonic), threading.Event()
    library.nvmlDeviceGetPowerUsage = lambda handle: library._call("hang") or held.wait(10)
    watched = Sampler(CUDA, str, library=library)
    watched.start()
    wait(lambda: library.calls["hang"])
    began = time.monotonic()
    watched.close()
    assert time.monotonic() - began < 5
    assert library.opened == 1  # it is in use: not taken away
    held.set()
    watched._thread.join(10)


def test_windows_from_another_thread_lose_and_double_nothing(monkeypatch):
    """Every sample is in exactly one window."""
    samples, names, seen = count(), count(), set()
    monkeypatch.setattr(host.Host, "resident", lambda self: next(samples))
    watched = Sampler(CPU, lambda: f"section {next(names)}", host_interval=1e-5)
    watched.start()
    end = time.monotonic() + 0.1
    while time.monotonic() < end or len(seen) <= 100:
        peaks = set(watched.window().resident.values())
        assert not peaks & seen
        seen |= peaks
    watched.close()
    seen |= set(watched.window().resident.values())
    assert seen == set(range(next(samples)))


# The ends of processes


# Without torch, which takes seconds to import.
SCRIPT = """
import os, sys, time
from types import SimpleNamespace
sys.path[:0] = ["tests"]
from fake_nvml import FakeNvml
from engine.telemetry import sampler
sampler._cuda_device = lambda device: (0, None)
library = FakeNvml(clock=time.monotonic)
sampler = sampler.Sampler(SimpleNamespace(type="cuda"), lambda: "pilot", library=library, host_interval=0.001, device_interval=0.002)
"""
START = """
sampler.start()
while sampler._sample < 3:
    time.sleep(0.01)
"""


def finished(after, before=""):
    command = [sys.executable, "-c", SCRIPT + before + START + after]
    done = subprocess.run(command, cwd=ROOT, timeout=60, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_interpreter_that_ends_without_close():
    """NVML has been handed back by then."""
    last = "import atexit\natexit.register(lambda: print(sampler.cause, library.opened, sampler._thread.is_alive()))"
    assert finished("sys.exit(3)", before=last) == (3, "None 0 False\n", "")


def test_after_a_fork_the_childs_copy_does_nothing():
    """Even where the lock was held, and the parent goes on."""
    script = """
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
"""
    assert finished(script) == (0, "5 True None\n", "")
