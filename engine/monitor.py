"""Where measurements go: `metrics.jsonl` and TensorBoard events in the run's directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter


class Monitor:
    """Appends records of plain numbers. A resumed run takes back what was logged after its checkpoint."""

    def __init__(self, output: Path):
        self._lines = open(output / "metrics.jsonl", "ab")  # noqa: SIM115 - lives as long as the run
        self._events = SummaryWriter(output / "tensorboard")

    def log(self, phase: str, step: int, values: dict[str, Any]) -> None:
        self._lines.write((json.dumps({"phase": phase, "step": step, **values}) + "\n").encode())
        self._lines.flush()
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._events.add_scalar(f"{phase}/{name}", value, step)

    def position(self) -> int:
        return self._lines.tell()

    def rewind(self, position: int) -> None:
        self._lines.truncate(position)
        self._lines.seek(0, 2)

    def close(self) -> None:
        self._lines.close()
        self._events.close()
