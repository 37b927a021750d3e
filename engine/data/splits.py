"""From a DataConfig to checked, disjoint splits."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields

import numpy as np
from datasets import Dataset, Features, Value

from engine.config import DataConfig
from engine.data.columns import Columns, Rows, find_columns, read_rows
from engine.data.cut import HELD_OUT, Pool, fit
from engine.data.domains import Domains, describe
from engine.data.glue import CLASSES, choose_metric, task_of
from engine.data.labels import Labels, Task, is_regression
from engine.data.read import Table
from engine.data.sources import Found, find
from engine.errors import UserError
from engine.hub import Hub

__all__ = ["Splits", "Task", "content_hash", "load_splits"]


@dataclass
class Splits:
    """Columns of each data set: text, pair (for pairs only), label (class id, or number), domain (id, with a column)."""

    task: Task
    train: list[Dataset]
    """One disjoint sample per teacher that needs its own."""
    quiz: Dataset
    validation: Dataset
    test: Dataset
    source: str
    """local, hub or embedded"""
    notes: list[str] = field(default_factory=list)
    """Every message that the user was given."""


def load_splits(config: DataConfig, samples: int, hub: Hub, say: Callable[[str], None]) -> Splits:
    """Read, check and cut the data. The same config gives the same splits, whatever `samples` is."""
    notes: list[str] = []

    def tell(message: str) -> None:
        notes.append(message)
        say(message)

    assert samples >= 1, samples
    found = find(config.data, samples, hub, tell)
    columns = find_columns(found.tables["train"], config)
    parts, labels, domains = _checked_rows(found, columns, config, tell)
    kind = "regression" if labels.regression else "classification"
    metric = choose_metric(config.metric, kind, task_of(config.data))
    task = Task(kind, labels.names, columns.pair is not None, domains, metric)
    _separate(parts, found.tables, tell)
    train, held_out = _cut(parts, task, config, samples, found, tell)
    _report(found, columns, task, config, train, held_out, parts, tell)
    shuffled = {part: _dataset(rows, task, (config.split_seed, i)) for i, (part, rows) in enumerate(held_out.items())}
    trains = [_dataset(rows, task, (config.split_seed, 3 + i)) for i, rows in enumerate(train)]
    return Splits(task, trains, **shuffled, source=found.source, notes=notes)


def content_hash(dataset: Dataset) -> str:
    """sha256 of the columns' names and values, in order of rows: the identity that in-memory data sets lack."""
    digest = hashlib.sha256()
    for name in sorted(dataset.column_names):
        digest.update(json.dumps([name, dataset[name][:]]).encode())
    return digest.hexdigest()


def _checked_rows(
    found: Found, columns: Columns, config: DataConfig, tell
) -> tuple[dict[str, Rows], Labels, tuple[str, ...]]:
    """Rows of every split with converted labels and domains; the training rows decide what these are."""
    parts, labels, domains = {}, None, None
    for part in ("train", *(part for part in HELD_OUT if part in found.tables)):
        table = found.tables[part]
        if part == "test" and _unlabelled(table, columns):
            tell(f"{table.name} has no labels: it is not used, and the test set is cut from train.")
            continue
        rows, left_out = read_rows(table, columns)
        if not table.local and not _regression(rows, table, columns, config, labels):
            kept = [i for i, key in enumerate(rows.labels) if key != -1]
            rows, left_out = rows.take(kept), left_out + len(rows) - len(kept)
        if columns.domain is not None:
            domains = domains or Domains(rows.domains, table, columns.domain)
            rows, strange = domains.convert(rows, table)
            left_out += strange
        if left_out:
            what = "a text or a label" if columns.domain is None else "a text, a label or a domain of train"
            tell(f"{table.name}: {_rows(left_out)} without {what} left out.")
        if not len(rows):
            raise UserError(f"{table.name} has no row with a text and a label.")
        if labels is None:
            known = CLASSES.get(task_of(config.data), ())
            labels = Labels(rows.labels, table, columns.label, config.task, rows.numbers, known)
        rows.labels = labels.convert(rows.labels, table, rows.numbers)
        missing = _absent(rows, labels.names)
        if missing:
            tell(f"{table.name} has no example of {missing}.")
        lacking = "" if domains is None else _domains_missing(rows, domains.names)
        if lacking:
            tell(f"{table.name} has no example of {lacking}.")
        parts[part] = rows
    return parts, labels, domains.names if domains is not None else ()


def _unlabelled(table: Table, columns: Columns) -> bool:
    """Benchmarks on the hub publish their test sets without labels."""
    if table.local:
        return False
    return columns.label not in table.columns or set(table.column(columns.label)) <= {-1, None}


def _regression(rows: Rows, table: Table, columns: Columns, config: DataConfig, labels: Labels | None) -> bool:
    names = table.class_names.get(columns.label, ())
    return is_regression(rows.labels, names, config.task) if labels is None else labels.regression


def _absent(rows: Rows, names: tuple[str, ...]) -> str:
    return _missing("class", rows.labels, names)


def _domains_missing(rows: Rows, names: tuple[str, ...]) -> str:
    return "" if rows.domains is None else _missing("domain", rows.domains, names)


def _missing(what: str, ids: list[int], names: tuple[str, ...]) -> str:
    present = set(ids)
    absent = [repr(name) for i, name in enumerate(names) if i not in present]
    if not absent:
        return ""
    more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
    several = {"class": "classes"}.get(what, f"{what}s")
    return f"the {what if len(absent) == 1 else several} " + ", ".join(absent[:5]) + more


def _separate(parts: dict[str, Rows], tables: dict[str, Table], tell) -> None:
    """Leave each text in one split, and once in train. Repeats inside a held-out file stay, as it is used whole."""
    kept, first, conflicts = [], {}, 0
    train = parts["train"]
    for i, identity in enumerate(train.identities()):
        if first.setdefault(identity, i) == i:
            kept.append(i)
        else:
            conflicts += train.labels[i] != train.labels[first[identity]]
    if len(kept) < len(train):
        tell(
            f"{tables['train'].name}: {_rows(len(train) - len(kept))} left out, with the text of an earlier one; "
            f"{conflicts:,} of them with another label."
        )
        parts["train"] = train.take(kept)

    higher: dict[tuple[str, str], str] = {}
    for part in (*HELD_OUT, "train"):
        if part not in parts:
            continue
        rows, identities = parts[part], parts[part].identities()
        leaks = Counter(higher[identity] for identity in identities if identity in higher)
        if leaks:
            where = ", ".join(f"{count:,} in {other}" for other, count in leaks.items())
            tell(
                f"{tables[part].name}: {_rows(leaks.total())} left out whose text also stands in a split to test on: "
                f"{where}."
            )
            parts[part] = rows.take([i for i, identity in enumerate(identities) if identity not in higher])
            if not len(parts[part]):
                raise UserError(
                    f"{tables[part].name}: every text also stands in another split ({where}); give other rows."
                )
        higher.update((identity, part) for identity in identities if identity not in higher)


def _cut(
    parts: dict[str, Rows], task: Task, config: DataConfig, samples: int, found: Found, tell
) -> tuple[list[Rows], dict[str, Rows]]:
    """The training samples and the held-out splits; those without a file are cut from the training rows."""
    train, table = parts["train"], found.tables["train"]
    missing = [part for part in HELD_OUT if part not in parts]
    wanted = {part: getattr(config, f"{part}_size") for part in missing}
    for part, size in wanted.items():
        _refuse_oversized(part, size, len(train), table)
    if found.block is not None and not missing:
        return _blocks(train, task, config, samples, found.block), {part: parts[part] for part in HELD_OUT}

    ids = np.zeros(len(train), int) if task.kind == "regression" else np.array(train.labels)
    pool = Pool(ids, task.num_labels, config.split_seed, None if train.domains is None else np.array(train.domains))
    present = int((pool.counts.sum(0) > 0).sum())
    sizes, sample_size = fit(len(train), int((pool.counts > 0).sum()), wanted, config.train_size, samples)
    # a class with a single row is of more use in training than in a test
    cuts = {part: train.take(pool.cut(size, leave=1)) for part, size in sizes.items()}
    train_rows = [train.take(pool.cut(sample_size)) for _ in range(samples)]
    if task.kind == "classification" and present < 2:
        raise UserError(f"{table.name}: only one class is left after removing texts that stand in other splits.")
    _refuse_tiny(cuts, train_rows, present, len(train), table)
    if (sizes, sample_size) != (wanted, config.train_size):
        asked = [f"{part} {sizes[part]:,} (of {wanted[part]:,})" for part in sizes if sizes[part] != wanted[part]]
        if sample_size != config.train_size:
            asked.append(f"train {samples} x {sample_size:,} (of {config.train_size:,})")
        tell(
            f"{table.name} has {len(train):,} usable rows, fewer than asked for; sizes were reduced: "
            f"{', '.join(asked)}."
        )
    for name, rows in [*cuts.items(), *((f"training sample {i}", rows) for i, rows in enumerate(train_rows))]:
        absent = _absent(rows, task.label_names)
        if absent and absent != _absent(train, task.label_names):
            tell(f"{name}, cut from {table.name}, has no example of {absent}: there are too few.")
        lacking = _domains_missing(rows, task.domains)
        if lacking and lacking != _domains_missing(train, task.domains):
            tell(f"{name}, cut from {table.name}, has no example of {lacking}: there are too few.")
    return train_rows, {part: cuts[part] if part in cuts else parts[part] for part in HELD_OUT}


def _blocks(train: Rows, task: Task, config: DataConfig, samples: int, block: int) -> list[Rows]:
    """The embedded corpus grows with the number of samples; cutting within its blocks keeps each sample as it is."""
    ids = np.array(train.labels)
    return [
        train.take(start + Pool(ids[start : start + block], task.num_labels, config.split_seed).cut(config.train_size))
        for start in range(0, samples * block, block)
    ]


def _refuse_oversized(part: str, size: int, rows: int, table: Table) -> None:
    """A size that was asked for must be possible; a default adapts."""
    default = next(f.default for f in fields(DataConfig) if f.name == f"{part}_size")
    if size >= rows and size != default:
        raise UserError(
            f"--{part}-size is {size:,}, but {table.name}, from which the {part} set is cut, has {rows:,} usable rows; "
            f"give a smaller size or a {part} file."
        )


def _refuse_tiny(cuts: dict[str, Rows], train: list[Rows], classes: int, rows: int, table: Table) -> None:
    smallest = min(len(sample) for sample in train)
    empty = [part for part, part_rows in cuts.items() if not len(part_rows)]
    if empty or classes * 2 > smallest:
        what = f"the {empty[0]} set would be empty" if empty else f"a training sample would have {_rows(smallest)}"
        least = "2 rows per class" if classes > 1 else "2 rows"
        raise UserError(
            f"{table.name} has {_rows(rows)} of use, too few for {len(train)} training sample{'s' * (len(train) != 1)} "
            f"and held-out sets: {what}, and {least} are the least to train on; add rows, give quiz, validation and "
            "test files, or use fewer teachers that need their own sample."
        )


def _report(found: Found, columns: Columns, task: Task, config: DataConfig, train, held_out, parts, tell) -> None:
    """One line that says what the run will use."""
    texts = columns.text + (f" + {columns.pair}" if columns.pair else "")
    kind = "regression" if task.kind == "regression" else f"{task.num_labels} classes"
    if task.domains:
        kind += f", domain {columns.domain} ({describe(task.domains, train[0].domains)})"
    sizes = [f"train {len(train)} x {len(train[0]):,}"]
    sizes += [f"{p} {len(held_out[p]):,} ({'given' if p in parts else 'cut from train'})" for p in reversed(HELD_OUT)]
    glue, metric = task_of(config.data), ""
    if glue is not None or config.metric != "auto":
        of = f" of {task.label_names[1]!r}" if task.metric == "f1" and task.num_labels == 2 else ""
        metric = f"; metric {task.metric}{of}" + (f" (GLUE's for {glue})" if config.metric == "auto" else "")
    tell(f"Data ({found.source}): text {texts}, label {columns.label}, {kind}; {', '.join(sizes)}{metric}.")


def _rows(count: int) -> str:
    return f"{count:,} row{'s' * (count != 1)}"


def _dataset(rows: Rows, task: Task, seed: tuple[int, int]) -> Dataset:
    rows = rows.take(np.random.default_rng(seed).permutation(len(rows)))
    columns = {"text": rows.texts, "pair": rows.pairs, "label": rows.labels, "domain": rows.domains}
    types = {"text": "string", "pair": "string", "label": "float64" if task.kind == "regression" else "int64"}
    types["domain"] = "int64"
    columns = {name: values for name, values in columns.items() if values is not None}
    return Dataset.from_dict(columns, features=Features({name: Value(types[name]) for name in columns}))
