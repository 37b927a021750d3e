"""What is compared: rows, the cells that they are run as, and how a YAML file says so.

    title: KD and MetaDistil
    seeds: 5                             # or a list
    settings: {data: sst2, lr: 6e-5}     # of engine.train, for every row
    models: {bert: {place: ../encoder, layers: "1,3,5"}}   # what a name stands for; --model does the same
    rows:
      - {name: KD, method: kd, teachers: bert, student: distilbert, published: 93.1}
      - {name: BERT, show: bert, teachers: bert}             # no student: the teacher's own figure
    small: {seeds: 2, train_size: 2000}  # over the rows' settings with --scale small; a row may have its own

A row with `each: {target_domain: [books, dvd]}` is run for each value; the table has a column a value, and their average.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from engine import __version__, cli
from engine.config import LARGEST_SEED
from engine.errors import UserError

Settings = dict[str, Any]  # flat names of engine.config to values

GRID_KEYS = {"title", "note", "split", "seeds", "against", "settings", "models", "rows", "small"}
ROW_KEYS = {"name", "published", "each", "show", "against", "small"}
OURS = {
    "seed": "the comparison's seeds", "resume": "running the same comparison again",
    "output": "the comparison's own --output",
}  # fmt: skip
SMALL = {"seeds": 2, "train_size": 2000, "epochs": 1, "prepare_epochs": 1}  # where a grid has no `small`


@dataclass(frozen=True)
class Cell:
    """One run of engine.train."""

    row: int
    value: str | None  # of the row's `each`
    seed: int
    title: str
    label: str  # of its directory: rows that show several teachers of one run share it
    settings: Settings

    @property
    def name(self) -> str:
        """Of its directory. It holds a hash of the settings, so that changed ones are another run."""
        kept = {k: v for k, v in self.settings.items() if k not in cli.FREE_ON_RESUME}
        digest = hashlib.sha256(json.dumps([__version__, kept], sort_keys=True).encode()).hexdigest()[:10]
        words = re.sub(r"[^A-Za-z0-9]+", "-", self.label).strip("-").lower()
        return f"{words[:60].strip('-')}-{digest}"


@dataclass(frozen=True)
class Row:
    """One line of the table. `show` is the teacher whose own figure it is, else it is the student's."""

    name: str
    settings: Settings
    published: float | dict[str, float] | None = None
    each: tuple[str, list[str]] | None = None
    show: str | None = None
    against: str | None = None

    @property
    def method(self) -> str:
        return self.settings.get("method", "metadistil")

    @property
    def teachers(self) -> list[str]:
        """As the grid names them; none where there is no teacher."""
        if self.method == "finetune":
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

    title: str
    rows: list[Row]
    seeds: list[int]
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
        settings = {"teacher_seed": 0} | row.settings | ({} if value is None else {row.each[0]: value}) | {"seed": seed}
        if "data" in settings:
            settings["data"] = self.data.get(settings["data"], settings["data"])
        if not row.teachers:
            settings.pop("teachers", None)  # that the method reads none: another one is not another run
        settings |= self._placed(row)
        ending = [*([] if value is None else [value]), f"seed {seed}"]
        label = row.title if row.show is None else f"teachers {'+'.join(row.teachers)}"
        return Cell(number, value, seed, ", ".join([row.title, *ending]), ", ".join([label, *ending]), settings)

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


def of_methods(methods: str, teachers: str, student: str) -> dict[str, Any]:
    """The grid of a command line without a file: each teacher's own figure, then one row a method."""
    names = [name.strip() for name in methods.split(",") if name.strip()]
    taught = any(name != "finetune" for name in names)
    members = [name.strip() for name in teachers.split(",") if name.strip()] if taught else []
    rows: list[dict[str, Any]] = [{"name": "fine-tuned", "show": member} for member in members]
    rows += [{"name": name, "method": name} for name in names]
    return {"title": f"{', '.join(names)}", "settings": {"teachers": teachers, "student": student}, "rows": rows}


def read(file: str) -> dict[str, Any]:
    """A grid's YAML file; raises UserError where it cannot be read or holds no grid."""
    try:
        found = yaml.safe_load(Path(file).expanduser().read_text())
    except OSError as e:
        raise UserError(f"--config {file} cannot be read ({e.strerror}); give an existing YAML file of a grid.") from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        mark = getattr(e, "problem_mark", None)
        place = f", line {mark.line + 1}," if mark else ""
        raise UserError(f"--config {file}{place} is not valid YAML; recipes/table1.yaml shows how a grid looks.") from e
    if not isinstance(found, dict) or "rows" not in found:
        raise UserError(f"--config {file} holds no grid; it needs 'rows', as recipes/table1.yaml has them.")
    return found


def build(raw: dict[str, Any], source: str, scale: str = "full", flags: Settings | None = None, **changes: Any) -> Grid:
    """The checked grid of a mapping. `flags` win over all of its settings; `changes` replace seeds, against, places, data.

    Raises UserError naming `source` and the nearest known key.
    """
    flags = flags or {}
    _known(raw, GRID_KEYS, source)
    common, small = _mapping(raw, "settings", source), dict(_mapping(raw, "small", source))
    seeds = raw.get("seeds", 1)
    if scale == "small":
        small = small or dict(SMALL)
        seeds = small.pop("seeds", seeds)
    else:
        small = {}
    if not isinstance(raw["rows"], list) or not raw["rows"]:
        raise UserError(f"{source}: rows is no list of mappings; write each as '- {{name: KD, method: kd}}'.")
    rows = [_row(entry, common, small, scale, flags, source) for entry in raw["rows"]]
    for i, row in enumerate(rows):
        if row.title in [other.title for other in rows[:i]]:
            raise UserError(f"{source}: two rows are {row.title!r}; give one of them another name.")
    if raw.get("split", "test") not in ("test", "validation"):
        raise UserError(f"{source}: split is {raw['split']!r}; it must be test or validation.")
    places = {name: _place(name, entry, source) for name, entry in _mapping(raw, "models", source).items()}
    grid = Grid(str(raw.get("title", source)), rows, _seeds(changes.pop("seeds", None) or seeds, source),
                str(raw.get("note", "")), raw.get("split", "test"), raw.get("against"), places)  # fmt: skip
    grid = replace(grid, **changes | {"places": grid.places | changes.get("places", {})})
    for row in grid.rows:
        grid.reference(row)
        for value in row.values:
            _check(grid.cell(rows.index(row), value, grid.seeds[0]), source)
    return grid


def parse_seeds(given: str) -> int | list[int]:
    """Of --seeds: how many, or which ones."""
    try:
        return [int(part) for part in given.split(",")] if "," in given else int(given)
    except ValueError as e:
        raise UserError(f"--seeds is {given!r}; give how many, as in 5, or which ones, as in 0,1,7.") from e


def alike(given: str, known: Iterable[str]) -> str:
    """What to write instead, for the end of a sentence."""
    known = list(known)
    near = get_close_matches(given, known, 1)
    return f"did you mean {near[0]!r}" if near else f"known are {', '.join(known)}"


def _row(entry: Any, common: Settings, small: Settings, scale: str, flags: Settings, source: str) -> Row:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise UserError(f"{source}: the row {entry!r:.60} has no name; write it as '- {{name: KD, method: kd}}'.")
    where = f"{source}, row {entry['name']!r}"
    _known(entry, ROW_KEYS | cli.TYPES.keys(), where)
    own = {k: v for k, v in entry.items() if k not in ROW_KEYS}
    less = small | (_mapping(entry, "small", where) if scale == "small" else {})
    show = entry.get("show")
    settings = common | own | less | flags
    if show is not None:  # a kd run of one step prepares and measures the teacher
        settings |= {"method": "kd", "max_steps": 1, "student_warmup_epochs": 0}
    for name in settings:
        if name in OURS:
            raise UserError(f"{where}: {name} is not a grid's to set; it follows from {OURS[name]}.")
        if name not in cli.TYPES:
            raise UserError(f"{where}: {name!r} is not a setting of engine.train; {alike(name, cli.TYPES)}.")
        if not isinstance(settings[name], str | int | float):
            raise UserError(f"{where}: {name} is {settings[name]!r}; it must be one value.")
    settings = {name: str(v) if name in ("teachers", "student", "data") else v for name, v in settings.items()}
    row = Row(entry["name"], settings, _published(entry.get("published"), where), _each(entry.get("each"), where),
              show, entry.get("against"))  # fmt: skip
    if row.method != "finetune" and not row.teachers:
        raise UserError(f"{where}: the method {row.method} needs teachers; name at least one.")
    if show is not None and show not in row.teachers:
        raise UserError(f"{where}: show is {show!r}; it must be one of its teachers, {', '.join(row.teachers)}.")
    return row


def _check(cell: Cell, source: str) -> None:
    """Let engine.config see the settings, and keep its types: 6e-5 is text in YAML."""
    words = []
    for name, value in cell.settings.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif value is not False or cli.TYPES[name] is not bool:
            words.append(f"{flag}={value}")
    try:
        cli.parse(words)
    except UserError as e:
        raise UserError(f"{source}, {cell.title.rsplit(', ', 1)[0]}: {e}") from e


def _known(given: dict, known: Iterable[str], where: str) -> None:
    for key in given:
        if key not in set(known):
            raise UserError(f"{where}: {key!r} is not known here; {_near(str(key), known)}.")


def _near(key: str, known: Iterable[str]) -> str:
    near = get_close_matches(key, list(known), 1)
    return f"did you mean {near[0]!r}" if near else "see python -m engine.compare --help"


def _mapping(raw: dict, key: str, where: str) -> dict:
    found = raw.get(key) or {}
    if not isinstance(found, dict):
        raise UserError(f"{where}: {key} is {found!r:.60}; it must be a mapping, like '{key}: {{epochs: 3}}'.")
    return found


def _seeds(given: Any, source: str) -> list[int]:
    found = list(range(given)) if isinstance(given, int) and not isinstance(given, bool) else given
    if not isinstance(found, list) or not found or not all(
        isinstance(s, int) and not isinstance(s, bool) and 0 <= s <= LARGEST_SEED for s in found
    ):  # fmt: skip
        raise UserError(f"{source}: seeds is {given!r}; give how many (at least 1), or a list of different whole numbers.")
    if len(set(found)) < len(found):
        raise UserError(f"{source}: seeds is {given!r}; each seed can stand there once.")
    return found


def _each(given: Any, where: str) -> tuple[str, list[str]] | None:
    if given is None:
        return None
    if not isinstance(given, dict) or len(given) != 1 or not isinstance(values := next(iter(given.values())), list) or not values:
        raise UserError(f"{where}: each is {given!r:.80}; write one setting and its values, as in {{target_domain: [a, b]}}.")
    (name,) = given
    if name not in cli.TYPES or name in OURS:
        raise UserError(f"{where}: each has {name!r}, which is not a setting of engine.train; {alike(str(name), cli.TYPES)}.")
    return name, [str(value) for value in values]


def _published(given: Any, where: str) -> float | dict[str, float] | None:
    values = list(given.values()) if isinstance(given, dict) else [given]
    if given is not None and not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        raise UserError(f"{where}: published is {given!r}; it must be a number, or a mapping of values to numbers.")
    return given


def _place(name: str, entry: Any, source: str) -> tuple[str, str | None]:
    if isinstance(entry, str):
        return entry, None
    if not isinstance(entry, dict) or not isinstance(entry.get("place"), str) or entry.keys() - {"place", "layers"}:
        raise UserError(f"{source}: models has {name}: {entry!r:.60}; write a place, or {{place: DIR, layers: \"1,3,5\"}}.")
    return entry["place"], None if entry.get("layers") is None else str(entry["layers"])
