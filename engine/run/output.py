"""The directory of a run: claimed by one process, never overwritten silently."""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

from engine.errors import UserError

CHECKPOINT = "checkpoint.safetensors"


class OutputDirectory:
    """Checks on construction that nothing would be overwritten; `create` makes the directory and locks it."""

    def __init__(self, given: str | None, method: str, resume: bool):
        if given is not None and not given.strip():
            raise UserError("--output is empty; name a directory, or leave the flag out for one under runs/.")
        self.path = Path(given).expanduser() if given else _fresh(Path("runs"), method)
        self.resume = resume
        self._lock = None
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--output {self.path} is a file; give a directory.")
        self._refuse_used()
        require_directory(self.path, "--output")

    def create(self) -> None:
        """Make the directory; raises UserError where another process works in it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "w")  # noqa: SIM115 - held until `close`
        except OSError as e:
            raise UserError(f"--output {self.path} cannot be made ({e.strerror}); give another directory.") from e
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            self._lock.close()  # not ours: `close` must leave the other's file alone
            self._lock = None
            raise UserError(f"--output {self.path} is in use by another process; wait for it or stop it.") from e
        self._refuse_used()  # by a process that came and went while this one was loading

    def _refuse_used(self) -> None:
        if self.resume or not self.path.exists():
            return
        if any(entry.name != ".lock" for entry in self.path.iterdir()):
            raise UserError(f"--output {self.path} holds files already; give another directory, or add --resume to continue an "
                            "interrupted run.")  # fmt: skip

    @property
    def checkpoint(self) -> Path:
        """The file of the run's checkpoint, there or not."""
        return self.path / CHECKPOINT

    def finished(self) -> bool:
        return (self.path / "summary.json").exists()

    def write(self, name: str, content: str | dict[str, Any]) -> None:
        """Write a text or JSON file whole or not at all."""
        text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
        temporary = self.path / f".{name}.partial"
        temporary.write_text(text)
        os.replace(temporary, self.path / name)

    def close(self) -> None:
        if self._lock is not None:
            (self.path / ".lock").unlink(missing_ok=True)
            self._lock.close()


def require_directory(path: Path, flag: str) -> None:
    """Raises UserError where `path` is not, and cannot be made, a directory to write to."""
    existing = next(p for p in [path, *path.absolute().parents] if p.exists())
    if not existing.is_dir():
        raise UserError(f"{flag} {path} cannot be made: {existing} is a file; give another directory.")
    if not os.access(existing, os.W_OK):
        raise UserError(f"{flag} {path} cannot be written: no permission for {existing}; give another directory.")


def _fresh(parent: Path, method: str) -> Path:
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{method}"
    candidates = (parent / (name if n == 1 else f"{name}-{n}") for n in range(1, 1000))
    return next(c for c in candidates if not c.exists())
