"""Running cells: each a process of its own, so that one that fails or is killed takes nothing with it, and memory is its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

import engine
from engine.compare.grid import Cell
from engine.run.interrupts import Interrupted, Interrupts

COMMAND = [sys.executable, "-m", "engine.train"]
POLL = 0.2  # seconds between two looks at whether a signal came
PATIENCE = 30  # seconds that a cell has to end after a second signal, before it is killed


class Stopped(Exception):
    """A signal asked the comparison to stop; the running cell has ended."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


@dataclass(frozen=True)
class Outcome:
    """What a cell came to: its summary, or the last line of what went wrong."""

    summary: dict | None
    error: str
    log: Path


class Cells:
    """Runs cells below `folder`: <name>/ is what engine.train leaves, <name>.yaml its settings, <name>.log what it said."""

    def __init__(self, folder: Path, cache_dir: str | None, interrupts: Interrupts):
        self.folder, self.cache_dir, self.interrupts = folder, cache_dir, interrupts

    def directory(self, cell: Cell) -> Path:
        """Where a cell is run. Rows of equal settings share it: those that show the teachers of one run, say."""
        found = [run for run in sorted(self.folder.glob(f"*-{cell.digest}")) if run.is_dir()]
        return found[0] if found else self.folder / cell.name

    def state(self, cell: Cell) -> Literal["new", "interrupted", "finished"]:
        run = self.directory(cell)
        if (run / "summary.json").exists():
            return "finished"
        return "interrupted" if (run / "config.yaml").exists() else "new"

    def run(self, cell: Cell) -> Outcome:
        """The outcome of a cell, which is run or resumed unless it is finished. Raises Stopped after a signal."""
        run = self.directory(cell)
        log, settings = (self.folder / f"{run.name}.{suffix}" for suffix in ("log", "yaml"))
        state = self.state(cell)
        if state == "finished":
            return _outcome(run, 0, log)
        self.folder.mkdir(parents=True, exist_ok=True)
        settings.write_text(yaml.safe_dump(cell.settings, sort_keys=False))
        words = ["--resume"] if state == "interrupted" else ["--config", str(settings)]
        words += ["--output", str(run)]
        words += [] if self.cache_dir is None else ["--cache-dir", self.cache_dir]
        with open(log, "ab" if state == "interrupted" else "wb") as file:
            status = self._wait(words, file)
        if self.interrupts.requested is not None and not (run / "summary.json").exists():
            raise Stopped(self.interrupts.requested)
        return _outcome(run, status, log)

    def _wait(self, words: list[str], log) -> int:
        """The exit status of engine.train. A signal is handed on once, which lets the step end and saves a checkpoint."""
        root = Path(engine.__file__).resolve().parents[1]  # of a checkout, which is found from any directory so
        paths = [] if root.name in ("site-packages", "dist-packages") else [str(root)]
        paths += filter(None, [os.environ.get("PYTHONPATH")])
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
        self._stop_if_asked()
        self.interrupts.deferring = True
        # a session of its own: a terminal sends Ctrl-C to a whole group, and the cell would get every one of them twice
        cell = subprocess.Popen([*COMMAND, *words], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                                env=environment, start_new_session=True)  # fmt: skip
        try:
            handed_on = False
            while True:
                try:
                    return cell.wait(POLL)
                except subprocess.TimeoutExpired:
                    if self.interrupts.requested is not None and not handed_on:
                        cell.send_signal(self.interrupts.requested)
                        handed_on = True
        except Interrupted as e:  # a second signal
            cell.send_signal(e.status - 128)
            try:
                cell.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                cell.kill()
            raise Stopped(e.status - 128) from e
        finally:
            self.interrupts.deferring = False
            if cell.poll() is None:
                cell.kill()
                cell.wait()

    def _stop_if_asked(self) -> None:
        if self.interrupts.requested is not None:
            raise Stopped(self.interrupts.requested)


def _outcome(run: Path, status: int, log: Path) -> Outcome:
    file = run / "summary.json"
    if file.exists():
        try:
            return Outcome(json.loads(file.read_text()), "", log)
        except ValueError:
            return Outcome(None, f"{file} is damaged; remove the directory to run it again", log)
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    said = errors[-1].removeprefix("error: ") if errors else lines[-1] if lines else "it said nothing"
    killed = f"killed by signal {-status}; " if status < 0 else ""
    return Outcome(None, f"{killed}{said}", log)
