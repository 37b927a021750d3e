"""What the tests of engine.data share: small files, and splits made of them without any network."""

from pathlib import Path

import datasets
import pytest
import torch
from torch.utils import _pytree as pytree

from engine.config import DataConfig
from engine.data.splits import content_hash, load_splits
from engine.errors import UserError
from engine.hub import Hub


def load(data, samples=1, source="embedded", **config):
    """Splits without any network: `embedded` leaves local paths alone."""
    return load_splits(DataConfig(data=str(data), **config), samples, Hub(source), lambda message: None)


def refused(data, samples=1, source="embedded", **config) -> str:
    with pytest.raises(UserError) as caught:
        load(data, samples, source, **config)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    return message


def write(path: Path, rows, header="sentence\tlabel") -> Path:
    path.write_text("".join(f"{line}\n" for line in [header, *rows]), encoding="utf-8")
    return path


def numbered(count, word="row", classes=2):
    return [f"{word} {i}\t{i % classes}" for i in range(count)]


def parts(splits):
    named = {"quiz": splits.quiz, "validation": splits.validation, "test": splits.test}
    return named | {f"train {i}": sample for i, sample in enumerate(splits.train)}


def texts(dataset):
    pairs = dataset["pair"][:] if "pair" in dataset.column_names else [""] * len(dataset)
    return [(" ".join(a.split()), " ".join(b.split())) for a, b in zip(dataset["text"], pairs, strict=True)]


def hashes(splits):
    return {name: content_hash(part) for name, part in parts(splits).items()}


def equal(a, b) -> bool:
    """Whether two batches hold the same, bit for bit."""
    (leaves, spec), (others, other) = pytree.tree_flatten(a), pytree.tree_flatten(b)
    return spec == other and all(torch.equal(s, t) for s, t in zip(leaves, others, strict=True))


def hub_data(columns, names, parts) -> datasets.DatasetDict:
    """As GLUE is on the hub: texts "WORD COLUMN i", labels by turns. `parts` are {split: (word, rows, the label of all or None)}."""
    label = datasets.ClassLabel(names=list(names)) if names else datasets.Value("float32")
    features = {column: datasets.Value("string") for column in columns}
    features = datasets.Features({**features, "label": label, "idx": datasets.Value("int32")})

    def make(word, count, fixed):
        labels = [(i % len(names) if names else i % 21 / 4) if fixed is None else fixed for i in range(count)]
        rows = {column: [f"{word} {column} {i}" for i in range(count)] for column in columns}
        return datasets.Dataset.from_dict(rows | {"label": labels, "idx": list(range(count))}, features=features)

    return datasets.DatasetDict({split: make(*part) for split, part in parts.items()})
