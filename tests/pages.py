"""The documents, read for their code: fenced blocks, what they are marked with, and the commands in them."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDS = {
    "minutes": "as it stands; the slow tests run it at a small size",
    "data": "data or models of the reader's",
    "hub": "the model hub",
    "network": "a package index",
    "GPU": "a CUDA device",
}


@dataclass(frozen=True)
class Block:
    """A fenced block, with the comments that stand directly above it: `<!-- needs: hub -->`, `<!-- example: digits -->`."""

    page: Path
    line: int
    language: str
    text: str
    marks: dict[str, str]

    @property
    def needs(self) -> set[str]:
        return {need.strip() for need in self.marks["needs"].split(",")} if "needs" in self.marks else set()

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Every fenced block. Those of a measured comparison are its own command, on the data that it was measured on."""
    found, marks, open_at, measured = [], {}, None, False
    lines = page.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        if open_at is not None:
            if line == "```":
                text = "\n".join(lines[open_at : number - 1]) + "\n"
                found.append(Block(page, open_at, lines[open_at - 1][3:], text, marks))
                marks, open_at = {}, None
        elif line.startswith("```"):
            open_at = number
            marks |= {"needs": "data, minutes"} if measured else {}
        elif comment := re.fullmatch(r"<!-- ([a-z]+): (.+) -->", line):
            measured = measured or comment[1] == "comparison"
            marks[comment[1]] = comment[2]
        else:
            measured = measured and line != "<!-- end -->"
            marks = {}
    assert open_at is None, f"{page}:{open_at} is never closed"
    return found


def commands(bash: str) -> list[list[str]]:
    """The words of each command of a bash block."""
    lines = bash.replace("\\\n", " ").replace("&&\n", "\n").splitlines()
    parts = [part for line in lines for part in line.split("&&")]
    return [words for part in parts if (words := shlex.split(part, comments=True))]
