"""Where measurements go: `metrics.jsonl` and TensorBoard events in the run's directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter


class Monitor:
    """Appends records of plain numbers. A resumed run takes back the lines after its checkpoint; TensorBoard, which
    cannot forget, shows that stretch twice."""

    def __init__(self, output: Path):
        self._lines = open(output / "metrics.jsonl", "ab")  # noqa: SIM115 - lives as long as the run
        self._events = SummaryWriter(output / "tensorboard")

    def log(self, phase: str, step: int, values: dict[str, Any]) -> None:
        self._lines.write((json.dumps({"phase": phase, "step": step, **values}) + "\n").encode())
        self._lines.flush()
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._events.add_scalar(f"{phase}/{name}", value, step)

    def rewind(self, phase: str, step: int) -> None:
        """Take back what was logged of `phase` after `step`: by a run that was killed later than its checkpoint."""
        lines = Path(self._lines.name).read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith(b"\n") and not _later(json.loads(line), phase, step)]
        if kept != lines:
            self._lines.truncate(0)
            self._lines.write(b"".join(kept))
            self._lines.flush()

    def close(self) -> None:
        self._lines.close()
        self._events.close()


def _later(record: dict[str, Any], phase: str, step: int) -> bool:
    return record["phase"] == phase and record["step"] > step
