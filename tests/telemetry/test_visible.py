"""Which of NVML's devices CUDA's are: by torch's UUID, by the environment, under MIG."""

import pytest
from fake_nvml import FakeGpu, FakeNvml, sliced

from engine.telemetry.visible import Unresolved, find

UUID = "11111111-aaaa-0000-0000-000000000000"


@pytest.mark.parametrize("environment", [{}, {"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": f"GPU-{UUID}"}])
def test_several_instances_and_none_named(environment):
    for uuid in (UUID, None):
        with pytest.raises(Unresolved, match="2 MIG instances; name one in CUDA_VISIBLE_DEVICES"):
            find(_initialised(sliced()), 0, uuid, environment)


@pytest.mark.parametrize("entry", [
    "MIG-10000000-0000-0000-0000-000000000000", "MIG-1", f"MIG-GPU-{UUID}/8/1", " MIG-1000 ",
])  # fmt: skip
@pytest.mark.parametrize("uuid", [UUID, None, "10000000-0000-0000-0000-000000000000"])
def test_named_instance(entry, uuid):
    """Whether torch has the UUID of the GPU, of the instance, or none."""
    library = _initialised(sliced())
    assert find(library, 0, uuid, {"CUDA_VISIBLE_DEVICES": entry}).handle is library.gpus[0].instances[2]


@pytest.mark.parametrize("environment", [{}, {"CUDA_VISIBLE_DEVICES": "0"}])
def test_instance_that_torch_names(environment):
    library = _initialised(sliced())
    assert find(library, 0, "10000000-0000-0000-0000-000000000000", environment).handle is library.gpus[0].instances[2]


@pytest.mark.parametrize("entry", ["MIG-9", "MIG-", f"MIG-GPU-{UUID}/8/0", f"MIG-GPU-{UUID}", "MIG-GPU-2/8/1"])
def test_instance_that_is_not_there(entry):
    with pytest.raises(Unresolved, match="no device 0"):
        find(_initialised(sliced()), 0, None, {"CUDA_VISIBLE_DEVICES": entry})


def test_gpus_and_drivers_before_mig():
    library = _initialised(FakeGpu())
    library.absent.add("nvmlDeviceGetMigMode")
    assert find(library, 0, UUID, {}).handle is library.gpus[0]
    library = _initialised(FakeGpu())
    library.fail("nvmlDeviceGetMigMode", "NotSupported")
    assert find(library, 0, None, {}).handle is library.gpus[0]


# CUDA_VISIBLE_DEVICES


def _initialised(*gpus):
    library = FakeNvml(*gpus)
    library.nvmlInit()
    return library


def four():
    """In the order of their PCI addresses 1, 0, 2, 3."""
    starts = ["aaaa1111", "aaaa2222", "bbbb3333", "cccc4444"]
    buses = [20, 10, 30, 40]
    gpus = [FakeGpu(f"GPU-{s}-0000-0000-0000-000000000000", bus=b) for s, b in zip(starts, buses, strict=True)]
    return _initialised(*gpus)


@pytest.mark.parametrize(("setting", "expected"), [
    (None, [1, 0, 2, 3]),
    ("", []),
    ("0", [1]),
    ("2,1", [2, 0]),
    (" 3 , 0", [3, 1]),
    ("0,2,-1,1", [1, 2]),
    ("0,9,1", [1]),
    ("0,x,1", [1]),
    ("1gpu,2", [0, 2]),
    ("0,1,0", []),
    ("NoDevFiles", []),
    ("0,GPU-bbbb", [1]),
    ("GPU-bbbb3333-0000-0000-0000-000000000000", [2]),
    ("GPU-c,GPU-aaaa2", [3, 1]),
    ("GPU-BBBB", [2]),
    ("GPU-b,GPU-aaaa,GPU-c", [2]),  # two begin like that: not a name of one
    ("GPU-b,GPU-zz,GPU-c", [2]),
    ("GPU-b,0", [2]),
    ("GPU-b,GPU-bbbb", []),
    ("GPU-", []),
])  # fmt: skip
def test_visible_devices(setting, expected):
    library = four()
    environment = {} if setting is None else {"CUDA_VISIBLE_DEVICES": setting}
    for index, gpu in enumerate(expected):
        assert find(library, index, None, environment).handle is library.gpus[gpu]
    with pytest.raises(Unresolved, match=f"no device {len(expected)}"):
        find(library, len(expected), None, environment)


def test_torchs_uuid_comes_before_the_environment():
    library = four()
    assert find(library, 0, "cccc4444-0000-0000-0000-000000000000", {"CUDA_VISIBLE_DEVICES": "0"}).handle.bus == 40
    assert find(library, 0, "00000000-0000-0000-0000-000000000000", {"CUDA_VISIBLE_DEVICES": "0"}).handle.bus == 10


def test_order_of_different_gpus_is_known_by_address_only():
    library = _initialised(FakeGpu("GPU-a1", "fast", bus=2), FakeGpu("GPU-b1", "slow", bus=1))
    for environment in ({}, {"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}):
        with pytest.raises(Unresolved, match="set CUDA_DEVICE_ORDER=PCI_BUS_ID"):
            find(library, 0, None, environment)
    assert find(library, 0, None, {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}).uuid == "GPU-b1"
    assert find(library, 0, None, {"CUDA_VISIBLE_DEVICES": "GPU-a"}).uuid == "GPU-a1"


def test_gpu_without_an_address():
    library = four()
    library.fail("nvmlDeviceGetPciInfo", "NotSupported")
    assert find(library, 0, None, {}).handle is library.gpus[0]


def test_gpu_of_somebody_else_is_passed_over():
    library = four()
    library.fail("nvmlDeviceGetHandleByIndex", "NoPermission", library.gpus[1])
    assert find(library, 0, None, {}).handle is library.gpus[0]
