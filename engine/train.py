"""`python -m engine.train`: parse, build, run, close."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path

from engine import cli
from engine.config import Config
from engine.errors import UserError
from engine.run.interrupts import Interrupted, Interrupts
from engine.run.output import CHECKPOINT, OutputDirectory
from engine.screen.console import Console


def main(argv: list[str] | None = None) -> int:
    """Run one job; returns the exit status: 0, 2 for bad input, 128 + n when stopped by signal n."""
    console = Console()
    started = time.monotonic()
    config = None
    try:
        with Interrupts(console.say) as interrupts:
            words = list(sys.argv[1:] if argv is None else argv)
            config = cli.parse(words)
            run(config, console, interrupts, started, shlex.join(["python", "-m", "engine.train", *words]))
        return 0
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except Interrupted as e:
        console.say(_farewell(e, config))
        return e.status


def run(config: Config, console: Console, interrupts: Interrupts, started: float, command: str) -> None:
    """`command` is what was typed, and `started` when, on the monotonic clock."""
    output = OutputDirectory(config.run.output, config.method.name, config.run.resume)
    config.run.output = str(output.path)
    if output.finished():
        console.say(f"The run in {output.path} is finished; its figures are in {output.path / 'summary.json'}.")
        return
    from engine.run import checkpoint, job  # torch and transformers wait until the settings are known to be good

    if config.run.resume and output.checkpoint.exists():
        checkpoint.check(output.checkpoint)  # refuses a damaged one before anything is written
    job.run(config, output, console, interrupts, started, command)


def _farewell(stop: Interrupted, config: Config | None) -> str:
    folder = config and config.run.output
    if not folder or not (Path(folder) / "config.yaml").exists():
        return f"Stopped by {stop}; nothing was written."
    if stop.saved:
        state = "; the checkpoint is saved. Resume"
    elif (Path(folder) / CHECKPOINT).exists():
        state = "; what came after the last checkpoint is lost. Resume"
    else:
        state = " before the first checkpoint. Start again"
    return f"Stopped by {stop}{state} with: python -m engine.train --resume --output {shlex.quote(folder)}"


if __name__ == "__main__":
    sys.exit(main())
