"""Where a mutant's line stands: found by its text and its function's name, in whatever file these are today."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

FOLDERS = ("engine", "kernels", "csrc")
SUFFIXES = (".py", ".cpp", ".h")


@dataclass
class Source:
    path: Path  # from the tree's root
    lines: list[str]
    tree: ast.Module | None  # of Python

    def __post_init__(self):
        self.codes = [code(line) for line in self.lines]

    def function(self, number: int) -> str:
        """Qualified name of the innermost function or class around a line, counted from 0; "" outside of all and in C++."""
        names, body = [], [] if self.tree is None else self.tree.body
        while body:
            inner = [n for n in body if n.lineno - 1 <= number < n.end_lineno]
            body = [n for node in inner for n in ast.iter_child_nodes(node) if hasattr(n, "lineno")]
            names += [n.name for n in inner if isinstance(n, ast.FunctionDef | ast.ClassDef)]
        return ".".join(names)


def key(path: Path, function: str) -> str:
    """A function by which tests are looked up."""
    return f"{path}::{function}"


def sources(tree: Path) -> list[Source]:
    """All code that mutants are looked for in; links to folders are not followed."""
    paths = sorted(p for folder in FOLDERS for p in (tree / folder).rglob("*") if p.suffix in SUFFIXES)
    paths = [p for p in paths if p.resolve() == tree.resolve() / p.relative_to(tree)]
    found = []
    for path in paths:
        text = path.read_text()
        found.append(
            Source(path.relative_to(tree), text.splitlines(), ast.parse(text) if path.suffix == ".py" else None)
        )
    return found


def code(line: str) -> str:
    """Without indentation and the comment behind it, which may be said in other words some day."""
    return re.sub(r"  (#|//) .*", "", line).strip()


def find(mutant: dict, among: list[Source]) -> tuple[Source, int]:
    """The source, and the line counted from 0, of a mutant; LookupError says why it is stale.

    A function that has another name today is accepted where the text stands in one place only.
    """
    old = [code(line) for line in mutant["old"].splitlines()]
    found = [
        (source, i)
        for source in among
        for i, line in enumerate(source.codes)
        if line == old[0] and source.codes[i : i + len(old)] == old
    ]
    named = [(source, i) for source, i in found if source.function(i) == mutant["function"]]
    found = named or found
    if len(found) != 1:
        places = ", ".join(f"{source.path}:{i + 1}" for source, i in found)
        raise LookupError(f"{mutant['name']}: " + (f"found {len(found)} times: {places}" if found else "not found"))
    return found[0]


def changed(mutant: dict, source: Source, number: int) -> str:
    """The file's text with the mutant in it."""
    lines = list(source.lines)
    for i, line in enumerate(mutant["new"].splitlines(), number):
        lines[i] = lines[i][: len(lines[i]) - len(lines[i].lstrip())] + line
    return "\n".join(lines) + "\n"
