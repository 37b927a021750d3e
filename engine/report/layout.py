"""What templates show: tables with cells, and the page that is written whole or not at all."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from engine.errors import UserError
from engine.report.style import PALETTE
from engine.report.units import printable

MARK = '<meta name="generator" content="metadistil-engine report">'  # by which a page of ours is known again


@dataclass(frozen=True)
class Cell:
    """Text; `bar` from 0 to 1 is drawn behind it, `href` makes it a link."""

    text: str
    bar: float | None = None
    href: str = ""


@dataclass(frozen=True)
class Table:
    """Columns and rows of texts or cells; the first `left` columns are words, the others numbers. `strong`: rows that stand out."""

    name: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    left: int = 1
    strong: Sequence[int] = ()
    note: str = ""

    @property
    def cells(self) -> list[list[Cell]]:
        return [[cell if isinstance(cell, Cell) else Cell(str(cell)) for cell in row] for row in self.rows]


@dataclass(frozen=True)
class Section:
    """A heading with what stands below it; one without content is left out."""

    name: str
    title: str
    paragraphs: Sequence[str] = ()
    tables: Sequence[Table | None] = ()
    charts: Sequence[Any] = ()
    folded: Sequence[tuple[str, Table]] = ()  # what is said of a table, and the table that opens below it
    commands: Sequence[tuple[str, str]] = ()
    facts: Sequence[tuple[str, str]] = ()
    keys: Sequence[Any] = ()  # the legend of all charts of the section
    plot: str = ""  # a drawing as wide as the page
    texts: Sequence[str] = field(default=())  # a list of remarks

    def __bool__(self) -> bool:
        return any([self.paragraphs, [t for t in self.tables if t], [c for c in self.charts if c], self.folded,
                    self.commands, self.facts, self.plot, self.texts])  # fmt: skip


def without_empty(table: Table) -> Table:
    """The table without columns in which no row has anything."""
    kept = [i for i in range(len(table.columns)) if any(row[i].text for row in table.cells) or i < table.left]
    return Table(table.name, table.caption, [table.columns[i] for i in kept], [[row[i] for i in kept] for row in table.cells],
                 table.left, table.strong, table.note)  # fmt: skip


def render(**content: Any) -> str:
    """The page as text: one file that needs no other."""
    return _environment().get_template("page.html").render(mark=MARK, palette=PALETTE, **content)


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, finalize=lambda value: printable(value) if type(value) is str else value,
    )  # fmt: skip


def check_target(file: Path) -> None:
    """Raises UserError where a page cannot, or must not, be written to `file`."""
    if file.is_dir():
        raise UserError(f"--output {file} is a directory; name a file in it, such as {file / 'report.html'}.")
    if not file.parent.is_dir():
        raise UserError(
            f"--output {file} cannot be written: there is no directory {file.parent}; make it, or name another file."
        )
    if file.exists():
        try:
            with open(file, "rb") as old:
                ours = MARK.encode() in old.read(2000)
        except OSError as e:
            raise UserError(f"{file} exists and cannot be read ({e.strerror}); name another file with --output.") from e
        if not ours:
            raise UserError(f"{file} exists and is no page of engine.report; name another file with --output.")


def save(file: Path, page: str) -> None:
    """Whole or not at all; raises UserError where the system does not let it."""
    check_target(file)
    temporary = file.with_name(f".{file.name}.partial")
    try:
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, file)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{file} cannot be written ({e.strerror}); name another file: python -m engine.report "
                        f"{shlex.quote(str(file.parent))} --output FILE.") from e  # fmt: skip
