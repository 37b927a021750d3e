"""Disjoint, deterministic, stratified cuts: leaks, sizes, seeds, and the real data sets."""

from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from data_helpers import hashes, load, numbered, parts, refused, texts, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.config import DataConfig
from engine.data.cut import allocate
from engine.data.splits import content_hash, load_splits
from engine.errors import UserError
from engine.hub import Hub

REAL = Path(__file__).parents[3] / "shared" / "data"


# Duplicates and leaks


def test_duplicates_in_train(tmp_path):
    rows = [*numbered(50), "row 1\t1", " row  2\t1", "Row 3\t1"]
    splits = load(write(tmp_path / "a.tsv", rows))
    assert any(
        "2 rows left out, with the text of an earlier one" in note and "1 of them with another label" in note
        for note in splits.notes
    )
    found = [text for part in parts(splits).values() for text, _ in texts(part)]
    assert len(found) == len(set(found)) == 51
    labels = {t: label for part in parts(splits).values() for t, label in zip(part["text"], part["label"], strict=True)}
    assert labels["row 2"] == 0  # the first one is kept
    pairs = [f"same\tother {i}\t{i % 2}" for i in range(40)]  # the second text counts
    assert sum(map(len, parts(load(write(tmp_path / "b.tsv", pairs, "premise\thypothesis\tlabel"))).values())) == 40


def test_leaks_follow_the_order_of_precedence(tmp_path):
    write(tmp_path / "train.tsv", numbered(50))
    write(tmp_path / "quiz.tsv", numbered(8))
    write(tmp_path / "dev.tsv", numbered(6))
    write(tmp_path / "test.tsv", numbered(4))
    splits = load(tmp_path)
    assert [len(part) for part in (splits.test, splits.validation, splits.quiz, splits.train[0])] == [4, 2, 2, 42]
    notes = " ".join(splits.notes)
    assert (
        "8 rows left out whose text also stands in a split to test on: 4 in test, 2 in validation, 2 in quiz" in notes
    )


def test_a_split_that_is_a_copy_is_refused(tmp_path):
    write(tmp_path / "train.tsv", numbered(50))
    write(tmp_path / "test.tsv", numbered(50))
    assert "train.tsv: every text also stands in another split" in refused(tmp_path)


# Cuts


@pytest.fixture
def thousand(tmp_path):
    return write(tmp_path / "a.tsv", numbered(1000, classes=4))


SIZES = {"quiz_size": 20, "validation_size": 40, "test_size": 60, "train_size": 200}


def test_held_out_parts_do_not_depend_on_the_samples(thousand):
    one, six = (load(thousand, samples, **SIZES) for samples in (1, 6))
    assert [len(sample) for sample in six.train] == [146] * 6
    assert any("train 6 x 146 (of 200)" in note for note in six.notes)
    assert all(hashes(one)[part] == hashes(six)[part] for part in ("quiz", "validation", "test"))
    assert set(texts(six.train[0])) <= set(texts(one.train[0]))


def test_order_is_shuffled_by_the_seed_and_stratified(thousand):
    splits = load(thousand, 2, **SIZES)
    for part in parts(splits).values():
        counts = Counter(part["label"])
        assert max(counts.values()) - min(counts.values()) <= 1
        assert part["label"][:] != sorted(part["label"])
    base, other = hashes(splits), hashes(load(thousand, 2, split_seed=1, **SIZES))
    assert base == hashes(load(thousand, 2, **SIZES)) and not set(base.values()) & set(other.values())


def test_defaults_scale_down(thousand):
    said = []
    splits = load_splits(DataConfig(data=str(thousand)), 1, Hub("embedded"), said.append)
    assert said == splits.notes
    assert {name: len(part) for name, part in parts(splits).items()} == {
        "quiz": 100, "validation": 100, "test": 100, "train 0": 700,
    }  # fmt: skip
    note = next(note for note in splits.notes if "fewer than asked for" in note)
    assert (
        "1,000 usable rows" in note
        and "test 100 (of 2,000), validation 100 (of 872), train 1 x 700 (of 30,000)" in note
    )


@pytest.mark.parametrize("part", ["quiz", "validation", "test"])
def test_sizes_asked_for_must_be_possible(thousand, tmp_path, part):
    message = refused(thousand, **{f"{part}_size": 1000})
    assert f"--{part}-size" in message and "1,000" in message
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "train.tsv", numbered(100))
    write(folder / f"{part}.tsv", numbered(10, part))
    assert len(parts(load(folder, **{f"{part}_size": 5000}))[part]) == 10  # not cut, so the size does not matter


def test_tiny_data(tmp_path):
    splits = load(write(tmp_path / "a.tsv", numbered(20)))
    assert {name: len(part) for name, part in parts(splits).items()} == {
        "quiz": 2, "validation": 2, "test": 2, "train 0": 14,
    }  # fmt: skip
    assert all(set(part["label"]) == {0, 1} for part in parts(splits).values())
    many = load(write(tmp_path / "c.tsv", numbered(300, classes=77)))  # too few for a row of each class in every part
    assert [len(many.test), len(many.train[0])] == [30, 210]
    for count, samples in ((2, 1), (4, 1), (8, 1), (12, 2)):
        message = refused(write(tmp_path / "b.tsv", numbered(count)), samples)
        assert f"{count} rows" in message and "2 rows per class" in message


def test_rare_class_is_kept_for_training(tmp_path):
    splits = load(write(tmp_path / "a.tsv", [*numbered(100), "rare\t7"]))
    assert "rare" in splits.train[0]["text"][:]
    assert any("test, cut from" in note and "'7'" in note for note in splits.notes)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    counts=st.lists(st.integers(1, 60), min_size=2, max_size=5),
    repeats=st.integers(0, 10),
    samples=st.integers(1, 3),
    sizes=st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(1, 30), st.integers(1, 80)),
    seed=st.integers(0, 3),
)
def test_properties(tmp_path, counts, repeats, samples, sizes, seed):
    """Disjoint, within the sizes, stratified, deterministic, and held-out parts independent of the samples."""
    rows = [f"text {c} {i}\tclass {c}" for c, count in enumerate(counts) for i in range(count)]
    path = write(tmp_path / "h.tsv", rows + rows[:repeats])
    names = ("quiz_size", "validation_size", "test_size", "train_size")
    config = dict(zip(names, sizes, strict=True)) | {"split_seed": seed}
    try:
        splits = load(path, samples, **config)
    except UserError:
        return
    found = parts(splits)
    everything = [text for part in found.values() for text in texts(part)]
    assert len(everything) == len(set(everything)) <= len(rows)
    assert hashes(splits) == hashes(load(path, samples, **config))
    alone = hashes(load(path, 1, **config))
    assert all(alone[name] == content_hash(found[name]) for name in ("quiz", "validation", "test"))
    for name, part in found.items():
        assert 0 < len(part) <= config[f"{name.split()[0]}_size"]
    if min(counts) >= 20:  # no class is short of rows, so that only rounding and the cuts before remain
        for part in found.values():
            have = np.bincount(part["label"], minlength=len(counts))
            assert np.all(np.abs(have - len(part) * np.array(counts) / len(rows)) <= 4)


@given(
    counts=st.lists(st.integers(0, 50), min_size=1, max_size=8).filter(sum),
    leave=st.integers(0, 2),
    size=st.integers(0, 300),
)
def test_allocate(counts, leave, size):
    counts = np.array(counts)
    most = np.maximum(counts - leave, 0)
    shares = allocate(size, counts, most)
    assert shares.sum() == min(size, most.sum()) and np.all(shares >= 0) and np.all(shares <= most)
    exact = size * counts / counts.sum()
    if np.all(exact + 1 <= most) and np.all(exact >= 1):
        assert np.all(np.abs(shares - exact) < 1)
    if size >= (most > 0).sum():
        assert np.all(shares >= (most > 0))


def test_content_hash():
    def make(**columns):
        return datasets.Dataset.from_dict(columns)

    base = make(text=["a", "b"], label=[0, 1])
    assert content_hash(base) == content_hash(make(label=[0, 1], text=["a", "b"]))
    others = [
        make(text=["b", "a"], label=[1, 0]),
        make(text=["a", "b"], label=[0, 0]),
        make(text=["ab", ""], label=[0, 1]),
    ]
    assert len({content_hash(dataset) for dataset in [base, *others]}) == 4
    assert content_hash(base.select([1, 0])) == content_hash(others[0])


# Real data

LABELS = ("0", "1")
ENTAILMENT = ("entailment", "not_entailment")
MNLI = ("contradiction", "entailment", "neutral")
GENRES = ("fiction", "government", "slate", "telephone", "travel")


@pytest.mark.parametrize(
    ("name", "samples", "train", "validation", "test", "names", "metric", "column", "domains"),
    [
        ("sst2", 2, 30_000, 872, 2000, LABELS, "accuracy", None, ()),
        ("cola", 1, 7_565, 1043, 851, LABELS, "matthews", None, ()),
        ("mrpc", 1, 3_202, 408, 366, LABELS, "f1", None, ()),
        ("rte", 1, 2_140, 277, 248, ENTAILMENT, "accuracy", None, ()),
        ("mnli", 1, 11_590, 9815, 1298, MNLI, "accuracy", "genre", GENRES),
        ("amazon", 1, 6_232, 720, 800, LABELS, "accuracy", "domain", ("books", "dvd", "electronics", "kitchen")),
    ],
)
def test_real_data(name, samples, train, validation, test, names, metric, column, domains):
    if not (REAL / name).is_dir():
        pytest.skip(f"no folder {name} beside the repository, under shared/data")
    splits = load(REAL / name, samples)
    found = parts(splits)
    sizes = {"quiz": 100, "validation": validation, "test": test} | {f"train {i}": train for i in range(samples)}
    assert {part: len(rows) for part, rows in found.items()} == sizes
    assert splits.task.label_names == names and splits.task.pair == (name in ("mrpc", "rte", "mnli"))
    assert splits.task.metric == metric
    sets = {part: set(texts(rows)) for part, rows in found.items()}
    assert sum(map(len, sets.values())) == len(set().union(*sets.values()))
    if name == "mrpc":  # texts keep their unbalanced quotes
        assert any(text.startswith('"') and text.count('"') == 1 for text in splits.train[0]["text"])
    if column is not None:
        with_domains = load(REAL / name, domain_column=column)
        assert with_domains.task.domains == domains
        assert all(set(part["domain"]) == set(range(len(domains))) for part in parts(with_domains).values())
