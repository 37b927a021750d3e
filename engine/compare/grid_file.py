"""A grid from a YAML file or from flags, checked before anything runs.

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

from collections.abc import Iterable
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from engine import cli
from engine.compare.grid import Grid, Row, Settings, alike
from engine.config import LARGEST_SEED
from engine.errors import UserError
from engine.plugins import METHODS, short_name

GRID_KEYS = {"title", "note", "split", "seeds", "against", "settings", "models", "rows", "small"}
ROW_KEYS = {"name", "published", "each", "show", "against", "small"}
OURS = {
    "seed": "the comparison's seeds", "resume": "running the same comparison again",
    "output": "the comparison's own --output",
}  # fmt: skip
SMALL = {"seeds": 2, "train_size": 2000, "epochs": 1, "prepare_epochs": 1}  # where a grid has no `small`


def of_methods(methods: str, teachers: str, student: str) -> dict[str, Any]:
    """The grid of a command line without a file: each teacher's own figure, then one row a method."""
    names = [METHODS.settle(name.strip(), "--methods") for name in methods.split(",") if name.strip()]
    taught = any(METHODS.facts(name)["teachers"] != "none" for name in names)
    members = [name.strip() for name in teachers.split(",") if name.strip()] if taught else []
    rows: list[dict[str, Any]] = [{"name": "fine-tuned", "show": member} for member in dict.fromkeys(members)]
    rows += [{"name": short_name(name), "method": name} for name in names]
    return {
        "title": ", ".join(map(short_name, names)),
        "settings": {"teachers": teachers, "student": student},
        "rows": rows,
    }


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
    name = Path(source).stem.strip("-")
    grid = Grid(name, str(raw.get("title", name)), rows, _seeds(changes.pop("seeds", None) or seeds, source), scale,
                str(raw.get("note", "")), raw.get("split", "test"), raw.get("against"), places)  # fmt: skip
    grid = replace(grid, **changes | {"places": grid.places | changes.get("places", {})})
    for row in grid.rows:
        grid.reference(row)  # raises, as cells do, for names that do not fit
    assert grid.cells()
    return grid


def parse_seeds(given: str) -> int | list[int]:
    """Of --seeds: how many, or which ones."""
    try:
        return [int(part) for part in given.split(",")] if "," in given else int(given)
    except ValueError as e:
        raise UserError(f"--seeds is {given!r}; give how many, as in 5, or which ones, as in 0,1,7.") from e


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
    each = _each(entry.get("each"), where)
    if each and each[0] in flags:
        raise UserError(f"--{each[0].replace('_', '-')} does not go with the row {entry['name']!r}, which is run for each of its own "
                        "values; use --values to choose among them, or --data NAME=PLACE for where data are.")  # fmt: skip
    row = Row(entry["name"], _typed(settings, where), _published(entry.get("published"), where), each, show,
              entry.get("against"))  # fmt: skip
    if METHODS.facts(row.method)["teachers"] != "none" and not row.teachers:
        raise UserError(f"{where}: the method {short_name(row.method)} needs teachers; name at least one.")
    if show is not None and show not in row.teachers:
        raise UserError(f"{where}: show is {show!r}; it must be one of its teachers, {', '.join(row.teachers)}.")
    return row


def _typed(settings: Settings, where: str) -> Settings:
    """The values as engine.config takes them, which checks them: 6e-5 is text in YAML."""
    words = []
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True and cli.TYPES[name] is bool:
            words.append(flag)
        elif value is not False or cli.TYPES[name] is not bool:
            words.append(f"{flag}={value}")
    try:
        parsed = cli.parse(words).to_flat()
    except UserError as e:
        raise UserError(f"{where}: {e}") from e
    return {name: parsed[name] for name in settings}


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
        raise UserError(
            f"{source}: seeds is {given!r}; give how many (at least 1), or a list of different whole numbers."
        )
    if len(set(found)) < len(found):
        raise UserError(f"{source}: seeds is {given!r}; each seed can stand there once.")
    return found


def _each(given: Any, where: str) -> tuple[str, Settings] | None:
    if given is None:
        return None
    if (
        not isinstance(given, dict)
        or len(given) != 1
        or not isinstance(values := next(iter(given.values())), list)
        or not values
    ):
        raise UserError(
            f"{where}: each is {given!r:.80}; write one setting and its values, as in {{target_domain: [a, b]}}."
        )
    (name,) = given
    if name not in cli.TYPES or name in OURS:
        raise UserError(
            f"{where}: each has {name!r}, which is not a setting of engine.train; {alike(str(name), cli.TYPES)}."
        )
    return name, {str(value): _typed({name: value}, where)[name] for value in values}


def _published(given: Any, where: str) -> float | dict[str, float] | None:
    values = list(given.values()) if isinstance(given, dict) else [given]
    if given is not None and not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        raise UserError(f"{where}: published is {given!r}; it must be a number, or a mapping of values to numbers.")
    return given


def _place(name: str, entry: Any, source: str) -> tuple[str, str | None]:
    if isinstance(entry, str):
        return entry, None
    if not isinstance(entry, dict) or not isinstance(entry.get("place"), str) or entry.keys() - {"place", "layers"}:
        raise UserError(
            f'{source}: models has {name}: {entry!r:.60}; write a place, or {{place: DIR, layers: "1,3,5"}}.'
        )
    return entry["place"], None if entry.get("layers") is None else str(entry["layers"])
