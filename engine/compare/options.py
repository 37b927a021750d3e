"""The command line of a comparison: its own flags, and those of engine.train for every cell."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from engine import cli
from engine.compare.grid import Grid, Row, alike, find_row
from engine.compare.grid_file import OURS, build, of_methods, parse_seeds, read
from engine.errors import UserError

# flags of engine.train that belong to the comparison instead
TAKEN = {"method": "--methods", "resume": "the same command once more", "seed": "--seeds"}


@dataclass(frozen=True)
class Options:
    grid: Grid
    output: str | None
    cache_dir: str | None
    command: str  # as it was given, without the places of one machine


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see python -m engine.compare --help.")


def parser() -> argparse.ArgumentParser:
    result = _Parser(
        prog="python -m engine.compare", allow_abbrev=False,
        usage="%(prog)s [--methods A,B --teachers A,B --student S | --config GRID.yaml] [--seeds N] [--scale small] "
        "[--output DIR] [any flag of engine.train]",
        description="Run methods, or the rows of a grid, with several seeds each, and compare them in a table, paired "
        "differences and a plot. Finished runs are kept: the same command continues where it was stopped.",
        epilog="Any other flag is one of engine.train (python -m engine.train --help) and holds for every run.",
    )  # fmt: skip
    result.add_argument("--config", metavar="GRID.yaml", help="rows and settings; recipes/ has examples")
    result.add_argument("--methods", help="one row for each of these methods of engine.train, comma-separated (default: "
                        "finetune,kd,metadistil)")  # fmt: skip
    result.add_argument("--teachers", help="the teachers of every method (default: bert)")
    result.add_argument("--student", help="the student of every method (default: distilbert)")
    result.add_argument("--seeds", help="how many seeds, or which ones as in 0,1,7 (default: the grid's, else 1)")
    result.add_argument("--scale", choices=["full", "small"], default="full", help="small: a quick version, by the grid's `small` settings "
                        "or else 2 seeds, 2,000 training examples and one epoch")  # fmt: skip
    result.add_argument("--model", action="append", default=[], metavar="NAME=PLACE[:LAYERS]", help="what a model's name in the "
                        "grid stands for: a hub id or a directory; a student may keep some layers only, as in "
                        "distilbert=dir:1,3,5; repeatable")  # fmt: skip
    result.add_argument("--data", action="append", default=[], metavar="[NAME=]PLACE", help="the data of every run, or what a "
                        "data set's name in the grid stands for; repeatable")  # fmt: skip
    result.add_argument("--rows", help="only these rows, by name, comma-separated")
    result.add_argument("--values", help="of rows that are run for each of several values, only these, comma-separated")
    result.add_argument(
        "--against", help="the row that the others are compared with (default: kd with the same student)"
    )
    result.add_argument("--output", help="directory of runs and results (default: runs/<time>-compare)")
    return result


def parse(words: Sequence[str]) -> Options:
    """The checked grid of a command line; raises UserError with one sentence for anything that does not fit."""
    given, rest = parser().parse_known_args(list(words))
    flags = _flags(rest)
    if given.config is not None:
        for name in ("methods", "teachers", "student"):
            if getattr(given, name) is not None:
                instead = "--rows" if name == "methods" else "--model"
                raise UserError(
                    f"--{name} does not go with --config, whose rows have theirs; use {instead} to change them."
                )
        raw, source = read(given.config), given.config
    else:
        raw = of_methods(given.methods if given.methods is not None else "finetune,kd,metadistil",
                         given.teachers or "bert", given.student or "distilbert")  # fmt: skip
        source = "--methods"
        if not raw["rows"]:
            raise UserError("--methods is empty; name at least one, as in finetune,kd.")
    cache_dir = flags.pop("cache_dir", None)
    places = dict(_model(word) for word in given.model)
    data, everywhere = _data(given.data, raw)
    if everywhere is not None:
        flags["data"] = everywhere
    seeds = None if given.seeds is None else parse_seeds(given.seeds)
    if seeds == 0 or (isinstance(seeds, int) and seeds < 0):
        raise UserError(f"--seeds is {given.seeds}; it must be at least 1.")
    changes: dict[str, Any] = {"places": places, "data": data}
    if given.against is not None:
        changes["against"] = given.against
    grid = build(raw, source, given.scale, flags, seeds=seeds, **changes)
    _refuse_unused(places, grid)
    grid = _without_references(replace(grid, rows=_chosen(grid, given.rows, given.values)), given.against)
    return Options(grid, given.output, cache_dir, _command(words, given))


def _flags(words: list[str]) -> dict[str, Any]:
    """Settings of engine.train from its flags, checked by its own parser."""
    names = [word[2:].split("=")[0].replace("-", "_") for word in words if word.startswith("--")]
    for name in names:
        if name in TAKEN:
            raise UserError(f"--{name} is not for a comparison; use {TAKEN[name]}.")
    values = cli.parse(words, "engine.compare").to_flat()
    return {name: values[name] for name in names if name not in OURS and values[name] is not None}


def _model(word: str) -> tuple[str, tuple[str, str | None]]:
    name, equals, place = word.partition("=")
    found = re.fullmatch(r"(.+?)(?::([\d,]+))?", place)
    if not name or not equals or not found:
        raise UserError(f"--model is {word!r}; write NAME=PLACE, or NAME=PLACE:1,3,5 for a student of these layers.")
    return name, (found[1], found[2])


def _data(words: list[str], raw: dict[str, Any]) -> tuple[dict[str, str], str | None]:
    """What names of data sets stand for, and the data of every run. A name is what the grid calls one."""
    known = {"sst2"}
    for entry in [raw.get("settings"), *(raw["rows"] if isinstance(raw.get("rows"), list) else [])]:
        if isinstance(entry, dict):
            each = entry.get("each")
            values = each.get("data") if isinstance(each, dict) else None
            known |= {str(entry["data"])} if "data" in entry else set()
            known |= set(map(str, values)) if isinstance(values, list) else set()
    places, everywhere = {}, None
    for word in words:
        name, equals, place = word.partition("=")
        if equals and name in known:
            places[name] = place
        elif equals and not Path(word).expanduser().exists():
            raise UserError(f"--data {word} names no data set of the grid; {alike(name, sorted(known))}.")
        else:
            everywhere = word
    return places, everywhere


def _refuse_unused(places: dict[str, Any], grid: Grid) -> None:
    names = {name for row in grid.rows for name in [*row.teachers, row.student]}
    for name in places:
        if name not in names:
            raise UserError(f"--model {name} is no model of the grid; {alike(name, sorted(names))}.")


def _chosen(grid: Grid, rows: str | None, values: str | None) -> list[Row]:
    """The rows of --rows, in the grid's order, with the values of --values."""
    kept = list(grid.rows)
    if rows is not None:
        names = {row.name for row in kept}
        wanted = [part.strip() for part in rows.split(",")]
        for name in wanted:
            if name not in names:
                find_row(kept, name, "--rows")  # raises
        kept = [row for row in kept if row.name in wanted]
    if values is not None:
        wanted = [part.strip() for part in values.split(",")]
        known: Iterable[str] = dict.fromkeys(v for row in kept if row.each for v in row.each[1])
        if not known:
            raise UserError(
                "--values is for rows that are run for each of several values, and the grid has none; leave it out."
            )
        for value in wanted:
            if value not in known:
                raise UserError(f"--values has {value!r}; {alike(value, known)}.")
        kept = [_less(row, wanted) for row in kept]
        kept = [row for row in kept if row.each is None or row.each[1]]
    return kept


def _without_references(grid: Grid, asked: str | None) -> Grid:
    """The grid without those `against` of its file whose row is left out; on the command line such a row is refused."""
    if asked is not None:
        find_row(grid.rows, asked, "--against")
    known = {name for row in grid.rows for name in (row.name, row.title)}
    rows = [row if row.against in known else replace(row, against=None) for row in grid.rows]
    return replace(grid, rows=rows, against=grid.against if grid.against in known else None)


def _less(row: Row, wanted: list[str]) -> Row:
    """The row for some of its values; what was published of all of them on average does not compare any more."""
    if row.each is None or set(row.each[1]) <= set(wanted):
        return row
    published = {k: v for k, v in row.published.items() if k in wanted} if isinstance(row.published, dict) else None
    return replace(
        row, each=(row.each[0], {k: v for k, v in row.each[1].items() if k in wanted}), published=published or None
    )


def _command(words: Sequence[str], given: argparse.Namespace) -> str:
    """The command without --output and --cache-dir; of a directory only the last part, which says enough."""
    shown, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word in ("--output", "--cache-dir"):
            skip = True
        elif not word.startswith(("--output=", "--cache-dir=")):
            name, equals, place = word.rpartition("=")
            is_path = place.startswith(("/", "~", "..")) and word != given.config
            shown.append(f"{name}{equals}{Path(place).name}" if is_path else word)
    return shlex.join(["python", "-m", "engine.compare", *shown])
