"""docs/results.md: tables of comparisons, from results under `bench/results/`; what is written around them is kept.

python -m bench.results_page DIR...    # keep comparison.json of these outputs of engine.compare, and write the page
python -m bench.results_page           # write the page from what is kept
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from engine.report.comparison_tables import body

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "bench" / "results", ROOT / "docs" / "results.md"
MARKED = r"<!-- comparison: ([\w.-]+) -->\n.*?<!-- end -->"


def keep(directories: list[str]) -> list[str]:
    """Take the results of comparisons into bench/results/; their names. A later one of a name replaces an earlier one.

    Raises FileNotFoundError for what is no comparison's directory, ValueError for one that has runs missing.
    """
    kept = {}
    for directory in directories:
        file = Path(directory) / "comparison.json"
        if not file.exists():
            raise FileNotFoundError(
                f"{directory} holds no comparison.json; name a directory that engine.compare wrote."
            )
        found = json.loads(file.read_text())
        if found["missing"]:
            raise ValueError(f"{directory} has {found['missing']} runs to make yet; finish it with its command.")
        kept[found["name"] + "-small" * (found["scale"] == "small")] = found
    for name, found in kept.items():
        (RESULTS / f"comparison-{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    return list(kept)


def update(text: str) -> str:
    """The page with the table behind each marker made anew, and a section at its end for each kept comparison without one."""
    kept = {file.stem.removeprefix("comparison-"): file for file in sorted(RESULTS.glob("comparison-*.json"))}
    found = {name: json.loads(file.read_text()) for name, file in kept.items()}
    marked = {match[1] for match in re.finditer(MARKED, text, re.DOTALL)}
    for name in sorted(found.keys() - marked):
        text = f"{text.rstrip()}\n\n## {found[name]['title']}\n<!-- comparison: {name} -->\n<!-- end -->\n"

    def table(match: re.Match) -> str:
        rendered = body(found[match[1]]).rstrip() if match[1] in found else "Not yet measured."
        return f"<!-- comparison: {match[1]} -->\n{rendered}\n<!-- end -->"

    return re.sub(MARKED, table, text, flags=re.DOTALL)


def main(directories: list[str]) -> None:
    for name in keep(directories):
        print(f"kept: {name}")
    PAGE.write_text(update(PAGE.read_text()))


if __name__ == "__main__":
    main(sys.argv[1:])
