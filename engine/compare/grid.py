"""What is compared: rows, the cells that they are run as, and which row is compared with which."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from engine import cli
from engine.data import kept
from engine.errors import UserError
from engine.plugins import METHODS

Settings = dict[str, Any]  # flat names of engine.config to values


@dataclass(frozen=True)
class Cell:
    """One run of engine.train."""

    row: int
    value: str | None  # of the row's `each`
    seed: int
    title: str
    settings: Settings

    @property
    def digest(self) -> str:
        """Of all settings that change a result."""
        return kept.key(**{k: v for k, v in self.settings.items() if k not in cli.FREE_ON_RESUME})[:10]

    @property
    def name(self) -> str:
        """Of its directory: changed settings are another run."""
        words = re.sub(r"[^A-Za-z0-9]+", "-", self.title).strip("-").lower()
        return f"{words[:60].strip('-')}-{self.digest}"


@dataclass(frozen=True)
class Row:
    """One line of the table. `show` is the teacher whose own figure it is, else it is the student's."""

    name: str
    settings: Settings
    published: float | dict[str, float] | None = None
    each: tuple[str, Settings] | None = None  # a setting, and by their names the values that the row is run for
    show: str | None = None
    against: str | None = None

    @property
    def method(self) -> str:
        return self.settings.get("method", "metadistil")

    @property
    def teachers(self) -> list[str]:
        """As the grid names them; none where there is no teacher."""
        if METHODS.facts(self.method)["teachers"] == "none":
            return []
        return [name.strip() for name in self.settings.get("teachers", "bert").split(",") if name.strip()]

    @property
    def student(self) -> str:
        return self.settings.get("student", "distilbert")

    @property
    def models(self) -> str:
        if self.show is not None:
            return self.show
        return f"{'+'.join(self.teachers)} -> {self.student}" if self.teachers else self.student

    @property
    def title(self) -> str:
        return f"{self.name}, {self.models}"

    @property
    def values(self) -> list[str | None]:
        return list(self.each[1]) if self.each else [None]


@dataclass(frozen=True)
class Grid:
    """Rows by seeds; `data` and `places` say what names stand for."""

    name: str  # of its file
    title: str
    rows: list[Row]
    seeds: list[int]
    scale: str = "full"
    note: str = ""
    split: str = "test"  # whose figures are shown
    against: str | None = None
    places: dict[str, tuple[str, str | None]] = field(default_factory=dict)  # name: place, layers as a student
    data: dict[str, str] = field(default_factory=dict)

    def cells(self) -> list[Cell]:
        """All runs, seed by seed, so that a comparison that is stopped has whole seeds."""
        return [
            self.cell(number, value, seed)
            for i, seed in enumerate(self.seeds)
            for number, row in enumerate(self.rows)
            for value in row.values
            if row.show is None or i == 0  # one teacher serves all seeds
        ]

    def cell(self, number: int, value: str | None, seed: int) -> Cell:
        row = self.rows[number]
        own = {} if value is None else {row.each[0]: row.each[1][value]}
        settings = {"teacher_seed": 0} | row.settings | own | {"seed": seed}
        if "data" in settings:
            settings["data"] = self.data.get(settings["data"], settings["data"])
        if not row.teachers:
            settings.pop("teachers", None)  # that the method reads none: another one is not another run
        settings |= self._placed(row)
        title = ", ".join([row.title, *([] if value is None else [value]), f"seed {seed}"])
        return Cell(number, value, seed, title, settings)

    def reference(self, row: Row) -> Row | None:
        """What a row's figures are compared with: what is named, else kd with the same teachers and student, else kd with
        the same student. Raises UserError for a name that no row, or several have."""
        if row.show is not None:
            return None
        named = row.against or self.against
        if named is not None:
            found = find_row(self.rows, named, "against")
            return None if found is row else found
        rows = [other for other in self.rows if other.method == "kd" and other.show is None]
        if row in rows:
            return None
        same = [other for other in rows if other.student == row.student]
        return next((other for other in same if other.teachers == row.teachers), same[0] if same else None)

    def _placed(self, row: Row) -> Settings:
        """Settings that name models, with places for names; a place named again is its next sample."""
        found: Settings = {}
        if row.teachers:
            found["teachers"] = ",".join(self._teacher(row, i) for i in range(len(row.teachers)))
        if row.student in self.places:
            place, layers = self.places[row.student]
            found |= {"student": place} | ({} if layers is None else {"student_layers": layers})
        return found

    def _teacher(self, row: Row, i: int) -> str:
        name = row.teachers[i]
        if name in self.places:
            return self.places[name][0]
        numbered = re.fullmatch(r"(.*?)(\d+)", name)
        if not numbered or numbered[1] not in self.places:
            return name
        place = self.places[numbered[1]][0]
        before = sum(self._teacher(row, j) == place for j in range(i))
        if before + 1 != int(numbered[2]):
            raise UserError(f"row {row.name!r} has the teacher {name!r}, which as a local model is the {numbered[2]}. time that "
                            f"{numbered[1]!r} stands in its teachers; name the others before it.")  # fmt: skip
        return place


def find_row(rows: Iterable[Row], given: str, where: str) -> Row:
    """The row of that name or title; raises UserError where there is none, or several."""
    rows = list(rows)
    found = [row for row in rows if row.title == given] or [row for row in rows if row.name == given]
    if len(found) == 1:
        return found[0]
    if found:
        titles = " or ".join(repr(row.title) for row in found)
        raise UserError(f"{where} is {given!r}, which {len(found)} rows are called; write {titles}.")
    raise UserError(f"{where} is {given!r}, which no row is called; {alike(given, [r.name for r in rows])}.")


def alike(given: str, known: Iterable[str]) -> str:
    """What to write instead, for the end of a sentence."""
    known = list(known)
    near = get_close_matches(given, known, 1)
    return f"did you mean {near[0]!r}" if near else f"known are {', '.join(known)}"
