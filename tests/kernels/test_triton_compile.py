"""The Triton kernels compiled for a GPU that is not there: no register is spilled, loads are wide, nothing is float64."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

# In a process of its own: here the kernels may be interpreted. Launches compile for Hopper and start nothing.
SCRIPT = """
import json, re, subprocess, sys, tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from engine.kernels.ops.common import triton_launch, triton_second, tuning
from engine.kernels.ops.kd_loss import triton_kernels as kd_loss
from engine.kernels.ops.meta_cotangent import triton_kernels as meta_cotangent


class Hopper:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


driver.set_active(Hopper())
compiled = []


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments, **settings: compiled.append(self.kernel.warmup(*arguments, grid=grid, **settings))


for module, name in (kd_loss, "kd_first_kernel"), (triton_second, "kd_second_kernel"), (triton_launch, "scale_kernel"):
    setattr(module, name, Compiled(getattr(module, name)))


def launch(kernel, classes, teachers, dtype):
    dtype = getattr(torch, dtype)
    plan = tuning.plans(classes, triton_launch.ON_CHIP, triton_launch.TILES)[0]
    triton_launch.plans = lambda *_: [plan]
    student, *rest = [torch.empty(4 * plan.block_r, classes, dtype=dtype) for _ in range(teachers + 1)]
    labels, one = torch.zeros(len(student), dtype=torch.int64), torch.tensor(1.0)
    some = (rest, labels, None, [1 / teachers] * teachers, 2.0, 0.3, -100, 0.1, one)
    every = [True] * (teachers + 1)
    if kernel == "first":
        kd_loss.kd_first(student, *some, None, True, every)
    elif kernel == "second":
        kd_loss.kd_second(one, student, *some, [student, *rest], every, every)
    elif kernel == "cotangent":
        meta_cotangent.kd_cotangent(rest, student, None, [1 / teachers] * teachers, 2.0, -0.1)
    elif kernel == "scale":
        triton_launch.scale_([student], one)
    return plan.tiled


def usage(cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump", "--dump-resource-usage", file.name]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL|SHARED):(\\d+)", said)}


answers = []
for request in json.loads(sys.argv[1]):
    tiled = launch(*request)
    made = compiled.pop()
    assert not compiled
    ptx = made.asm["ptx"]
    loads = sorted(set(re.findall(r"ld\\.global\\S*", ptx)))
    double = re.findall(r"^\\s*(?:@\\S+\\s+)?([a-z]\\w*\\S*\\.f64\\S*)", ptx, re.M)
    answers.append(usage(made.asm["cubin"]) | {"loads": loads, "double": double, "tiled": tiled})
print(json.dumps(answers))
"""


SIZES = [
    (2, 2, "bfloat16"), (1000, 1, "bfloat16"), (8192, 1, "bfloat16"), (32000, 1, "bfloat16"), (131072, 1, "bfloat16"),
    (131072, 4, "float32"),
]  # fmt: skip
REQUESTS = [(kernel, *size) for size in SIZES for kernel in ("first", "second", "cotangent")]
REQUESTS += [("scale", 8192, 1, "bfloat16")]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[tuple, dict]:
    path = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, path))}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    arguments = [sys.executable, "-c", SCRIPT, json.dumps(REQUESTS)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(REQUESTS, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: " ".join(map(str, r)))
def test_compiled(request_, compiled):
    kernel, classes, _, dtype = request_
    found = compiled[request_]
    assert max(found["STACK"], found["LOCAL"]) == 0, "registers are spilled"
    # three numbers that are passed as float64 are converted, for all rows at once
    assert all(name.startswith(("cvt.rn.f32.f64", "ld.param")) for name in found["double"]), found["double"]
    assert len(found["double"]) <= 6
    if classes % 8 == 0:
        assert "ld.global.v4.b32" in found["loads"], "16 bytes at a time"
        assert dtype == "float32" or "ld.global.b16" not in found["loads"], "no logit on its own"
    assert found["tiled"] == (classes > 16384)
