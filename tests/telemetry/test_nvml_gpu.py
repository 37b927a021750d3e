"""NVML on a real device: its figures in range, and energy against power. Needs torch and nvidia-ml-py alone; one test psutil."""

import time

import pytest
import torch

from engine.telemetry.energy import Counter, Trapezoid
from engine.telemetry.nvml import Nvml, throttle_names
from engine.telemetry.sampler import Sampler

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# Lowest and highest value that a device can have.
RANGES = {
    "energy": (0, 1e15),
    "power": (1, 5000),
    "power_limit": (10, 5000),
    "memory_used": (0, 1 << 42),
    "memory_reserved": (0, 1 << 36),
    "memory_total": (1 << 30, 1 << 42),
    "memory_process": (0, 1 << 42),
    "utilization": (0, 100),
    "memory_utilization": (0, 100),
    "sm_clock": (50, 5000),
    "memory_clock": (50, 20_000),
    "temperature": (1, 120),
    "throttle_reasons": (0, 1 << 32),
    "pcie_tx": (0, 1e12),
    "pcie_rx": (0, 1e12),
    "pcie_generation": (1, 8),
    "pcie_width": (1, 32),
}


@pytest.fixture
def nvml():
    pytest.importorskip("pynvml", reason="needs nvidia-ml-py")
    index = torch.cuda.current_device()
    device = Nvml(index, str(torch.cuda.get_device_properties(index).uuid))
    yield device
    device.close()


def busy(seconds, product, each=lambda: None):
    """Matrix products for so long, a call of `each` every 50 ms; the queue is kept short, so that time is the device's."""
    end, due = time.monotonic() + seconds, 0.0
    while time.monotonic() < end:
        torch.mm(product, product)
        torch.cuda.synchronize()
        if time.monotonic() >= due:
            each()
            due = time.monotonic() + 0.05


@pytest.fixture
def product():
    return torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)


def test_figures_are_torchs_devices_and_in_range(nvml):
    figures = nvml.read()
    print(nvml.about, figures, throttle_names(figures.get("throttle_reasons", 0)))
    assert {"memory_used", "memory_total"} <= figures.keys() <= RANGES.keys()
    for key, value in figures.items():
        low, high = RANGES[key]
        assert low <= value <= high, (key, value)
    assert figures["memory_used"] <= figures["memory_total"]
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    assert nvml.mig or nvml.about["uuid"] == f"GPU-{properties.uuid}"
    assert figures["memory_total"] == pytest.approx(properties.total_memory, rel=0.1)  # less what the driver keeps


def test_used_memory_grows_by_an_allocation(nvml):
    size = 1 << 30
    torch.zeros(1, device="cuda")  # what CUDA itself takes is there before
    torch.cuda.empty_cache()
    before = nvml.read()
    held = torch.empty(size, dtype=torch.uint8, device="cuda")
    after = nvml.read()
    grown = after["memory_used"] - before["memory_used"]
    del held
    torch.cuda.empty_cache()
    assert grown >= 0.9 * size  # other processes may let some go meanwhile
    if "memory_process" in before:
        assert after["memory_process"] - before["memory_process"] == pytest.approx(size, rel=0.05)


def test_counter_agrees_with_power(nvml, product):
    """Within 5 % over 6 s of steady work; from Ampere on the power is a mean over the last second, so the first 2 s do not count."""
    if not (nvml.has("energy") and {"energy", "power"} <= nvml.read().keys()):
        pytest.skip("this device has no energy counter or no power")
    counter, power = Counter(), Trapezoid()

    def look():
        at = time.monotonic()
        counter.add(at, nvml.energy())
        power.add(at, nvml.read(1)["power"])

    busy(2, product)
    busy(6, product, look)
    ratio = counter.joules / power.joules  # over the same time, but for one call between their ends
    print(f"counter over power: {ratio:.3f}")
    assert ratio == pytest.approx(1, abs=0.05)


def test_sampler_on_the_device(product):
    pytest.importorskip("psutil", reason="needs psutil")
    pytest.importorskip("pynvml", reason="needs nvidia-ml-py")
    sampler = Sampler(torch.device("cuda"), lambda: "pilot")
    assert sampler.cause is None
    sampler.start()
    began = time.monotonic()
    try:
        busy(4, product)
        window = sampler.window()
    finally:
        sampler.close()
    share = sampler.cpu_seconds / (time.monotonic() - began)
    print(f"{sampler.device}, energy by its {sampler._energy.source}, {share:.2%} of a core\n{window}")
    assert sampler.cause is None and share < 0.05
    assert window.values["device/memory_used"] > 0 and window.resident["pilot"] > 0
    if window.joules is not None:
        assert 1 <= window.joules / window.seconds <= 5000 and 1 < window.seconds < 5
