"""How a kernel is cut into programs: by rule where it hardly matters, else by trying, once for each device and shape."""

import hashlib
import json
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import triton

logger = logging.getLogger("engine.kernels")


class Plan(NamedTuple):
    """Whole rows, block_r of them, in a program (tiled false), or tiles of block_c classes of a row."""

    tiled: bool
    block_r: int
    block_c: int
    warps: int


def plans(classes: int, on_chip: int, most_tiles: int) -> list[Plan]:
    """The plans for rows of `classes` classes; untried, the first is taken. Up to 1024 classes there is only one."""
    width = triton.next_power_of_2(classes)
    if width <= 1024:
        return [Plan(False, max(1, 1024 // width), width, 4)]
    usual = max(4, width // 1024)
    # at most 64 numbers of a row in a thread: more spill, by kilobytes
    whole = [Plan(False, 1, width, w) for w in sorted({4, 8, 16}, key=lambda w: abs(w - usual)) if width <= 2048 * w]
    sizes = [(4096, 8), (4096, 4), (2048, 4), (8192, 8), (8192, 16), (16384, 16)]
    least = triton.next_power_of_2(triton.cdiv(classes, most_tiles))
    tiles = [Plan(True, 1, c, w) for c, w in sizes if least <= c < width]
    if least > max(c for c, _ in sizes):
        tiles = [Plan(True, 1, least, 16)]
    if width <= on_chip:
        return whole + tiles
    return tiles + whole if width <= 2 * on_chip else tiles


def resident(device: torch.device, warps: int) -> int:
    """About how many programs a device runs at once; the kernels take some 100 registers a thread."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count * max(1, 20 // warps)


def choose(
    key: Sequence[Hashable], choices: Sequence[Plan], launch: Callable[[Plan], None], device: torch.device
) -> Plan:
    """The quickest plan for `key`, tried at its first use and then remembered, on disk too: another plan adds in another
    order, and a resumed run must give the same bits. During the capture of a CUDA graph, and on a CPU, the first one."""
    if len(choices) == 1 or device.type != "cuda":
        return choices[0]
    key, name = " ".join(map(str, key)), torch.cuda.get_device_name(device)
    known = _known(name)
    if key not in known:
        if torch.cuda.is_current_stream_capturing():
            return choices[0]
        with _one_at_a_time:
            times = {plan: _time(plan, launch) for plan in choices}
            known[key] = list(min(times, key=times.get))
            logger.info("tuned %s: %s", key, Plan(*known[key]))
            _remember(name, known)
    return Plan(*known[key])


_one_at_a_time = threading.Lock()


def _time(plan: Plan, launch: Callable[[Plan], None]) -> float:
    """Milliseconds; without end for a plan that does not fit the device, or beside what is in its memory."""
    try:
        return triton.testing.do_bench(lambda: launch(plan), warmup=10, rep=50)
    except (torch.OutOfMemoryError, triton.runtime.errors.OutOfResources):
        return float("inf")


@cache
def _known(device: str) -> dict[str, list]:
    return _read(_file(device))


def _read(file: Path) -> dict[str, list]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):  # none yet, or one that was cut off
        return {}
    return found if isinstance(found, dict) else {}


def _remember(device: str, known: dict[str, list]) -> None:
    """Beside what other processes have found since; where they were first, their plans are kept."""
    file = _file(device)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        known |= _read(file)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as written:
            json.dump(known, written, indent=1)
        os.replace(written.name, file)
    except OSError as error:
        logger.warning("the plans of the kernels are not kept for the next run: %s: %s", file, error.strerror)


def sources() -> list[Path]:
    """The files that a plan depends on: those with Triton kernels and their launches, of every op, and this one."""
    return sorted(Path(__file__).parents[1].glob("*/triton_*.py")) + [Path(__file__)]


def _file(device: str) -> Path:
    """Of this device, this Triton and these kernels: their source is part of the name."""
    root = Path(os.environ.get("METADISTIL_CACHE") or "~/.cache/metadistil-engine").expanduser()
    contents = [source.read_bytes() for source in sources()]
    digest = hashlib.sha256(b"\0".join([device.encode(), triton.__version__.encode(), *contents])).hexdigest()[:16]
    return root / "kernels" / f"plans-{digest}.json"
