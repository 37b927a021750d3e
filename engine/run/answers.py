"""What a frozen teacher answers on the training set: computed once, kept on disk, read memory-mapped.

Dropout is off in a teacher, so a kept answer and a live one differ only by rounding: the example was in another batch and
padded to another length. The name of a folder of answers is a hash of everything that they depend on; a run that finds the
folder computes nothing.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers

from engine.data import kept
from engine.data.batches import evaluation_batches
from engine.data.encoded import EncodedSplit
from engine.errors import UserError
from engine.models.load import content_hash
from engine.models.network import Encoder
from engine.run.evaluation import EVALUATION_BATCH
from engine.screen.console import Console

SHOWN = 100  # batches from which on progress is shown


@dataclass
class Answers:
    """One teacher's answers to n examples: logits [n, C] and, where it gives them, features [n, layers, H]; read-only."""

    arrays: list[np.ndarray]
    seconds: float  # that computing them took, in this run or in an earlier one

    def __len__(self) -> int:
        return len(self.arrays[0])


def answers_of(
    teacher: Encoder, split: EncodedSplit, content: str, device: torch.device, cache: Path, console: Console
) -> Answers:
    """The answers of `teacher`, which stands on `device`, to all of `split`, whose examples `content` identifies.

    They are computed in the teacher's training precision and stand in the split's order. Raises UserError where they cannot
    be written to `cache`.
    """
    names = ["logits", "features"] if teacher.inner else ["logits"]
    what = f"Teacher {teacher.name}: {' and '.join(names)} of {len(split):,} examples"
    split = split.only({teacher.encoding})
    place = cache / _key(teacher, split, content, device)
    if (found := _read(place, names)) is not None:
        console.say(f"{what} reused; the same weights computed them before ({place}).")
        return found
    note = "; the ones kept there were damaged" if (place / "about.json").exists() else ""
    started = time.monotonic()
    try:
        checksums = _compute(teacher, split, device, place, names, console)
        seconds = time.monotonic() - started
        about = {"teacher": teacher.name, "examples": len(split), "seconds": seconds, "crc32": checksums}
        with _partial(place / "about.json") as file:  # last: without it the others do not count
            file.write_text(json.dumps(about) + "\n")
    except OSError as e:
        raise UserError(
            f"The answers of teacher {teacher.name} cannot be written to {place} ({e.strerror}); give another --cache-dir, or "
            "leave --cache-teacher-logits out.") from e  # fmt: skip
    console.say(f"{what} computed in {seconds:.1f} s and kept in {place}{note}.")
    return Answers(_load(place, names), seconds)


def _key(teacher: Encoder, split: EncodedSplit, content: str, device: torch.device) -> str:
    return kept.key(
        torch=torch.__version__, transformers=transformers.__version__, device=device.type, precision=teacher.precision,
        compiled=teacher.compiled is not None, encoding=teacher.encoding, data=content, batch=EVALUATION_BATCH,
        threads=torch.get_num_threads() if device.type == "cpu" else 0,  # sums depend on it
        model=content_hash(teacher.module), features=teacher.inner.token,
        widths=[table.buckets.widths.tolist() for table in split.tables],
    )  # fmt: skip


@torch.no_grad()
def _compute(
    teacher: Encoder, split: EncodedSplit, device: torch.device, place: Path, names: list[str], console: Console
) -> list[int]:
    """Write a file for each of the teacher's outputs; returns their checksums."""
    place.mkdir(parents=True, exist_ok=True)
    steps, written = -(-len(split) // EVALUATION_BATCH), []
    shown = console.progress(f"answers of {teacher.name}", steps) if steps >= SHOWN else nullcontext(lambda *_: None)
    with ExitStack() as files, shown as show, teacher.in_mode(train=False):
        partial = [files.enter_context(_partial(place / f"{name}.npy")) for name in names]
        for step, (rows, batch) in enumerate(evaluation_batches(split, EVALUATION_BATCH), 1):
            given = [t.cpu().numpy() for t in teacher(batch.to(device)).given()]  # sync: no step waits for it
            if not written:
                written = [_allocate(f, len(split), values) for f, values in zip(partial, given, strict=True)]
            for array, values in zip(written, given, strict=True):
                array[rows] = values
            show(step, {})
        for array in written:
            array.flush()
        return [_checksum(file) for file in partial]


def _allocate(file: Path, count: int, like: np.ndarray) -> np.memmap:
    """A new array [count, ...] in `file`, writable, its room on the disk taken: a mapped write could not report a full one."""
    array = np.lib.format.open_memmap(file, "w+", like.dtype, (count, *like.shape[1:]))
    if hasattr(os, "posix_fallocate"):
        with open(file, "rb+") as f:
            os.posix_fallocate(f.fileno(), 0, file.stat().st_size)
    return array


@contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """A path to write to; in the end it takes the place of `path`, or is gone. Two processes may write the same one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(place: Path, names: list[str]) -> Answers | None:
    """The answers kept in `place`; None where there are none, or where a file is damaged."""
    try:
        about = json.loads((place / "about.json").read_text())
        if [_checksum(place / f"{name}.npy") for name in names] != about["crc32"]:
            return None
        return Answers(_load(place, names), float(about["seconds"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _load(place: Path, names: list[str]) -> list[np.ndarray]:
    # plain arrays over the mapping: indexing a memmap makes a memmap, at several times the cost
    return [np.asarray(np.load(place / f"{name}.npy", mmap_mode="r")) for name in names]


def _checksum(file: Path) -> int:
    """Raises ValueError for an empty file."""
    return zlib.crc32(np.memmap(file, np.uint8, "r"))
