"""What a step gives back is there for the next one without a page fault."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
import torch
from engine.run.allocator import keep_freed_memory

def step():
    kept = [torch.empty(10_000_000).fill_(1) for _ in range(3)]  # 40 MB each

def faults(steps):
    for _ in range(steps):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(2), int(keep_freed_memory()), faults(11))  # the heap finds its size in the first ones
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_reused():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    given_back, told, kept = map(int, done.stdout.split())
    assert told and kept < 100 < given_back
