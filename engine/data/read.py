"""Files into tables of values that know which line of which file they came from."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import UserError

MISSING = object()
"""Stands where a JSON object lacks a key."""


@dataclass
class Table:
    """Columns of values. `local` files can be repaired by the user; of hub data, broken rows are left out."""

    name: str
    columns: list[str]
    column: Callable[[str], list[Any]]
    lines: Sequence[int]
    """The number of each row in `unit`s; a file's header is line 1."""
    unit: str = "line"
    class_names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Names of the ids, for columns whose schema has them."""
    local: bool = True

    def __len__(self) -> int:
        return len(self.lines)

    def place(self, row: int) -> str:
        return f"{self.name}, {self.unit} {self.lines[row]}"


def read_file(path: Path) -> Table:
    """Read one .tsv, .csv, .jsonl, .json or .parquet file; a broken row is a UserError with its line."""
    try:
        table = READERS[path.suffix.lower()](path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    if not len(table):
        raise UserError(f"{path} has no rows of data.")
    return table


def _text(path: Path) -> str:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")  # the -sig drops the byte order mark that spreadsheets write
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: the file must be UTF-8, and this line is not; convert it.") from error
    if not text.strip():
        raise UserError(f"{path} is empty.")
    return text


def _read_tsv(path: Path) -> Table:
    # Split at line feeds only: str.splitlines and csv also split at characters that may stand inside a text.
    text = _text(path).replace("\r\n", "\n")
    lines = (text if "\n" in text else text.replace("\r", "\n")).split("\n")
    while not lines[-1].strip():
        lines.pop()
    return _from_rows(path, [line.split("\t") for line in lines], range(1, len(lines) + 1), "TAB")


def _read_csv(path: Path) -> Table:
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    rows, starts, start = [], [], 1
    limit = csv.field_size_limit(2**31 - 1)  # the default refuses texts of more than 128 KiB; the limit is global
    try:
        for row in reader:
            rows.append(row)
            starts.append(start)
            start = reader.line_num + 1  # a quoted text may span lines: a row is named by its first
    except csv.Error as error:
        raise UserError(f"{path}, line {start}: this row is not valid CSV ({error}).") from error
    finally:
        csv.field_size_limit(limit)
    while len(rows[-1]) <= 1 and not "".join(rows[-1]).strip():
        rows.pop()
    return _from_rows(path, rows, starts, "comma")


def _from_rows(path: Path, rows: list[list[str]], starts: Sequence[int], separator: str) -> Table:
    header = [name.strip() for name in rows[0]]
    doubled = sorted({name for name in header if header.count(name) > 1})
    if doubled:
        raise UserError(f"{path}, line 1: the header has more than one column named {doubled[0]!r}; rename one.")
    width, body, lines = len(header), rows[1:], starts[1 : len(rows)]
    for row, line in zip(body, lines, strict=True):
        if len(row) != width:
            found = "is empty" if not any(row) else f"has {len(row)} column{'s' * (len(row) != 1)}"
            raise UserError(f"{path}, line {line} {found}; the header has {width}, separated by {separator}s.")

    def column(name: str) -> list[str]:
        index = header.index(name)
        return [row[index] for row in body]

    return Table(str(path), header, column, lines)


def _read_json(path: Path) -> Table:
    text = _text(path)
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        return _read_json_list(path, text)
    lines = text.split("\n")
    while not lines[-1].strip():
        lines.pop()
    objects = [_json_object(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]
    return _from_objects(path, objects, "line")


def _json_object(line: str, place: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not valid JSON ({error}); each line must be one JSON object.") from error
    if not isinstance(value, dict):
        raise UserError(f"{place}: a JSON {type(value).__name__}; each line must be one JSON object.")
    return value


def _read_json_list(path: Path, text: str) -> Table:
    try:
        objects = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}).") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}).") from error
    for number, value in enumerate(objects, 1):
        if not isinstance(value, dict):
            raise UserError(f"{path}, item {number}: a JSON {type(value).__name__}; each item must be an object.")
    return _from_objects(path, objects, "item")


def _from_objects(path: Path, objects: list[dict[str, Any]], unit: str) -> Table:
    columns = list(dict.fromkeys(key for value in objects for key in value))
    return Table(
        str(path),
        columns,
        lambda name: [value.get(name, MISSING) for value in objects],
        range(1, len(objects) + 1),
        unit,
    )


def _read_parquet(path: Path) -> Table:
    import pyarrow
    import pyarrow.parquet
    from datasets import Features

    try:
        table = pyarrow.parquet.read_table(path)
        features = Features.from_arrow_schema(table.schema)  # keeps the class names that `datasets` wrote
    except (pyarrow.ArrowException, ValueError) as error:
        raise UserError(f"{path} is not a readable parquet file ({str(error).splitlines()[0]}).") from error

    def column(name: str) -> list[Any]:
        try:
            return table.column(name).to_pylist()
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: column {name!r} holds text that is not UTF-8 ({error}).") from error

    rows = range(1, table.num_rows + 1)
    return Table(str(path), table.column_names, column, rows, "row", class_names_of(features))


def class_names_of(features: Any) -> dict[str, tuple[str, ...]]:
    """The class names that a `datasets.Features` carries, by column."""
    named = ((name, getattr(feature, "names", None)) for name, feature in features.items())
    return {name: tuple(names) for name, names in named if names}


READERS: dict[str, Callable[[Path], Table]] = {
    ".tsv": _read_tsv,
    ".csv": _read_csv,
    ".jsonl": _read_json,
    ".jsonlines": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
