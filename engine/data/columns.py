"""Which column is the text, the second text and the label; and checked rows made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.config import DataConfig
from engine.data.labels import Key, label_key
from engine.data.read import MISSING, Table
from engine.errors import UserError

# Tried in this order. `question` with `sentence` (QNLI) stands before `sentence` alone.
PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("text", "text_pair"),
    ("sentence_a", "sentence_b"),
    ("#1 string", "#2 string"),
)
TEXTS = (
    "sentence", "text", "sentence1", "premise", "question", "question1", "review", "content", "review_body",
    "review_text", "text1", "text_a", "comment", "tweet", "document", "body", "utterance", "query", "headline",
    "description", "title", "sentence_a",
)  # fmt: skip
LABELS = (
    "label", "labels", "class", "target", "score", "category", "sentiment", "gold_label", "polarity", "rating", "stars",
    "similarity", "is_duplicate", "intent", "topic", "quality",
)  # fmt: skip


@dataclass(frozen=True)
class Columns:
    """Column names as the training data spells them."""

    text: str
    pair: str | None
    label: str
    domain: str | None = None


@dataclass
class Rows:
    """Examples. `labels` are keys of `engine.data.labels` at first, then class ids or numbers; `domains` are names at
    first, then their ids.
    """

    texts: list[str]
    pairs: list[str] | None
    labels: list
    numbers: list[int]
    """Row numbers in the table they came from, for messages."""
    domains: list | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int]) -> Rows:
        pairs, domains = (None if c is None else [c[i] for i in indices] for c in (self.pairs, self.domains))
        picked = ([column[i] for i in indices] for column in (self.texts, self.labels, self.numbers))
        texts, labels, numbers = picked
        return Rows(texts, pairs, labels, numbers, domains)

    def identities(self) -> list[tuple[str, str]]:
        """What is compared to find the same example twice: the texts with white space collapsed."""
        pairs = self.pairs if self.pairs is not None else [""] * len(self)
        return [(" ".join(text.split()), " ".join(pair.split())) for text, pair in zip(self.texts, pairs, strict=True)]


def find_columns(table: Table, config: DataConfig) -> Columns:
    """The columns of the training data, by the config's names or by the usual ones."""
    text, pair, label, domain = (
        given if given is None else _named(table, given, flag)
        for given, flag in (
            (config.text_column, "--text-column"),
            (config.pair_column, "--pair-column"),
            (config.label_column, "--label-column"),
            (config.domain_column, "--domain-column"),
        )
    )
    if domain is not None and domain in (text, pair, label):
        raise _taken(domain, "text" if domain == text else "pair" if domain == pair else "label")
    free = {name.lower(): name for name in reversed(table.columns) if name not in (text, pair, label, domain)}
    if label is None:
        label = next((free.pop(usual) for usual in LABELS if usual in free), None)
        if label is None:
            if domain is not None and domain.lower() in LABELS:
                raise _taken(domain, "label")
            raise _not_found(table, "label", "--label-column")
    if text is None and pair is None:
        text, pair = next(((free[a], free[b]) for a, b in PAIRS if a in free and b in free), (None, None))
    if text is None:
        text = next((free[usual] for usual in TEXTS if usual in free), None)
        if text is None:
            if domain is not None and domain.lower() in TEXTS:
                raise _taken(domain, "text")
            raise _not_found(table, "text", "--text-column")
    if len({text, pair, label}) < 3:
        raise UserError(
            f"Text, pair and label must be different columns; --text-column is {text}, "
            f"--pair-column is {pair or 'not given'} and --label-column is {label}."
        )
    return Columns(text, pair, label, domain)


def _taken(domain: str, what: str) -> UserError:
    return UserError(
        f"--domain-column is {domain}, which is the {what} column; name another column with --domain-column or "
        f"--{what}-column."
    )


def _named(table: Table, name: str, flag: str) -> str:
    """The table's spelling of a column name."""
    if name in table.columns:
        return name
    alike = [column for column in table.columns if column.lower() == name.lower()]
    if len(alike) == 1:
        return alike[0]
    raise UserError(f"{table.name} has no column {name!r}; it has {_listed(table)}. Name one of them with {flag}.")


def _not_found(table: Table, what: str, flag: str) -> UserError:
    return UserError(
        f"{table.name} has no {what} column with a usual name; its first line names {_listed(table)}. "
        f"Name the {what} column with {flag}."
        if table.unit == "line"
        else f"{table.name} has no {what} column with a usual name; it has {_listed(table)}. Name it with {flag}."
    )


def _listed(table: Table) -> str:
    shown = [name if len(name) <= 40 else name[:37] + "..." for name in table.columns[:20]]
    return "the columns " + ", ".join(shown) + (", ..." if len(table.columns) > 20 else "")


def read_rows(table: Table, columns: Columns) -> tuple[Rows, int]:
    """Checked rows with label keys, and how many broken rows of hub data were left out."""
    texts, text_faults = _texts(table, _named(table, columns.text, "--text-column"))
    labels, label_faults = _labels(table, _named(table, columns.label, "--label-column"))
    faults = text_faults | label_faults
    pairs = None
    if columns.pair is not None:
        pairs, pair_faults = _texts(table, _named(table, columns.pair, "--pair-column"))
        faults |= pair_faults
    domains = None
    if columns.domain is not None:
        domains, domain_faults = _domains(table, _named(table, columns.domain, "--domain-column"))
        faults |= domain_faults
    rows = Rows(texts, pairs, labels, list(range(len(table))), domains)
    if not faults:
        return rows, 0
    if table.local:
        first = min(faults)
        raise UserError(f"{table.place(first)}: {faults[first]}.")
    return rows.take([i for i in range(len(rows)) if i not in faults]), len(faults)


def _texts(table: Table, name: str) -> tuple[list[str], dict[int, str]]:
    """The values of a text column, and what is wrong in which row."""
    values, faults = table.column(name), {}
    for row, value in enumerate(values):
        if value is MISSING:
            faults[row] = f"the key {name!r} is missing"
        elif not isinstance(value, str):
            faults[row] = f"{name!r} must be a text, not {_kind(value)}"
        elif not value or value.isspace():
            faults[row] = f"the text in {name!r} is empty"
        elif not value.isascii() and not _encodable(value):
            faults[row] = f"the text in {name!r} holds half of a surrogate pair, which UTF-8 cannot hold"
    return values, faults


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _labels(table: Table, name: str) -> tuple[list[Key], dict[int, str]]:
    keys, faults, known = [], {}, {}
    for row, value in enumerate(table.column(name)):
        # texts repeat, and reading them anew costs more than looking them up; 1, 1.0 and True would collide
        if isinstance(value, str) and value in known:
            keys.append(known[value])
            continue
        try:
            if value is MISSING:
                raise ValueError(f"the key {name!r} is missing")
            key = label_key(value)
        except ValueError as error:
            faults[row], key = str(error), 0
        else:
            if isinstance(value, str):
                known[value] = key
        keys.append(key)
    return keys, faults


def _domains(table: Table, name: str) -> tuple[list[str], dict[int, str]]:
    """The names in a domain column, ids by their names where the schema has them, and what is wrong in which row."""
    names, faults, classes = [], {}, table.class_names.get(name, ())
    for row, value in enumerate(table.column(name)):
        if classes and isinstance(value, int) and 0 <= value < len(classes):
            value = classes[value]
        if value is MISSING:
            faults[row] = f"the key {name!r} is missing"
        elif isinstance(value, list | dict):
            faults[row] = f"{name!r} must be a name, not {_kind(value)}"
        elif value is None or value != value or not str(value).strip():  # nan is what it does not equal
            faults[row] = f"the domain in {name!r} is empty"
        names.append(str(value).strip())
    return names, faults


def _kind(value: object) -> str:
    return "null" if value is None else f"{type(value).__name__} {str(value)[:40]}"
