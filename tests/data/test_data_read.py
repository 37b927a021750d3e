"""Files, their columns and labels: what is read, and what is refused with its line."""

import json
import time

import datasets
import pytest
from data_helpers import hashes, load, numbered, parts, refused, write

# Reading


def test_columns_and_types(tmp_path):
    splits = load(write(tmp_path / "a.tsv", numbered(100)), train_size=20, quiz_size=4, validation_size=6, test_size=8)
    assert {name: len(part) for name, part in parts(splits).items()} == {
        "quiz": 4, "validation": 6, "test": 8, "train 0": 20,
    }  # fmt: skip
    assert splits.source == "local" and splits.task.label_names == ("0", "1") and splits.task.num_labels == 2
    assert not splits.task.pair and splits.task.kind == "classification"
    for part in parts(splits).values():
        assert part.column_names == ["text", "label"]
        assert part.features["label"].dtype == "int64"
        assert all(label == int(text.split()[1]) % 2 for text, label in zip(part["text"], part["label"], strict=True))


def in_format(tmp_path, suffix, rows):
    path = tmp_path / f"train{suffix}"
    if suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif suffix == ".csv":
        quoted = ['"' + row["text"].replace('"', '""') + f'",{row["label"]}' for row in rows]
        path.write_text("\n".join(["text,label", *quoted]), encoding="utf-8")
    elif suffix == ".tsv":
        path.write_text("\n".join(["text\tlabel", *(f"{row['text']}\t{row['label']}" for row in rows)]), "utf-8")
    elif suffix == ".json":
        path.write_text(json.dumps(rows), "utf-8")
    else:
        path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return path


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl", ".json", ".jsonlines", ".parquet"])
def test_every_format_gives_the_same_splits(tmp_path, suffix):
    rows = [{"text": f'say "{i}, é\u2028ü', "label": f"c{i % 3}"} for i in range(60)]
    splits = load(in_format(tmp_path, suffix, rows))
    assert splits.task.label_names == ("c0", "c1", "c2")
    found = {
        text: label for part in parts(splits).values() for text, label in zip(part["text"], part["label"], strict=True)
    }
    assert found == {row["text"]: i % 3 for i, row in enumerate(rows)}
    assert hashes(splits) == hashes(load(in_format(tmp_path, ".jsonl", rows)))


def test_windows_files_are_read_and_other_encodings_refused(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_bytes(b"\xef\xbb\xbfsentence\tlabel\r\n" + b"".join(b"row %d\t%d\r\n" % (i, i % 2) for i in range(40)))
    splits = load(path)
    assert splits.task.label_names == ("0", "1") and not any("\r" in text for text in splits.train[0]["text"])
    path.write_bytes(path.read_bytes() + b"caf\xe9\t1\n")
    assert "a.tsv, line 42" in refused(path)


def test_csv_texts_may_span_lines_and_be_long(tmp_path):
    path = tmp_path / "a.csv"
    body = "".join(f'"first {i}\nsecond {"x" * 200_000 if i == 3 else ""}",{i % 2}\n' for i in range(30))
    path.write_text("text,label\n" + body)
    assert max(len(text) for part in parts(load(path)).values() for text in part["text"]) > 200_000
    path.write_text("text,label\n" + body + '"one\ntwo",\n')
    assert "a.csv, line 62: the label is empty" in refused(path)  # 1 + 30 records of two lines


TSV_FAULTS = [
    ("one column", "line 12 has 1 column"),
    ("a\tb\t1", "line 12 has 3 columns"),
    ("", "line 12 is empty"),
    ("  \t1", "line 12: the text in 'sentence' is empty"),
    ("text\t", "line 12: the label is empty"),
    ("text\tNaN", "line 12: the label is empty"),
    ("text\t-1", "line 12: the label -1 marks a row without a label"),
]


@pytest.mark.parametrize(("row", "expected"), TSV_FAULTS)
def test_broken_tsv_row(tmp_path, row, expected):
    path = write(tmp_path / "a.tsv", [*numbered(10), row, *numbered(10, "more")])
    assert f"a.tsv, {expected}" in refused(path)


JSON_FAULTS = [
    ("{", "not valid JSON"),
    ("[1]", "a JSON list"),
    ('{"text": "a"}', "the key 'label' is missing"),
    ('{"label": 1}', "the key 'text' is missing"),
    ('{"text": 5, "label": 1}', "'text' must be a text, not int 5"),
    ('{"text": null, "label": 1}', "'text' must be a text, not null"),
    ('{"text": "\\ud800", "label": 1}', "surrogate"),
    ('{"text": "a", "label": null}', "the label is empty"),
    ('{"text": "a", "label": NaN}', "the label is empty"),
    ('{"text": "a", "label": Infinity}', "the label is infinite"),
    ('{"text": "a", "label": [1]}', "a list cannot be a label"),
]


@pytest.mark.parametrize(("row", "expected"), JSON_FAULTS)
def test_broken_json_row(tmp_path, row, expected):
    path = tmp_path / "a.jsonl"
    good = [json.dumps({"text": f"row {i}", "label": i % 2}) for i in range(10)]
    path.write_text("\n".join([*good, row, *good[:2], "", ""]))
    message = refused(path)
    assert "a.jsonl, line 11: " in message and expected in message


def test_broken_csv_and_parquet(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('text,label\na,1\n"b"c,0\n')
    assert "a.csv, line 3: this row is not valid CSV" in refused(path)
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 no")
    assert "not a readable parquet file" in refused(path)
    datasets.Dataset.from_dict({"foo": ["a"], "label": [0]}).to_parquet(path)
    assert "no text column with a usual name; it has the columns foo, label" in refused(path)
    datasets.Dataset.from_dict({"text": ["a", "b", None], "label": [0, 1, 1]}).to_parquet(path)
    assert "a.parquet, row 3: 'text' must be a text, not null" in refused(path)


def test_empty_files(tmp_path):
    path = tmp_path / "a.tsv"
    for content in ("", "\n\n", "sentence\tlabel\n"):
        path.write_text(content)
        assert "a.tsv is empty" in refused(path) or "a.tsv has no rows" in refused(path)
    assert "more than one column named 'a'" in refused(write(path, ["x\t1\t2"], "a\tlabel\ta"))


def test_reading_is_fast(tmp_path):
    path = write(tmp_path / "a.tsv", numbered(30_000))
    start = time.process_time()
    load(path, 2)
    assert time.process_time() - start < 8  # 0.2 s of processor time on an idle core; quadratic code takes minutes


# Columns


@pytest.mark.parametrize(
    ("header", "config", "expected"),
    [
        ("Sentence\tLABEL\tsource", {}, ("0", None)),
        ("id\tpremise\thypothesis\tlabel", {}, ("1", "2")),
        ("question\tsentence\tlabel", {}, ("0", "1")),
        ("question1\tquestion2\tis_duplicate", {}, ("0", "1")),
        ("genre\treview\tsentiment", {}, ("1", None)),
        ("premise\thypothesis\tlabel", {"text_column": "hypothesis"}, ("1", None)),
        ("premise\thypothesis\tlabel", {"text_column": "Hypothesis", "pair_column": "premise"}, ("1", "0")),
        ("x\ty\tz", {"text_column": "y", "label_column": "z"}, ("1", None)),
        ("text\tlabel\tstars", {"label_column": "stars"}, ("0", None)),
    ],
)
def test_columns_are_found(tmp_path, header, config, expected):
    names = header.split("\t")
    label = config.get("label_column") or next(n for n in ("LABEL", "label", "is_duplicate", "sentiment") if n in names)
    rows = [
        "\t".join(str(i % 2) if name == label else f"{j} word {i}" for j, name in enumerate(names)) for i in range(40)
    ]
    splits = load(write(tmp_path / "a.tsv", rows, header), **config)
    first = splits.train[0][0]
    assert (first["text"][0], first.get("pair", " ")[0].strip() or None) == expected
    assert splits.task.pair == (expected[1] is not None)


@pytest.mark.parametrize(
    ("header", "config", "expected"),
    [
        ("foo\tlabel", {}, ("no text column", "its first line names the columns foo, label", "--text-column")),
        ("text\tfoo", {}, ("no label column", "text, foo", "--label-column")),
        ("text\tlabel", {"text_column": "foo"}, ("no column 'foo'", "text, label", "--text-column")),
        ("text\tlabel", {"pair_column": "foo"}, ("no column 'foo'", "--pair-column")),
        ("text\tlabel", {"label_column": "foo"}, ("no column 'foo'", "--label-column")),
        ("text\tlabel", {"label_column": "text", "text_column": "text"}, ("different columns",)),
    ],
)
def test_columns_are_not_found(tmp_path, header, config, expected):
    message = refused(write(tmp_path / "a.tsv", numbered(40), header), **config)
    assert all(part in message for part in expected)


# Labels


def test_integers_sort_by_size_and_words_by_the_alphabet(tmp_path):
    for labels, names in (([2, 10, 1], ("1", "2", "10")), (["b", "c", "a"], ("a", "b", "c"))):
        rows = [f"row {i}\t{labels[i % 3]}" for i in range(60)]
        assert load(write(tmp_path / "a.tsv", rows)).task.label_names == names
    write(tmp_path / "train.tsv", numbered(60))
    write(tmp_path / "test.tsv", ["a\t1.0", "b\t 0"])  # the same number written differently is one class
    test = load(tmp_path).test
    assert dict(zip(test["text"], test["label"], strict=True)) == {"a": 1, "b": 0}


def test_regression(tmp_path):
    rows = [f"row {i}\t{i % 5 + (i == 7) / 2}" for i in range(80)]
    path = write(tmp_path / "a.tsv", rows)
    splits = load(path)
    assert splits.task.kind == "regression" and splits.task.label_names == () and splits.task.num_labels == 1
    assert splits.test.features["label"].dtype == "float64"
    assert load(path, task="classification").task.label_names == ("0", "1", "2", "2.5", "3", "4")
    path = write(tmp_path / "b.tsv", numbered(80))
    assert load(path).task.kind == "classification" and load(path, task="regression").task.kind == "regression"
    message = refused(write(tmp_path / "c.tsv", [*rows, "bad\tgood"]))
    assert "c.tsv, line 82: the label 'good' is not a number" in message and "--task" in message
    load(write(tmp_path / "d.tsv", [*rows, "minus\t-1"]))


def test_held_out_label_that_train_lacks(tmp_path):
    write(tmp_path / "train.tsv", numbered(60))
    write(tmp_path / "dev.tsv", ["a\t1", "b\tmaybe"])
    message = refused(tmp_path)
    assert "dev.tsv, line 3" in message and "'maybe'" in message and "0, 1" in message
    write(tmp_path / "dev.tsv", ["a\t1", "b\t1"])
    assert any("dev.tsv has no example of the class '0'" in note for note in load(tmp_path).notes)


def test_one_class_and_too_many(tmp_path):
    assert "two classes" in refused(write(tmp_path / "a.tsv", numbered(50, classes=1)))
    message = refused(write(tmp_path / "a.tsv", numbered(1500, classes=1001)))
    assert "1,001 different labels" in message and "--label-column" in message


# Folders and paths


def test_folder(tmp_path):
    write(tmp_path / "train.tsv", numbered(100))
    write(tmp_path / "Quiz.tsv", numbered(5, "quiz"))
    write(tmp_path / "dev_matched.tsv", numbered(6, "dev"))
    write(tmp_path / "dev_mismatched.tsv", numbered(6, "other"))
    write(tmp_path / "test.csv", [f"test {i},{i % 2}" for i in range(7)], "sentence,label")
    write(tmp_path / "meta.tsv", ["nothing"], "x\ty")
    (tmp_path / "SOURCE.md").write_text("about")
    splits = load(tmp_path, train_size=30)
    assert [len(part) for part in (splits.quiz, splits.validation, splits.test, *splits.train)] == [5, 6, 7, 30]
    assert {text.split()[0] for text in splits.validation["text"]} == {"dev"}
    assert f"{tmp_path}: not used are dev_mismatched.tsv, meta.tsv." in splits.notes


def test_folder_without_train_and_with_two(tmp_path):
    write(tmp_path / "training.tsv", numbered(10))
    message = refused(tmp_path)
    assert "no training file" in message and "training.tsv" in message and ".parquet" in message
    write(tmp_path / "train.tsv", numbered(10))
    write(tmp_path / "train.csv", numbered(10))
    assert "two train files" in refused(tmp_path)


@pytest.mark.parametrize("data", ["./nope", "/nope/x", "~/nope-x", "a/b/c", "nope.tsv", "nope.JSONL", "../x"])
def test_paths_that_do_not_exist(data):
    assert f"--data {data} does not exist" in refused(data, source="auto")


def test_other_bad_sources(tmp_path):
    assert "neither an existing path nor a known data set" in refused("", source="auto")
    assert "neither an existing path nor a known data set" in refused("imdb", source="auto")
    path = tmp_path / "a.txt"
    path.write_text("x")
    assert "suffix .txt" in refused(path)
