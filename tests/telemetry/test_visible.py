"""Which of NVML's devices CUDA's are: by torch's UUID, by the environment, under MIG."""

import pytest
from fake_nvml import FakeGpu, FakeNvml, sliced

from engine.telemetry.visible import Unresolved, find

UUID = "11111111-aaaa-0000-0000-000000000000"
UNNAMED = [None, "0", f"GPU-{UUID}"]
SECOND = "10000000-0000-0000-0000-000000000000"  # of the second instance


def initialised(*gpus):
    library = FakeNvml(*gpus)
    library.nvmlInit()
    return library


def cuda(entry):
    return {} if entry is None else {"CUDA_VISIBLE_DEVICES": entry}


# MIG: torch has the UUID of the GPU, of the instance, or none


@pytest.mark.parametrize("uuid", [UUID, None, SECOND])
@pytest.mark.parametrize("entry", [f"MIG-{SECOND}", "MIG-1", f"MIG-GPU-{UUID}/8/1", " MIG-1000 ", *UNNAMED])
def test_instance(entry, uuid):
    library = initialised(sliced())
    if entry in UNNAMED and uuid != SECOND:
        with pytest.raises(Unresolved, match="2 MIG instances; name one in CUDA_VISIBLE_DEVICES"):
            find(library, 0, uuid, cuda(entry))
    else:
        assert find(library, 0, uuid, cuda(entry)).handle is library.gpus[0].instances[2]


@pytest.mark.parametrize("entry", ["MIG-9", "MIG-", f"MIG-GPU-{UUID}/8/0", f"MIG-GPU-{UUID}", "MIG-GPU-2/8/1"])
def test_instance_that_is_not_there(entry):
    with pytest.raises(Unresolved, match="no device 0"):
        find(initialised(sliced()), 0, None, cuda(entry))


# CUDA_VISIBLE_DEVICES


@pytest.fixture
def four():
    """In the order of their PCI addresses 1, 0, 2, 3."""
    starts = {"aaaa1111": 20, "aaaa2222": 10, "bbbb3333": 30, "cccc4444": 40}
    return initialised(*(FakeGpu(f"GPU-{start}-0000-0000-0000-000000000000", bus=bus) for start, bus in starts.items()))


@pytest.mark.parametrize(("setting", "expected"), [
    (None, [1, 0, 2, 3]),
    (" 3 , 0,1", [3, 1, 0]),
    ("0,2,-1,1", [1, 2]),
    ("0,9,1", [1]),
    ("0,GPU-bbbb,1", [1]),
    ("1gpu,2", [0, 2]),
    ("0,1,0", []),
    ("GPU-C,GPU-aaaa2222-0000-0000-0000-000000000000", [3, 1]),
    ("GPU-b,GPU-aaaa,GPU-c", [2]),  # two begin like that: not a name of one
    ("GPU-b,GPU-zz,GPU-c", [2]),
    ("GPU-b,GPU-bbbb", []),
    ("GPU-", []),
])  # fmt: skip
def test_visible_devices(four, setting, expected):
    for index, gpu in enumerate(expected):
        assert find(four, index, None, cuda(setting)).handle is four.gpus[gpu]
    with pytest.raises(Unresolved, match=f"no device {len(expected)}"):
        find(four, len(expected), None, cuda(setting))


def test_torchs_uuid_comes_before_the_environment(four):
    assert find(four, 0, "cccc4444-0000-0000-0000-000000000000", cuda("0")).handle.bus == 40
    assert find(four, 0, "00000000-0000-0000-0000-000000000000", cuda("0")).handle.bus == 10


def test_order_of_different_gpus_is_known_by_address_only():
    library = initialised(FakeGpu("GPU-a1", "fast", bus=2), FakeGpu("GPU-b1", "slow", bus=1))
    for environment in ({}, cuda("0"), {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}):
        with pytest.raises(Unresolved, match="set CUDA_DEVICE_ORDER=PCI_BUS_ID"):
            find(library, 0, None, environment)
    assert find(library, 0, None, {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}).uuid == "GPU-b1"
    assert find(library, 0, None, cuda("GPU-a")).uuid == "GPU-a1"


def test_gpus_and_drivers_that_answer_less(four):
    library = initialised(FakeGpu())
    library.absent.add("nvmlDeviceGetMigMode")  # from before MIG
    assert find(library, 0, UUID, {}).handle is library.gpus[0]
    four.fail("nvmlDeviceGetMigMode", "NotSupported")
    four.fail("nvmlDeviceGetHandleByIndex", "NoPermission", four.gpus[1])  # somebody else's
    assert find(four, 0, None, {}).handle is four.gpus[0]
    four.errors.clear()
    four.fail("nvmlDeviceGetPciInfo", "NotSupported")
    assert find(four, 0, None, {}).handle is four.gpus[0]
