"""Reads directories and writes their page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engine.errors import UserError
from engine.report import run_page, several_page
from engine.report.layout import check_target, render, save
from engine.report.load import Comparison, Run, read

NAME = "report.html"


def write(given: Sequence[str | Path], output: str | Path | None) -> tuple[Path, list[str]]:
    """One page of all directories; where it lies, and what could not be read.

    A single run or comparison has its own page, which goes into its directory; several runs, those of comparisons among them,
    stand side by side in ./report.html. A directory counts once. Raises UserError.
    """
    found = list({one.folder.resolve(): one for one in map(read, given)}.values())
    single = found[0] if len(found) == 1 else None
    file = Path(output).expanduser() if output is not None else single.folder / NAME if single else Path(NAME)
    check_target(file)
    if isinstance(single, Comparison):
        try:
            content = several_page.comparison(single, file)
        except (KeyError, TypeError, ValueError, AttributeError) as e:  # the tables trust what engine.compare wrote
            raise UserError(f"{single.folder / 'comparison.json'} is damaged ({type(e).__name__}: {str(e)[:60]!r}); run the comparison's "
                            "command again, which keeps finished runs.") from e  # fmt: skip
    elif single is not None:
        content = run_page.content(single) | {"runs": []}
    else:
        runs: dict[Path, Run] = {}
        for one in found:
            runs |= {run.folder.resolve(): run for run in (one.runs if isinstance(one, Comparison) else [one])}
        if not runs:
            raise UserError(f"{found[0].folder} and the others hold no runs yet; give directories of runs.")
        content = several_page.side_by_side(list(runs.values()), file)
        content["problems"] += [
            p for one in found if isinstance(one, Comparison) for p in one.problems if p not in content["problems"]
        ]
    save(file, render(**content))
    problems = [p for one in found for p in one.problems]
    return file, problems
