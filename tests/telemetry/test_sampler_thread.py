"""The sampler's thread: how it starts, dies and ends, what it costs, and the ends of processes."""

import os
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


@pytest.fixture(autouse=True)
def no_torch_device(monkeypatch):
    """On a machine with a GPU too, it is the fake one that is looked at."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


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
