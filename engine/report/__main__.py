"""`python -m engine.report`: pages of runs that are there."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from engine.errors import UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see python -m engine.report --help.")


def parser() -> argparse.ArgumentParser:
    result = _Parser(
        prog="python -m engine.report", allow_abbrev=False,
        description="Make the page of a run or of a comparison again, or one page of several runs side by side. A page is one "
        "file of HTML that needs nothing else: results, curves, time and memory by section of the step, settings, and the "
        "commands that repeat the run.",
        epilog="A run that is not finished has a page too: what it has logged so far. A directory that is given twice counts once.",
    )  # fmt: skip
    result.add_argument("directories", metavar="RUN_DIR", nargs="+", help="a directory that engine.train or engine.compare wrote; of "
                        "several, all their runs are compared")  # fmt: skip
    result.add_argument("--output", metavar="FILE", help="the page (default: report.html, of one directory in it, of several in the "
                        "working directory); only a page of this command is replaced")  # fmt: skip
    return result


def main(argv: list[str] | None = None) -> int:
    """Write the page; returns 0, or 2 for bad input."""
    try:
        given = parser().parse_args(argv)
        from engine.report import pages  # here: matplotlib takes a moment

        file, problems = pages.write(given.directories, given.output)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)
    print(f"Report: {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
