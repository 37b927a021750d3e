"""Where measurements go: `metrics.jsonl`, TensorBoard events, and the trackers that were asked for."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.telemetry.sinks import Lines, Run, Sink, TensorBoard, cause


class Monitor:
    """Gives records of plain numbers to every sink.

    `metrics.jsonl` is the record: where it cannot be written, UserError ends the run. Any other sink that fails is
    warned of once and gets nothing more. A context manager, which tells trackers whether the run came to its end.
    """

    def __init__(self, output: Path, trackers: Sequence[Sink] = (), *, settings: Mapping[str, Any] | None = None,
                 say: Callable[[str], None] = print, warn: Callable[[str], None] = warnings.warn):  # fmt: skip
        self._warn = warn
        self._sinks: list[Sink] = []
        self._lines = Lines()
        run = Run(output, dict(settings or {}), say, warn)
        self._lines.start(run)
        try:
            for sink in (TensorBoard(), *trackers):
                self._start(sink, run)
        except BaseException:
            self.close(finished=False)
            raise

    def _start(self, sink: Sink, run: Run) -> None:
        try:
            sink.start(run)
            self._sinks.append(sink)
        except UserError:
            raise
        except Exception as e:  # noqa: BLE001 - whatever a client raises, the run goes on without it
            self._warn(f"{sink.name} cannot be started ({cause(e)}); metrics.jsonl has everything.")

    def log(self, phase: str, step: int, values: Mapping[str, Any]) -> None:
        self._lines.log(phase, step, values)
        self._each(lambda sink: sink.log(phase, step, values))

    def rewind(self, phase: str, step: int) -> None:
        """Take back what was logged of `phase` after `step`, where a sink can: a run goes on from its checkpoint."""
        self._lines.rewind(phase, step)
        self._each(lambda sink: sink.rewind(phase, step))

    def close(self, finished: bool = True) -> None:
        """Idempotent. Waits for what trackers have not yet sent."""
        sinks, self._sinks = self._sinks, []
        try:
            for sink in sinks:
                try:
                    sink.close(finished)
                except Exception as e:  # noqa: BLE001 - as above
                    self._warn(f"{sink.name} could not be closed ({cause(e)}); metrics.jsonl has everything.")
        finally:
            self._lines.close(finished)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(finished=kind is None)

    def _each(self, call: Callable[[Sink], None]) -> None:
        for sink in list(self._sinks):
            try:
                call(sink)
            except Exception as e:  # noqa: BLE001 - a dashboard is not worth a training run
                self._sinks.remove(sink)
                with suppress(Exception):
                    sink.close(finished=False)
                self._warn(f"{sink.name} failed ({cause(e)}) and gets nothing more; metrics.jsonl has everything.")
