"""GLUE's tasks by name: columns, splits, order of labels and metrics, from the hub and from local files."""

import pytest
from data_helpers import hub_data, load, numbered, refused, write
from run_helpers import metrics, succeed, summary
from test_data_sources import from_hub, loaded  # noqa: F401 - a fixture

from engine.data.glue import METRICS, task_of
from engine.embedded import generate
from engine.report.tables import closing_table

# As the benchmark's data set on the hub has them: columns of text, names of labels, further columns and splits.
TWO = ("sentence1", "sentence2")
ENTAILMENT = ("entailment", "not_entailment")
TASKS = {
    "sst2": (("sentence",), ("negative", "positive"), "accuracy"),
    "cola": (("sentence",), ("unacceptable", "acceptable"), "matthews"),
    "mrpc": (TWO, ("not_equivalent", "equivalent"), "f1"),
    "rte": (TWO, ENTAILMENT, "accuracy"),
    "stsb": (TWO, (), "pearson"),
    "qqp": (("question1", "question2"), ("not_duplicate", "duplicate"), "f1"),
    "mnli": (("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), "accuracy"),
    "qnli": (("question", "sentence"), ENTAILMENT, "accuracy"),
    "wnli": (TWO, ENTAILMENT[::-1], "accuracy"),
}


def on_the_hub(name):
    columns, names, _ = TASKS[name]
    parts = {"train": ("t", 600, None), "validation": ("v", 60, None), "test": ("x", 40, -1)}
    if name == "mnli":
        parts = {"train": parts["train"]}
        for which in ("matched", "mismatched"):
            parts |= {f"validation_{which}": (which, 60, None), f"test_{which}": ("x", 40, -1)}
    return hub_data(columns, names, parts)


@pytest.mark.parametrize("name", METRICS)
def test_tasks_of_the_hub(name, loaded):  # noqa: F811
    columns, names, metric = TASKS[name]
    loaded.answer = on_the_hub(name)
    splits = from_hub(name, train_size=100)
    assert loaded.calls == [(("nyu-mll/glue", name), False)]
    assert splits.task.label_names == names and splits.task.metric == metric == METRICS[name]
    assert splits.task.kind == ("classification" if names else "regression") and splits.task.pair == (len(columns) == 2)
    first = "matched" if name == "mnli" else "v"
    assert len(splits.validation) == 60 and splits.validation.features["label"].dtype == (
        "int64" if names else "float64"
    )
    for row in splits.validation:
        i = int(row["text"].split()[-1])
        assert row["text"] == f"{first} {columns[0]} {i}"
        assert len(columns) == 1 or row["pair"] == f"{first} {columns[1]} {i}"
        assert row["label"] == (i % len(names) if names else i % 21 / 4)
    assert all(text.startswith("t ") for text in splits.test["text"])  # the benchmark's has no labels
    line = splits.notes[-1]
    of = f" of {names[1]!r}" if metric == "f1" else ""
    assert line.endswith(f"; metric {metric}{of} (GLUE's for {name}).")
    unused = "nyu-mll/glue:mnli: not used are test_matched, validation_mismatched, test_mismatched."
    assert (unused in splits.notes) == (name == "mnli")


@pytest.mark.parametrize(
    ("data", "task"),
    [
        ("cola", "cola"), ("SST-2", "sst2"), ("nyu-mll/glue:mrpc", "mrpc"), ("user/cola", None), ("user/name:cola", None),
        ("nyu-mll/glue", None), ("set/cola", "cola"), ("./set/STS-B/", "stsb"), ("./gone/cola", None), ("colas", None),
        ("set/cola/train.tsv", None), ("", None),
    ],
)  # fmt: skip
def test_which_task_data_is(tmp_path, monkeypatch, data, task):
    monkeypatch.chdir(tmp_path)
    for name in ("cola", "STS-B"):
        (tmp_path / "set" / name).mkdir(parents=True)
    assert task_of(data) == task


# Local files


def folder(tmp_path, name, rows, header="sentence1\tsentence2\tlabel"):
    (tmp_path / name).mkdir()
    write(tmp_path / name / "train.tsv", rows, header)
    return tmp_path / name


def test_a_folder_named_as_a_task_has_its_metric(tmp_path):
    path = folder(tmp_path, "cola", numbered(60), "sentence\tlabel")
    splits = load(path)
    assert splits.task.metric == "matthews" and splits.notes[-1].endswith("; metric matthews (GLUE's for cola).")
    assert load(path / "train.tsv").task.metric == "accuracy"
    splits = load(path, metric="f1")
    assert splits.task.metric == "f1" and splits.notes[-1].endswith("; metric f1 of '1'.")
    numbers = [f"row {i}\t{i / 8}" for i in range(60)]
    assert load(folder(tmp_path, "mrpc", numbers, "sentence\tlabel")).task.metric == "pearson"  # F1 does not fit
    splits = load(folder(tmp_path, "reviews", numbered(60), "sentence\tlabel"))
    assert splits.task.metric == "accuracy" and "metric" not in splits.notes[-1]


@pytest.mark.parametrize(("name", "word"), [("mrpc", "equivalent"), ("qqp", "duplicate")])
def test_f1_is_of_the_benchmarks_class_whatever_the_alphabet_says(tmp_path, name, word):
    rows = [f"a {i}\tb {i}\t{f'not_{word}' if i % 3 else word}" for i in range(60)]
    assert load(folder(tmp_path, name, rows)).task.label_names == (f"not_{word}", word)
    assert load(folder(tmp_path, "pairs", rows)).task.label_names == (word, f"not_{word}")
    write(tmp_path / name / "train.tsv", [row.replace(word, "alike") for row in rows], "sentence1\tsentence2\tlabel")
    assert load(tmp_path / name).task.label_names == ("alike", "not_alike")


@pytest.mark.parametrize(("metric", "task"), [("pearson", "auto"), ("spearman", "auto"), ("accuracy", "regression")])
def test_a_metric_of_another_kind(tmp_path, metric, task):
    message = refused(write(tmp_path / "a.tsv", numbered(60)), metric=metric, task=task)
    assert message.startswith(f"--metric {metric} is a metric of a ") and "use " in message


# Whole runs


def test_the_metric_chooses_the_weights_and_heads_the_table(tmp_path, cache):
    """Teachers that were chosen by another metric are not reused."""
    path = folder(tmp_path, "cola", [f"{t}\t{label}" for t, label in generate(200, 0)], "sentence\tlabel")
    for metric, name in (("auto", "matthews"), ("accuracy", "accuracy")):
        out = succeed(path, tmp_path / metric, method="kd", metric=metric, eval_steps=1, lr=0.003, epochs=2)
        found = summary(out)
        assert [t["origin"] for t in found["teachers"]] == ["fine-tuned"]
        rows = [row for row in metrics(out) if f"validation/{name}" in row and row["phase"] == "kd"]
        best = max(rows, key=lambda row: row[f"validation/{name}"])
        assert found["metric"] == name and found["student"]["best_step"] == best["step"]
        value = found["student"][name]
        assert value == found["metrics"]["test"][name]
        table = closing_table(found)
        assert table["title"] == f"{name}{' in %' if metric == 'accuracy' else ''}, {path}"
        assert table["rows"][-1][3] == (f"{100 * value:.2f}" if metric == "accuracy" else f"{value:.4f}")
