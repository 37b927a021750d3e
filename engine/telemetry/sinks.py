"""What a sink of measurements is, and the two that every run has: `metrics.jsonl` and TensorBoard events."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from engine.errors import UserError


@dataclass(frozen=True)
class Run:
    """What a sink is told about the run. `say` and `warn` write to the console."""

    output: Path
    settings: Mapping[str, Any] = field(default_factory=dict)  # the flat configuration
    say: Callable[[str], None] = print
    warn: Callable[[str], None] = print

    @property
    def name(self) -> str:
        return self.output.resolve().name

    @property
    def _file(self) -> Path:
        return self.output / "trackers.json"

    def remembered(self, tracker: str) -> str | None:
        """What `remember` kept of `tracker`: None in a run that is not resumed, or had not this tracker."""
        try:
            found = json.loads(self._file.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as e:
            raise UserError(f"{self._file} cannot be read ({cause(e)}); delete it, and trackers begin anew.") from e
        return found.get(tracker) if isinstance(found, dict) else None

    def remember(self, tracker: str, id: str) -> None:
        """Keep the tracker's own id of this run in the output directory, for the run that resumes it."""
        kept = json.loads(self._file.read_bytes()) if self._file.exists() else {}
        _replace(self._file, json.dumps(kept | {tracker: id}, indent=2).encode() + b"\n")


class Sink(Protocol):
    """Takes numbers. What it raises is the caller's to handle; `Monitor` drops a sink that raises."""

    name: str

    def start(self, run: Run) -> None:
        """Called once, before anything else; UserError stops the run before it trains."""

    def log(self, phase: str, step: int, values: Mapping[str, Any]) -> None: ...

    def rewind(self, phase: str, step: int) -> None:
        """Forget, where that is possible, what was logged of `phase` after `step`."""

    def close(self, finished: bool) -> None:
        """The last call; `finished` is False where the run was stopped or failed."""


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The values that can be drawn."""
    return {name: value for name, value in values.items() if type(value) in (int, float)}


def cause(error: BaseException) -> str:
    """The first line of what went wrong, short enough for one line of a console."""
    text = (str(error).strip().splitlines() or [""])[0].strip().rstrip(".")
    kind = type(error).__name__
    return (f"{kind}: {text}" if text else kind)[:200]


class Lines:
    """`metrics.jsonl`, the record of the run: a JSON object a line. Raises UserError where it cannot be written."""

    name = "metrics.jsonl"

    def start(self, run: Run) -> None:
        self._path, self._warn = run.output / self.name, run.warn
        try:
            self._lines = open(self._path, "ab")  # noqa: SIM115 - lives as long as the run
        except OSError as e:
            raise self._refusal(e) from e

    def log(self, phase: str, step: int, values: Mapping[str, Any]) -> None:
        try:
            self._lines.write((json.dumps({"phase": phase, "step": step, **values}) + "\n").encode())
            self._lines.flush()
        except OSError as e:
            with suppress(OSError):  # what is in the buffer cannot be written now either
                self._lines.close()
            raise self._refusal(e) from e

    def rewind(self, phase: str, step: int) -> None:
        """Take back the lines of `phase` after `step`: of a run that was killed later than its checkpoint.

        A line that is no record, which a power failure or a full disk leaves, is left out with a warning.
        """
        lines = self._path.read_bytes().splitlines(keepends=True)
        records = [_record(line) for line in lines]
        if broken := records.count(None):
            some = "a line that is" if broken == 1 else f"{broken} lines that are"
            self._warn(f"{self._path} had {some} not whole, as a killed run or a full disk leaves them; left out.")
        kept = [
            line for line, record in zip(lines, records, strict=True)
            if record is not None and not (record["phase"] == phase and record["step"] > step)
        ]  # fmt: skip
        if kept != lines:
            try:
                _replace(self._path, b"".join(kept))
                self._lines.close()
                self._lines = open(self._path, "ab")  # noqa: SIM115 - the file of that name is another one now
            except OSError as e:
                raise self._refusal(e) from e

    def close(self, finished: bool) -> None:
        self._lines.close()

    def _refusal(self, error: OSError) -> UserError:
        return UserError(
            f"{self._path} cannot be written ({error.strerror}); make room or give permission, then --resume."
        )


class TensorBoard:
    """Event files. They cannot forget: a resumed run shows what came after its checkpoint twice."""

    name = "TensorBoard"

    def start(self, run: Run) -> None:
        from torch.utils.tensorboard import SummaryWriter  # heavy, and this module has plain helpers for light ones

        self._events = SummaryWriter(run.output / "tensorboard")

    def log(self, phase: str, step: int, values: Mapping[str, Any]) -> None:
        for name, value in numbers(values).items():
            self._events.add_scalar(f"{phase}/{name}", value, step)

    def rewind(self, phase: str, step: int) -> None:
        pass

    def close(self, finished: bool) -> None:
        self._events.close()


def _record(line: bytes) -> dict[str, Any] | None:
    """The record in a line; None where there is none."""
    if not line.endswith(b"\n"):  # its writer was killed, or the disk was full
        return None
    try:
        found = json.loads(line)
    except ValueError:  # not JSON, or not UTF-8
        return None
    good = isinstance(found, dict) and isinstance(found.get("phase"), str) and type(found.get("step")) is int
    return found if good else None


def _replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_bytes(content)
    os.replace(temporary, path)
