"""`python -m engine.compare`: read the command line, run the grid's cells, show what they came to."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from pathlib import Path

from engine.compare import options
from engine.compare.cells import Cells, Stopped
from engine.compare.grid import Cell, Grid
from engine.compare.result import collect, described
from engine.errors import UserError
from engine.report.comparison_tables import console_tables, markdown
from engine.report.words import DEMONSTRATION
from engine.run.interrupts import Interrupted, Interrupts
from engine.run.output import OutputDirectory
from engine.screen.console import Console


def main(argv: list[str] | None = None) -> int:
    """Compare; returns 0, 1 where cells failed, 2 for bad input, 128 + n when stopped by signal n."""
    words = list(sys.argv[1:] if argv is None else argv)
    console, output = Console(), None
    try:
        with Interrupts(console.say) as interrupts:
            given = options.parse(words)
            output = _open(given.output)
            try:
                return _compare(given, output, console, interrupts)
            finally:
                output.close()
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except Interrupted as e:
        console.say(f"Stopped by {e}; what is finished is kept. Continue with: {_again(words, output)}")
        return e.status


def _compare(given: options.Options, output: OutputDirectory, console: Console, interrupts: Interrupts) -> int:
    grid, cells = given.grid, given.grid.cells()
    output.create()
    runner = Cells(output.path / "cells", given.cache_dir, interrupts)
    done: list[tuple[Cell, dict]] = []
    failed: list[tuple[Cell, str]] = []

    def keep() -> dict:
        found = collect(grid, done, failed, given.command)
        output.write("comparison.json", found)
        output.write("table.md", markdown(found))
        return found

    keep()
    _announce(grid, cells, output.path, console)
    try:
        for number, cell in enumerate(cells, 1):
            console.say(f"[{number}/{len(cells)}] {cell.title}" + _what_is_there(runner, cell))
            outcome = runner.run(cell)
            if outcome.summary is None:
                failed.append((cell, outcome.error))
                console.warn(f"{cell.title} failed: {outcome.error} ({outcome.log})")
            else:
                done.append((cell, outcome.summary))
                console.say(f"    {described(grid, cell, outcome.summary)}")
            keep()
    except Stopped as e:
        _show(keep(), output, console)
        raise Interrupted(e.number) from e
    found = keep()
    _show(found, output, console)
    return 1 if failed else 0


def _announce(grid: Grid, cells: list[Cell], folder: Path, console: Console) -> None:
    seeds = ", ".join(map(str, grid.seeds))
    console.say(
        f"{len(cells)} runs: {len(grid.rows)} rows, seeds {seeds}. Results go to {folder}, each run's output to cells/*.log."
    )
    console.say("Teachers are prepared once, with one --teacher-seed, and serve all seeds: the intervals show the spread of the "
                "students alone.")  # fmt: skip


def _what_is_there(runner: Cells, cell: Cell) -> str:
    state = runner.state(cell)
    return {"new": "", "finished": ": finished before", "interrupted": ": continues from its checkpoint"}[state]


def _show(found: dict, output: OutputDirectory, console: Console) -> None:
    from engine.report import pages  # here: matplotlib takes a second
    from engine.report.comparison_plot import plot

    plot(found, output.path)
    if "embedded" in found["sources"]:
        console.banner("EMBEDDED DEMONSTRATION", DEMONSTRATION)
    if len(found["sources"]) > 1:
        console.warn(f"rows come from different sources ({', '.join(found['sources'])}), so they cannot be compared.")
    few, most = found["sizes"].get("train", [0, 0])
    if few < most and not any(row["values"] for row in found["rows"]):
        console.warn(f"rows were trained on {few:,} to {most:,} examples, because several teachers share the data; lower "
                     "--train-size, so that all rows have the same number.")  # fmt: skip
    for table in console_tables(found):
        console.table(**table)
    for entry in found["failed"]:
        console.warn(f"failed: {entry['title']}: {entry['error']}")
    try:
        _, problems = pages.write([output.path], None)
    except UserError as e:  # the figures are there all the same
        problems = [str(e)]
    for problem in problems:
        console.warn(problem)
    files = ", ".join(("comparison.json", "table.md", "plot.svg", "plot.png", "report.html"))
    console.say(f"Results: {output.path} ({files})")


def _open(given: str | None) -> OutputDirectory:
    """The comparison's directory: a new one, or one that a comparison left; raises UserError for anything else."""
    if importlib.util.find_spec("matplotlib") is None:  # known now, not after hours of runs
        raise UserError("the plot needs matplotlib, which is not installed; pip install matplotlib.")
    output = OutputDirectory(given, "compare", resume=True)
    others = output.path.exists() and any(entry.name != ".lock" for entry in output.path.iterdir())
    if others and not (output.path / "comparison.json").exists():
        raise UserError(f"--output {output.path} holds files that are not a comparison's; give another directory.")
    return output


def _again(words: list[str], output: OutputDirectory | None) -> str:
    named = any(word.split("=")[0] == "--output" for word in words)
    where = [] if named or output is None else ["--output", str(output.path)]
    return shlex.join(["python", "-m", "engine.compare", *words, *where])


if __name__ == "__main__":
    sys.exit(main())
