"""Token ids on disk: a folder of .npy files for a data set in one encoding, written once and read memory-mapped."""

from __future__ import annotations

import errno
import json
import os
import time
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory

import numpy as np

from engine.errors import UserError

CHECKSUMS = "checksums.json"  # of the folder's other files
DTYPES = {"ids": np.dtype("<i4"), "types": np.dtype("i1"), "offsets": np.dtype("<i8")}
STALE = 24 * 3600.0  # seconds after which what another process was writing was left behind by a kill
READ_AT_ONCE = 1 << 24  # bytes

Chunk = tuple[Sequence[Sequence[int]], Sequence[Sequence[int]] | None]  # ids and token types of the next examples


@dataclass
class Tokens:
    """Examples one behind the other: `ids[offsets[i]:offsets[i + 1]]` is example i. Memory-mapped, read-only."""

    ids: np.memmap  # [tokens] int32
    offsets: np.memmap  # [n + 1] int64
    types: np.memmap | None  # [tokens] int8 token types, where the tokenizer gives them


def load(folder: Path, examples: int) -> Tokens | None:
    """What `save` left in `folder`, or None where that is missing, damaged, or of another number of `examples`."""
    try:
        checksums = json.loads((folder / CHECKSUMS).read_text())
        if any(_checksum(folder / f"{name}.npy") != value for name, value in checksums.items()):
            return None
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in checksums}
        tokens = Tokens(arrays["ids"], arrays["offsets"], arrays.get("types"))
    except (OSError, ValueError, KeyError, AttributeError):  # missing, or no files of ours
        return None
    return tokens if len(tokens.offsets) == examples + 1 else None


def save(folder: Path, chunks: Iterable[Chunk]) -> Tokens:
    """Write `chunks` to `folder`, in place of what stands there, and map them. Raises UserError where that fails.

    The files are made beside it and moved there together: a kill leaves nothing half-made under the name, and processes
    that write the same at one time need not know of each other.
    """
    prefix = f".{folder.name}-"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in folder.parent.glob(f"{prefix}*"):
            if time.time() - left.stat().st_mtime > STALE:
                rmtree(left, ignore_errors=True)
        with TemporaryDirectory(prefix=prefix, dir=folder.parent) as temporary:
            made = Path(temporary) / "made"
            made.mkdir()
            tokens = load(made, _write(made, chunks))  # before it is moved: a mapping stays, whoever replaces the files
            assert tokens is not None, made
            with suppress(FileNotFoundError):
                os.rename(folder, Path(temporary) / "replaced")
            try:
                os.rename(made, folder)
            except OSError as e:
                if e.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise  # otherwise another process has just put its own there, which are the same
    except OSError as e:
        raise UserError(
            f"Token ids cannot be written to {folder.parent} ({e.strerror}); make room there, or give another --cache-dir."
        ) from e
    return tokens


def _write(folder: Path, chunks: Iterable[Chunk]) -> int:
    """The files of `chunks`; returns the number of examples. Memory does not grow with the tokens."""
    files = {name: _Growing(folder / f"{name}.npy", dtype) for name, dtype in DTYPES.items()}
    try:
        files["offsets"].append([0])
        for ids, types in chunks:
            files["offsets"].append(files["ids"].size + np.cumsum([len(example) for example in ids]))
            files["ids"].append(list(chain.from_iterable(ids)))
            files["types"].append(list(chain.from_iterable(types or ())))
    finally:
        for file in files.values():
            file.close()
    if not files["types"].size:
        files.pop("types").path.unlink()
    checksums = {name: _checksum(file.path) for name, file in files.items()}
    (folder / CHECKSUMS).write_text(json.dumps(checksums))
    return files["offsets"].size - 1


class _Growing:
    """A one-dimensional .npy file that is appended to; its header, which numpy leaves room in, is completed at the end."""

    def __init__(self, path: Path, dtype: np.dtype):
        self.path, self.dtype, self.size = path, dtype, 0
        self._file = open(path, "wb")  # noqa: SIM115 - held until `close`
        self._begin = self._header()

    def _header(self) -> int:
        described = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.size,)}
        np.lib.format.write_array_header_1_0(self._file, described)
        return self._file.tell()

    def append(self, values: Sequence[int] | np.ndarray) -> None:
        self._file.write(np.asarray(values, self.dtype).tobytes())
        self.size += len(values)

    def close(self) -> None:
        with self._file:
            self._file.seek(0)
            end = self._header()
            assert end == self._begin, (end, self._begin)
            self._file.flush()
            os.fsync(self._file.fileno())  # so that no crash of the machine leaves the name without the content


def _checksum(path: Path) -> int:
    """crc32 of a file, which is read without being mapped: what is mapped counts as the process's memory."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(READ_AT_ONCE):
            value = zlib.crc32(block, value)
    return value
