"""A column of domains: read, checked, held in every cut."""

from collections import Counter

import datasets
import numpy as np
import pytest
from data_helpers import hashes, load, numbered, parts, refused, write
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_sources import from_hub, loaded  # noqa: F401 - a fixture

from engine.data.cut import Pool

HEADER = "kind\tsentence\tlabel"
SIZES = {"quiz_size": 12, "validation_size": 24, "test_size": 30, "train_size": 90}


def rows(count, domains=("zoo", "art", "law"), word="row"):
    return [f"{domains[i % len(domains)]}\t{word} {i}\t{i // len(domains) % 2}" for i in range(count)]


def counts(dataset):
    return Counter(zip(dataset["domain"], dataset["label"], strict=True))


# Rows and cuts


def test_domains_are_ids_of_sorted_names(tmp_path):
    lines = rows(240)
    splits = load(write(tmp_path / "a.tsv", lines, HEADER), domain_column="Kind", **SIZES)
    assert splits.task.domains == ("art", "law", "zoo")
    named = {line.split("\t")[1]: line.split("\t")[0] for line in lines}
    for part in parts(splits).values():
        assert part.features["domain"].dtype == "int64"
        assert [splits.task.domains[i] for i in part["domain"]] == [named[text] for text in part["text"]]
    (told,) = [note for note in splits.notes if note.startswith("Data (")]
    assert "label label, 2 classes, domain kind (art 30, law 30, zoo 30); train 1 x 90" in told


def test_nothing_changes_without_the_flag(tmp_path):
    """The split that `domain_column` is not given for is the one of a file without that column."""
    bare = load(write(tmp_path / "bare.tsv", [line.partition("\t")[2] for line in rows(240)]), 2, **SIZES)
    beside = load(write(tmp_path / "beside.tsv", rows(240), HEADER), 2, **SIZES)
    assert hashes(bare) == hashes(beside) and beside.task == bare.task and beside.task.domains == ()
    assert bare.train[0].column_names == ["text", "label"]


def test_every_cut_has_every_domain_and_its_classes_in_their_share(tmp_path):
    """A domain of a tenth of the rows, with another share of the classes."""
    small = [f"rare\trare {i}\t{int(i % 4 == 0)}" for i in range(32)]
    splits = load(write(tmp_path / "a.tsv", [*rows(288), *small], HEADER), 2, domain_column="kind", **SIZES)
    for name, part in parts(splits).items():
        found = counts(part)
        assert len(found) == 8 or (name, len(found)) == ("quiz", 7)  # one row of 12 for the smallest domain
        for domain, of in enumerate((96, 96, 32, 96)):
            have = sum(n for (d, _), n in found.items() if d == domain)
            assert abs(have - len(part) * of / 320) <= 1.5, name  # a row of the cut, and what cuts before it left


@settings(max_examples=100, deadline=None)
@given(
    table=st.lists(st.lists(st.integers(0, 30), min_size=3, max_size=3), min_size=1, max_size=5).filter(
        lambda t: all(sum(row) for row in t)
    ),
    size=st.integers(1, 60), leave=st.integers(0, 1), seed=st.integers(0, 5),
)  # fmt: skip
def test_a_cut_of_domains(table, size, leave, seed):
    """Rows once, no domain left out of a cut that has a row for each, nor far from its share."""
    table = np.array(table)
    domains, classes = (np.repeat(ids.ravel(), table.ravel()) for ids in np.indices(table.shape))
    pool = Pool(classes, 3, seed, domains)
    assert (pool.counts == table).all()
    taken = pool.cut(size, leave)
    most = np.maximum(table - leave, 0)
    assert len(set(taken)) == len(taken) == min(size, most.sum())
    have = np.zeros_like(table)
    np.add.at(have, (domains[taken], classes[taken]), 1)
    assert (have <= most).all() and (pool.counts == table - have).all()
    if size >= len(table):
        assert (have.sum(1) >= np.minimum(1, most.sum(1))).all()
    share = len(taken) * table.sum(1) / table.sum()
    if (share >= 1).all() and (share + 1 <= most.sum(1)).all():
        assert (abs(have.sum(1) - share) < 1).all()


def test_a_cut_of_a_row_a_domain_has_every_class():
    classes, domains = np.tile([0, 1], 40), np.repeat(range(8), 10)
    taken = Pool(classes, 2, 0, domains).cut(8)
    assert sorted(domains[taken]) == list(range(8)) and Counter(classes[taken]) == {0: 4, 1: 4}


def test_regression_has_domains(tmp_path):
    lines = [f"{'ab'[i % 2]}\trow {i}\t{i / 8}" for i in range(120)]
    splits = load(write(tmp_path / "a.tsv", lines, HEADER), domain_column="kind")
    assert splits.task.kind == "regression"
    assert all(abs(2 * sum(part["domain"]) - len(part)) <= 1 for part in parts(splits).values())


# Refusals


def test_a_domain_that_training_does_not_know_and_one_without_rows(tmp_path):
    write(tmp_path / "train.tsv", rows(60), HEADER)
    write(tmp_path / "dev.tsv", [*rows(4, word="dev"), "sea\tnew\t1"], HEADER)
    message = refused(tmp_path, domain_column="kind")
    assert "dev.tsv, line 6" in message and "'sea'" in message and "its domains are art, law, zoo" in message
    write(tmp_path / "dev.tsv", rows(4, ["art", "zoo"], "dev"), HEADER)
    assert any("dev.tsv has no example of the domain 'law'." in n for n in load(tmp_path, domain_column="kind").notes)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ('"kind": null', "the domain in 'kind' is empty"),
        ('"kind": "  "', "is empty"),
        ('"kind": NaN', "is empty"),
        ('"kind": [1]', "must be a name, not list"),
        ("", "missing"),
    ],
)
def test_what_is_no_domain_in_json(tmp_path, more, said):
    good = [f'{{"text": "t {i}", "label": {i % 2}, "kind": {i % 3}}}' for i in range(30)]
    bad = f'{{"text": "bad", "label": 1{", " if more else ""}{more}}}'
    (tmp_path / "a.jsonl").write_text("\n".join([*good, bad]) + "\n")
    message = refused(tmp_path / "a.jsonl", domain_column="kind")
    assert "line 31" in message and said in message
    (tmp_path / "a.jsonl").write_text("\n".join(good) + "\n")
    assert load(tmp_path / "a.jsonl", domain_column="kind").task.domains == ("0", "1", "2")


@pytest.mark.parametrize(
    ("header", "columns", "what"),
    [
        ("kind\tsentence\tlabel", {"domain_column": "label"}, "label"),
        ("kind\tsentence\tlabel", {"domain_column": "sentence"}, "text"),
        ("a\tb\tlabel", {"domain_column": "a", "text_column": "a"}, "text"),
        ("a\tb\tlabel", {"domain_column": "a", "text_column": "b", "pair_column": "a"}, "pair"),
        ("a\tb\tc", {"domain_column": "c", "text_column": "b", "label_column": "c"}, "label"),
    ],
)
def test_a_column_of_something_else(tmp_path, header, columns, what):
    message = refused(write(tmp_path / "a.tsv", rows(60), header), **columns)
    assert f"--domain-column is {columns['domain_column']}, which is the {what} column" in message


def test_an_absent_column_and_a_column_of_ids(tmp_path):
    usual = write(tmp_path / "a.tsv", rows(60), "category\ttitle\tsentiment")  # looked for as label and text, if free
    assert len(load(usual, domain_column="category").task.domains) == 3
    path = write(tmp_path / "a.tsv", rows(60), HEADER)
    message = refused(path, domain_column="genre")
    assert "no column 'genre'" in message and "--domain-column" in message
    many = write(tmp_path / "b.tsv", [f"{i}\trow {i}\t{i % 2}" for i in range(1200)], HEADER)
    assert "1,200 different domains" in refused(many, domain_column="kind")
    write(tmp_path / "train.tsv", rows(60), HEADER)
    write(tmp_path / "test.tsv", numbered(10, "t"))
    (tmp_path / "a.tsv").unlink()
    assert "test.tsv has no column 'kind'" in refused(tmp_path, domain_column="kind")


def test_domains_of_the_hub(loaded):  # noqa: F811
    """Broken rows are left out and counted; ids have the names of the schema."""

    def part(word, count, domains):
        features = datasets.Features({
            "text": datasets.Value("string"), "label": datasets.Value("int64"),
            "kind": datasets.ClassLabel(names=["x", "y", "z"]),
        })  # fmt: skip
        columns = {"text": [f"{word} {i}" for i in range(count)], "label": [i // 3 % 2 for i in range(count)]}
        columns["kind"] = [domains[i % len(domains)] for i in range(count)]
        return datasets.Dataset.from_dict(columns, features=features)

    loaded.answer = datasets.DatasetDict(train=part("t", 300, [0, 1, None]), validation=part("v", 30, [0, 1, 2]))
    splits = from_hub("user/name", domain_column="kind")
    assert splits.task.domains == ("x", "y") and len(splits.validation) == 20
    for name, count in (("train", 100), ("validation", 10)):
        assert f"user/name {name}: {count} rows without a text, a label or a domain of train left out." in splits.notes
