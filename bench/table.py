"""The tables of README.md and docs/, from results under `bench/results/`; no figure is written by hand.

python -m bench.table merge FILE...                                   # results of pytest-benchmark into bench/results/
python -m bench.table merge DIR                                       # those that make gpu-check left on another machine
python -m bench.table collect RUN_DIR... > bench/results/sst2.json    # summaries of runs to one file of results
python -m bench.table profile DIR > bench/results/profile-x.json      # one of engine.profiling, without its timelines
python -m bench.table                                                 # write every table into its page
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from bench import records
from bench.kernel_table import render_kernels
from bench.meta_step_table import render_meta_step
from bench.run_table import collect, render_runs
from bench.step_table import render_steps, render_steps_short
from bench.telemetry_table import render_telemetry
from bench.time_machine_table import render_time_machine
from engine.profiling import tables

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Rows of pytest-benchmark, by subject: bench_<subject>.py
BENCHMARKS = {
    "kernels": render_kernels, "meta-step": render_meta_step, "steps": render_steps, "telemetry": render_telemetry,
    "time-machine": render_time_machine,
}  # fmt: skip
SHORT = {"steps": render_steps_short}  # for a mark NAME-short: what a README has room for
OTHERS = {"runs": render_runs, "profile": lambda found: tables.page(found, largest=True)}  # by `kind`


def collect_profile(directory: str) -> dict[str, Any]:
    """What its tables need."""
    found = json.loads((Path(directory) / "profile.json").read_text())
    for row in found["rows"]:
        row.pop("timeline", None)
    return found


def merge(given: list[Path]) -> list[str]:
    """Take results of pytest-benchmark, files or folders of them, into bench/results/; the subjects that were there.

    A group that was measured there replaces ours. Raises FileNotFoundError where there are none.
    """
    files = [file for each in given for file in (sorted(each.glob("*.json")) if each.is_dir() else [each])]
    if not files:
        raise FileNotFoundError(f"{given[0]} holds no results; name the folder that make gpu-check wrote.")
    return records.merge(files, RESULTS)


def render(file: Path, short: bool = False) -> str:
    """The table of a file of results: of benchmarks by the file's name, of others by their kind."""
    results = json.loads(file.read_text())
    if "benchmarks" in results:
        return (SHORT if short else BENCHMARKS)[file.stem](records.rows(results))
    return OTHERS[results["kind"]](results)


def update(text: str) -> str:
    """A page's text with the table behind each `<!-- table: NAME -->` ... `<!-- end -->` made anew from NAME.json."""

    def table(match: re.Match) -> str:
        subject = match[1].removesuffix("-short")
        file = RESULTS / f"{subject}.json"
        if not file.exists() and subject not in BENCHMARKS:
            raise FileNotFoundError(f"{file} is missing, and a page asks for its table.")
        rendered = render(file, short=subject != match[1]) if file.exists() else "Not yet measured."
        return f"<!-- table: {match[1]} -->\n{rendered}\n<!-- end -->"

    return re.sub(r"<!-- table: ([\w-]+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def main(arguments: list[str]) -> None:
    match arguments:
        case []:
            for page in PAGES:
                page.write_text(update(page.read_text()))
        case ["merge", *given] if given:
            print("merged:", ", ".join(merge([Path(each) for each in given])))
        case ["collect", *directories] if directories:
            print(json.dumps(collect(directories), indent=1))
        case ["profile", directory]:
            print(json.dumps(collect_profile(directory), indent=1))
        case _:
            sys.exit("usage: python -m bench.table [merge FILE... | merge DIR | collect RUN_DIR... | profile DIR]")


if __name__ == "__main__":
    main(sys.argv[1:])
