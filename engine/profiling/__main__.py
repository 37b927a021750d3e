"""`python -m engine.profiling`: read the command line, measure steps or estimate memory."""

from __future__ import annotations

import os
import signal
import sys

from engine.errors import UserError
from engine.profiling import options
from engine.screen.console import Console


def main(argv: list[str] | None = None) -> int:
    """Returns 0, 2 for bad input, 130 when stopped by Ctrl-C."""
    console = Console()
    try:
        given = options.parse(sys.argv[1:] if argv is None else argv)
        if given.estimate:
            from engine.profiling import forecast  # here: it imports torch

            forecast.run(given, console)
        else:
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or torch's profiler tells of its own starts and stops,
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # and of memory that was allocated before it began
            from engine.profiling import profile

            profile.run(given, console)
        return 0
    except KeyboardInterrupt:
        console.say("Stopped; what has been measured is kept.")
        return 128 + signal.SIGINT
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
