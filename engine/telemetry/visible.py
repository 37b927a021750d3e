"""Which of NVML's devices a torch device is.

CUDA counts the devices that CUDA_VISIBLE_DEVICES leaves, in CUDA's order; NVML counts all, by PCI address. The UUID that
torch has from CUDA says it at once. Where it says nothing, the environment is read by CUDA's rules
("CUDA Environment Variables" in NVIDIA's CUDA Programming Guide): indices, UUIDs or beginnings of them,
MIG-<uuid> or MIG-GPU-<uuid>/<GPU instance>/<compute instance>; an entry that fits nothing hides itself and all after it.
torch reads that variable too, for its count of devices, in functions that are private to it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any


class Unresolved(Exception):
    """No device of NVML is known to be this one; the message says why, and what would tell."""


@dataclass(frozen=True)
class Instance:
    """One compute instance of a GPU in MIG mode: for CUDA a device of its own."""

    uuid: str  # MIG-..., or MIG-GPU-.../3/0 from drivers before 470
    gpu_instance: int
    compute_instance: int
    handle: Any


@dataclass(frozen=True)
class Gpu:
    uuid: str  # GPU-...
    name: str
    place: tuple[int, int, int]  # PCI domain, bus, device
    handle: Any
    instances: tuple[Instance, ...] = ()


def find(library, index: int, uuid: str | None, environment: Mapping[str, str]) -> Gpu | Instance:
    """CUDA's device `index` among NVML's.

    Args:
        library: the module `pynvml`, initialised, or one with its functions
        uuid: what torch calls the device, without a prefix; None where torch cannot say
        environment: os.environ, of which CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER are read

    Raises:
        Unresolved: no device, or no one device, fits.
    """
    handle = _by_uuid(library, uuid) if uuid else None
    if handle is not None:
        name = library.nvmlDeviceGetUUID(handle)
        if name.startswith("MIG-"):
            return _instance(library, handle)
        return _one_instance(_gpu(library, handle), _entry(environment, index))
    seen = visible(list(gpus(library)), environment)
    if index >= len(seen):
        setting = environment.get("CUDA_VISIBLE_DEVICES")
        raise Unresolved(f"it knows no device {index} under CUDA_VISIBLE_DEVICES={setting}")
    device = seen[index]
    return device if isinstance(device, Instance) else _one_instance(device, _entry(environment, index))


def visible(all_gpus: list[Gpu], environment: Mapping[str, str]) -> list[Gpu | Instance]:
    """The devices that CUDA shows, in its order.

    Raises:
        Unresolved: entries are indices, and in which order CUDA counts cannot be known.
    """
    setting = environment.get("CUDA_VISIBLE_DEVICES")
    if setting is None:
        return list(_in_cudas_order(all_gpus, environment))
    entries = [entry.strip() for entry in setting.split(",")]
    if entries[0].startswith("MIG-"):
        instances = [(gpu, instance) for gpu in all_gpus for instance in gpu.instances]
        matches = [[each for gpu, each in instances if _is_instance(entry, gpu, each)] for entry in entries]
    elif entries[0].startswith("GPU-"):
        matches = [[gpu for gpu in all_gpus if _begins(gpu.uuid, entry, "GPU-")] for entry in entries]
    else:
        ordered = _in_cudas_order(all_gpus, environment) if entries[0] else []
        numbers = [re.match(r"[+-]?\d+", entry) for entry in entries]  # CUDA reads "1gpu" as 1
        places = [int(number[0]) if number else -1 for number in numbers]
        matches = [[ordered[place]] if 0 <= place < len(ordered) else [] for place in places]
    seen: list[Gpu | Instance] = []
    for match in matches:
        if len(match) != 1:
            break
        if match[0] in seen:
            return []  # CUDA shows nothing at all where an entry stands twice
        seen.append(match[0])
    return seen


def gpus(library) -> Iterator[Gpu]:
    """All GPUs that NVML lets us see; one that it counts but refuses belongs to somebody else."""
    for index in range(library.nvmlDeviceGetCount()):
        try:
            yield _gpu(library, library.nvmlDeviceGetHandleByIndex(index))
        except library.NVMLError:
            continue


def _gpu(library, handle) -> Gpu:
    place = (0, 0, 0)
    with suppress(library.NVMLError):  # a GPU that is not on a bus; NVML's order is kept then
        address = library.nvmlDeviceGetPciInfo(handle)
        place = (address.domain, address.bus, address.device)
    return Gpu(
        library.nvmlDeviceGetUUID(handle),
        library.nvmlDeviceGetName(handle),
        place,
        handle,
        tuple(_instances(library, handle)),
    )


def _instances(library, handle) -> Iterator[Instance]:
    try:
        enabled, _pending = library.nvmlDeviceGetMigMode(handle)
        slots = library.nvmlDeviceGetMaxMigDeviceCount(handle) if enabled else 0
    except (library.NVMLError, AttributeError):  # a GPU, a driver or a library from before MIG
        return
    for slot in range(slots):
        try:
            yield _instance(library, library.nvmlDeviceGetMigDeviceHandleByIndex(handle, slot))
        except library.NVMLError:  # an empty slot, or an instance that a container does not get
            continue


def _instance(library, handle) -> Instance:
    return Instance(
        library.nvmlDeviceGetUUID(handle),
        library.nvmlDeviceGetGpuInstanceId(handle),
        library.nvmlDeviceGetComputeInstanceId(handle),
        handle,
    )


def _by_uuid(library, uuid: str):
    for prefix in ("GPU-", "MIG-"):  # the name of an instance under MIG, where CUDA gives that of the instance
        try:
            return library.nvmlDeviceGetHandleByUUID(prefix + uuid)
        except library.NVMLError:
            continue
    return None


def _one_instance(gpu: Gpu, entry: str) -> Gpu | Instance:
    """The GPU; in MIG mode the one instance of it that this process can have."""
    if not gpu.instances:
        return gpu
    named = [each for each in gpu.instances if _is_instance(entry, gpu, each)]
    fitting = named or gpu.instances
    if len(fitting) > 1:
        raise Unresolved(
            f"{gpu.name} is cut into {len(fitting)} MIG instances; name one in CUDA_VISIBLE_DEVICES=MIG-..."
        )
    return fitting[0]


def _entry(environment: Mapping[str, str], index: int) -> str:
    entries = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return entries[index].strip() if index < len(entries) else ""


def _is_instance(entry: str, gpu: Gpu, instance: Instance) -> bool:
    if entry.startswith("MIG-GPU-"):
        uuid, _, numbers = entry.removeprefix("MIG-").partition("/")
        return _begins(gpu.uuid, uuid, "GPU-") and numbers == f"{instance.gpu_instance}/{instance.compute_instance}"
    return _begins(instance.uuid, entry, "MIG-")


def _begins(uuid: str, entry: str, prefix: str) -> bool:
    return len(entry) > len(prefix) and entry.startswith(prefix) and uuid.lower().startswith(entry.lower())


def _in_cudas_order(all_gpus: list[Gpu], environment: Mapping[str, str]) -> list[Gpu]:
    """Fastest first is CUDA's default, by a rule that it does not tell; among equals it is the PCI address."""
    if environment.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID" and len({gpu.name for gpu in all_gpus}) > 1:
        raise Unresolved("the GPUs differ, and CUDA orders them by a rule of its own; set CUDA_DEVICE_ORDER=PCI_BUS_ID")
    return sorted(all_gpus, key=lambda gpu: gpu.place)
