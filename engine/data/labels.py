"""From the values of a label column to class ids or numbers, and the task they make."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

from engine.data.read import Table
from engine.errors import UserError

MAX_CLASSES = 1000

Key = int | float | str
"""A label as it is compared: `1`, `"1"`, `" 1"` and `1.0` are one class."""

_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_NUMBER = re.compile(r"[+-]?([0-9]{1,18}(\.[0-9]{0,30})?|\.[0-9]{1,30})([eE][+-]?[0-9]{1,2})?")


@dataclass(frozen=True)
class Task:
    """What is predicted: one of `label_names`, or one number."""

    kind: Literal["classification", "regression"]
    label_names: tuple[str, ...]
    pair: bool
    domains: tuple[str, ...] = ()
    """Sorted names; an example's domain is its place among them."""
    metric: str | None = None
    """What a model is chosen by; without it accuracy, or Pearson's correlation."""

    @property
    def num_labels(self) -> int:
        return len(self.label_names) or 1


def label_key(value: Any) -> Key:
    """Raises ValueError with the reason for what cannot be a label."""
    if isinstance(value, str):
        text = value.strip()
        if not text or text.lower() == "nan":
            raise ValueError("the label is empty")
        if _INTEGER.fullmatch(text):
            return int(text)
        return _whole(float(text)) if _NUMBER.fullmatch(text) else text
    if value is None:
        raise ValueError("the label is empty")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return value
    if isinstance(value, float | Decimal):
        if math.isnan(value):
            raise ValueError("the label is empty")
        if math.isinf(value):
            raise ValueError("the label is infinite")
        return _whole(float(value))
    raise ValueError(f"a {type(value).__name__} cannot be a label; it must be a word or a number")


def _whole(number: float) -> int | float:
    return int(number) if number.is_integer() else number


def is_regression(keys: Iterable[Key], names: tuple[str, ...], task: str) -> bool:
    """`task` is --task; auto takes regression when a label has a fraction and the schema names no classes."""
    return task == "regression" or (task == "auto" and not names and any(isinstance(key, float) for key in keys))


class Labels:
    """Learns the labels of the training data; gives their ids, or their numbers, for every split."""

    def __init__(
        self, keys: list[Key], table: Table, column: str, task: str, numbers: list[int], known: tuple[str, ...] = ()
    ):
        """Words that are just the `known` ones have their order, others that of the alphabet."""
        self.column = column
        names = table.class_names.get(column, ())
        counts = Counter(keys)
        self.regression = is_regression(counts, names, task)
        self.train = table.name
        self.ids: dict[Key, int] = {}
        self.names: tuple[str, ...] = ()
        if self.regression:
            return
        _refuse_unlabelled(keys, table, numbers)
        if names:
            self.ids, self.names = {i: i for i in range(len(names))}, names
        else:
            # numbers by size, words by the alphabet; a mixture counts as words
            words = any(isinstance(key, str) for key in counts)
            ordered = known if counts.keys() == set(known) else sorted(counts, key=str if words else None)
            self.ids, self.names = {key: i for i, key in enumerate(ordered)}, tuple(map(str, ordered))
        self._check(counts, table)

    def _check(self, counts: Mapping[Key, int], table: Table) -> None:
        if len(counts) == 1:
            raise UserError(
                f"{table.name}: every row has the label {next(iter(counts))!s}; a classifier needs two classes "
                f"at least (the label column is {self.column!r}; name another with --label-column)."
            )
        if len(self.names) > MAX_CLASSES:
            raise UserError(
                f"{table.name}: the column {self.column!r} holds {len(self.names):,} different labels, more than the "
                f"{MAX_CLASSES:,} allowed; name the right column with --label-column, or use --task regression."
            )

    def convert(self, keys: list[Key], table: Table, numbers: list[int]) -> list[int] | list[float]:
        """`numbers` are the rows of `table` that the keys come from."""
        if self.regression:
            for key, number in zip(keys, numbers, strict=True):
                if isinstance(key, str):
                    raise UserError(
                        f"{table.place(number)}: the label {_shown(key)} is not a number, and this is a regression; "
                        "repair it, or use --task classification."
                    )
            return [float(key) for key in keys]
        ids = [self.ids.get(key, -1) for key in keys]
        if -1 in ids:
            _refuse_unlabelled(keys, table, numbers)
            row = ids.index(-1)
            known = ", ".join(self.names[:10]) + (", ..." if len(self.names) > 10 else "")
            raise UserError(
                f"{table.place(numbers[row])}: the training data ({self.train}) has no label {_shown(keys[row])}; "
                f"its labels are {known}."
            )
        return ids


def _refuse_unlabelled(keys: list[Key], table: Table, numbers: list[int]) -> None:
    if -1 in keys:
        raise UserError(
            f"{table.place(numbers[keys.index(-1)])}: the label -1 marks a row without a label; remove such rows, or "
            "give the class another name."
        )


def _shown(key: Key) -> str:
    return repr(key if len(str(key)) <= 40 else str(key)[:37] + "...")
