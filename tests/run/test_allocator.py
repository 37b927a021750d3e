"""What a step gives back is there for the next one without a page fault."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from engine.run.allocator import keep_freed_memory

def step():
    kept = [torch.empty(10_000_000).fill_(1) for _ in range(3)]  # 40 MB each

if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(10):  # until the heap has found its size
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_reused():
    def faults(how):
        return int(
            subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True).stdout
        )

    assert faults("keep") < 100 < faults("give back")
