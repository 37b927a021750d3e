"""Whole jobs on tiny data: what they leave behind, and that they repeat themselves."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from run_helpers import assert_same_models, flags, metrics, sentences, succeed, summary, table, weights
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from engine.losses.objectives import Objective
from engine.train import main

# Jobs

JOBS = {
    "finetune": {"method": "finetune"},
    "kd": {"method": "kd"},
    "kd from two teachers": {"method": "kd", "teachers": "bert,bert2"},
    "metadistil": {"method": "metadistil"},
    "two samples, pilot of two batches": {"teachers": "bert,bert2", "pilot_steps": 2},
    "double backward": {"meta_grad": "double_backward", "pilot_steps": 2},
    "reptile": {"method": "reptile", "teachers": "bert,roberta"},
    "lgtm": {"method": "lgtm", "teachers": "bert,roberta", "pilot_steps": 2},
    "warm-up": {"student_warmup_epochs": 1},
    "other losses": {"soft_loss": "mse_prob", "quiz_batches": 2},
    "its own tokenizer": {"teachers": "roberta", "student": "tinybert"},
    "layers": {"student": "bert", "student_layers": "0,2"},
    "more steps than an epoch": {"max_steps": 7},
}


@pytest.mark.parametrize("name", JOBS)
def test_jobs(name, data, tmp_path):
    changes = JOBS[name]
    run = succeed(data, tmp_path / "run", train_size=48, **changes)
    found = summary(run)
    teachers = [] if changes.get("method") == "finetune" else changes.get("teachers", "bert").split(",")
    assert found["method"] == changes.get("method", "metadistil")
    assert [t["name"] for t in found["teachers"]] == teachers
    steps = changes.get("max_steps", 3)
    assert found["phases"][found["method"]]["steps"] == steps
    assert ("warm up" in found["phases"]) == ("student_warmup_epochs" in changes)
    assert all(0 <= found["metrics"][split]["accuracy"] <= 1 for split in ("validation", "test"))
    assert metrics(run)[-1]["step"] == steps


def test_layers_are_kept_from_the_student(data, tmp_path):
    run = succeed(data, tmp_path / "run", student="bert", student_layers="0,2", method="finetune")
    assert AutoModelForSequenceClassification.from_pretrained(run / "student").config.num_hidden_layers == 2
    assert summary(run)["student"]["name"] == "bert[0,2]"


def test_pairs(tmp_path):
    rows = [(a, b, "same" if i % 2 else "other") for i, ((a, _), (b, _)) in
            enumerate(zip(sentences(120, 1), sentences(120, 2), strict=True))]  # fmt: skip
    data = table(tmp_path / "p.tsv", rows, "sentence1\tsentence2\tlabel")
    run = succeed(data, tmp_path / "run", teachers="bert,roberta", max_length=32)
    assert summary(run)["task"] == {"kind": "classification", "labels": ["other", "same"], "pair": True}
    assert set(json.loads((run / "predictions" / "test.jsonl").read_text().splitlines()[0])) == {
        "text", "pair", "label", "prediction", "logits"}  # fmt: skip


def test_three_classes(tmp_path):
    rows = [(text, ("bad", "fair", "good")[i % 3]) for i, (text, _) in enumerate(sentences(150))]
    run = succeed(table(tmp_path / "c.tsv", rows), tmp_path / "run", quiz_size=15, validation_size=15, test_size=15)
    config = AutoModelForSequenceClassification.from_pretrained(run / "student").config
    assert config.id2label == {0: "bad", 1: "fair", 2: "good"}
    assert config.label2id == {"bad": 0, "fair": 1, "good": 2}


@pytest.mark.parametrize("method", ["kd", "metadistil", "lgtm", "reptile"])
def test_regression(method, tmp_path, capsys):
    rows = [(text, round(len(text) / 7, 2)) for text, _ in sentences(120)]
    run = succeed(table(tmp_path / "r.tsv", rows), tmp_path / "run", method=method)
    out = capsys.readouterr().out
    assert "--soft-loss kl is constant for one output" in out and "uses mse_logits instead" in out
    assert summary(run)["metric"] == "pearson" and summary(run)["task"]["kind"] == "regression"
    config = AutoModelForSequenceClassification.from_pretrained(run / "student").config
    assert (config.num_labels, config.problem_type) == (1, "regression")
    assert yaml.safe_load((run / "config.yaml").read_text())["soft_loss"] == "mse_logits"


# What a run leaves


def test_contents_of_the_output_directory(finished):
    assert {p.name for p in finished.iterdir()} == {
        "config.yaml", "metrics.jsonl", "predictions", "report.html", "student", "summary.json", "teachers", "tensorboard"}  # fmt: skip
    assert {p.name for p in (finished / "teachers").iterdir()} == {"bert", "roberta"}
    for folder in (finished / "student", finished / "teachers" / "bert", finished / "teachers" / "roberta"):
        assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {p.name for p in folder.iterdir()}
        model = AutoModelForSequenceClassification.from_pretrained(folder, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert model.config.id2label == {0: "0", 1: "1"} and model.config.label2id == {"0": 0, "1": 1}
        logits = model(**tokenizer(["A fine film.", "No."], padding=True, return_tensors="pt")).logits
        assert logits.shape == (2, 2) and logits.isfinite().all()
        card = (folder / "README.md").read_text()
        assert card.startswith("---\n") and "embedded demonstration" in card and "metadistil" in card
    types = {
        name: AutoTokenizer.from_pretrained(finished / "teachers" / name)("fine")["input_ids"]
        for name in ("bert", "roberta")
    }
    assert types["bert"] != types["roberta"]


def test_summary(finished):
    found = summary(finished)
    keys = {"method", "source", "sources", "teachers", "student", "times_smaller", "metrics", "examples_per_second",
            "phases", "seconds", "peak_memory", "seed", "device", "versions", "git_commit"}  # fmt: skip
    assert keys <= found.keys()
    assert found["method"] == "metadistil" and found["seed"] == 1 and found["source"] == "embedded"
    assert found["sources"] == {"data": "local", "student": "embedded", "teachers": ["embedded", "embedded"]}
    assert found["metrics"].keys() == {"validation", "test"}
    assert found["metrics"]["test"].keys() == {"accuracy", "f1", "matthews"}
    sizes = [t["parameters"] for t in found["teachers"]]
    assert found["times_smaller"] == pytest.approx(sum(sizes) / 2 / found["student"]["parameters"], abs=1e-3)
    assert found["phases"].keys() == {"prepare bert", "prepare roberta", "metadistil"}
    assert all(p["steps"] == 4 and p["seconds"] > 0 and p["examples_per_second"] > 0 for p in found["phases"].values())
    assert found["examples_per_second"] == found["phases"]["metadistil"]["examples_per_second"]
    assert found["versions"]["torch"] == torch.__version__
    for folder, entry in [("student", found["student"]), *((f"teachers/{t['name']}", t) for t in found["teachers"])]:
        assert sum(t.numel() for t in weights(finished / folder).values()) == entry["parameters"]


def test_metrics_and_tensorboard(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = metrics(finished)
    training = [(line["phase"], line["step"]) for line in lines if "loss" in line]
    assert training == [(p, s) for p in ("prepare bert", "prepare roberta", "metadistil") for s in (2, 4)]
    last = next(line for line in reversed(lines) if "loss" in line)
    assert {
        "loss",
        "pilot_loss",
        "quiz_loss",
        "examples_per_second",
        "epoch",
        "lr",
        "lr/bert",
    } <= last.keys()
    assert len(list((finished / "tensorboard").glob("events.*"))) == 1
    events = EventAccumulator(str(finished / "tensorboard"))
    events.Reload()
    assert {"metadistil/loss", "metadistil/quiz_loss", "metadistil/validation/accuracy"} <= set(
        events.Tags()["scalars"]
    )
    assert [e.step for e in events.Scalars("metadistil/quiz_loss")] == [2, 4]


PLAIN = """
import json, sys, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
run, length = sys.argv[1], int(sys.argv[2])
model = AutoModelForSequenceClassification.from_pretrained(run + "/student").eval()
tokenizer = AutoTokenizer.from_pretrained(run + "/student")
right = worst = 0
rows = [json.loads(line) for line in open(run + "/predictions/test.jsonl", encoding="utf-8")]
for row in rows:
    with torch.no_grad():
        logits = model(**tokenizer(row["text"], truncation=True, max_length=length, return_tensors="pt")).logits[0]
    right += int(logits.argmax()) == row["label"]
    worst = max(worst, (logits - torch.tensor(row["logits"])).abs().max().item())
assert not any(name.split(".")[0] == "engine" for name in sys.modules)
print(json.dumps([right / len(rows), worst, len(rows)]))
"""


def test_plain_transformers_in_a_new_process_agrees(finished, tmp_path):
    done = subprocess.run([sys.executable, "-c", PLAIN, str(finished), "16"], cwd=tmp_path, check=True,
                          capture_output=True, text=True)  # fmt: skip
    accuracy, worst, count = json.loads(done.stdout)
    assert count == 12
    assert accuracy == pytest.approx(summary(finished)["metrics"]["test"]["accuracy"], abs=1e-6)  # rounded there
    assert worst < 1e-5  # one text at a time against padded batches


# Teachers


def test_prepared_teachers_are_reused_and_it_is_said_once(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("METADISTIL_CACHE", str(tmp_path / "cache"))
    first = succeed(data, tmp_path / "first", method="kd")
    assert "reused" not in capsys.readouterr().out
    second = succeed(data, tmp_path / "second", method="kd")
    assert capsys.readouterr().out.count("Teacher bert: reused, prepared before with the same data and settings") == 1
    assert [summary(run)["teachers"][0]["origin"] for run in (first, second)] == ["fine-tuned", "reused"]
    assert_same_models(first, second)
    other = succeed(data, tmp_path / "other", method="kd", prepare_lr=5e-4)
    assert summary(other)["teachers"][0]["origin"] == "fine-tuned"
    for file in (tmp_path / "cache" / "teachers").iterdir():
        file.write_bytes(b"damaged")
    again = succeed(data, tmp_path / "again", method="kd")
    assert summary(again)["teachers"][0]["origin"] == "fine-tuned"
    assert_same_models(first, again)


def test_a_trained_head_is_used_as_it_is(data, finished, tmp_path, capsys):
    teacher = finished / "teachers" / "bert"
    run = succeed(data, tmp_path / "run", teachers=teacher, method="kd")
    assert "its trained head is used as it is (--retrain-teachers changes that)" in capsys.readouterr().out
    (entry,) = summary(run)["teachers"]
    assert (entry["origin"], entry["source"]) == ("as given", str(teacher))
    given, kept = weights(teacher), weights(run / "teachers" / entry["name"])
    assert all(torch.equal(given[name], kept[name]) for name in given)
    assert "prepare bert" not in summary(run)["phases"]

    again = succeed(data, tmp_path / "again", teachers=teacher, method="kd", retrain_teachers=True)
    (entry,) = summary(again)["teachers"]
    assert entry["origin"] == "fine-tuned"
    retrained = weights(again / "teachers" / entry["name"])
    assert not all(torch.equal(given[name], retrained[name]) for name in given)


def test_a_head_for_other_labels_is_trained_anew(finished, tmp_path):
    rows = [(text, ("bad", "fair", "good")[i % 3]) for i, (text, _) in enumerate(sentences(150))]
    run = succeed(
        table(tmp_path / "c.tsv", rows), tmp_path / "run", teachers=finished / "teachers" / "bert", method="kd"
    )
    assert summary(run)["teachers"][0]["origin"] == "fine-tuned"


# The same again, and not the same


def test_seeds(data, tmp_path):
    one, two, other = (succeed(data, tmp_path / name, seed=seed) for name, seed in (("a", 5), ("b", 5), ("c", 6)))
    assert_same_models(one, two)
    first, second = weights(one / "student"), weights(other / "student")
    assert not all(torch.equal(first[name], second[name]) for name in first)
    files = [(run / "predictions" / "test.jsonl").read_text().splitlines() for run in (one, other)]
    assert [json.loads(line)["text"] for line in files[0]] == [json.loads(line)["text"] for line in files[1]]


@pytest.mark.parametrize("changes", [{}, {"pilot_steps": 2}], ids=["M=1", "M=2"])
def test_exact_meta_gradient_agrees_with_the_oracle(changes, data, tmp_path):
    runs = [succeed(data, tmp_path / kind, meta_grad=kind, max_steps=5, teachers="bert,roberta", **changes)
            for kind in ("exact", "double_backward")]  # fmt: skip
    for name in ("teachers/bert", "teachers/roberta", "student"):
        exact, oracle = (weights(run / name) for run in runs)
        distance = sum(float((exact[k] - oracle[k]).square().sum()) for k in exact) ** 0.5
        assert distance / sum(float(t.square().sum()) for t in oracle.values()) ** 0.5 < 1e-4  # float32


def test_a_loss_that_is_not_finite_is_an_error(data, tmp_path, capsys):
    assert main(flags(data, tmp_path / "run", method="finetune", lr=1e30, epochs=3)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: The loss of 'finetune' is not finite by step ") and error.count("\n") == 1
    assert "lower --lr" in error
    assert not (tmp_path / "run" / "summary.json").exists()


def test_updates_that_are_not_finite_are_left_out_and_counted(data, tmp_path, capsys, monkeypatch):
    """Two of twelve batches have labels that no loss is finite for: the run goes on, and its weights stay finite."""
    taken, hard = [], Objective._hard

    def spoilt(self, student, labels):
        if student.requires_grad:
            taken.append(len(taken))
        bad = student.requires_grad and taken[-1] in (3, 7)
        return hard(self, student, labels) * (float("inf") if bad else 1.0)

    monkeypatch.setattr(Objective, "_hard", spoilt)
    run = succeed(data, tmp_path / "run", method="finetune", epochs=3, log_steps=6)
    said = " ".join("".join(capsys.readouterr()).split())
    assert "finetune: 1 update before step 4 left out, because the gradient was not finite (1 so far)" in said
    assert "finetune: 1 update before step 8 left out" in said and "(2 so far)" in said
    assert summary(run)["phases"]["finetune"]["skipped"] == 2
    assert all(t.isfinite().all() for t in weights(run / "student").values())
    rows = [row for row in metrics(run) if "loss" in row]
    assert len(rows) == 4 and all(0 < row["loss"] < 10 for row in rows)  # means of what was finite


def test_a_teacher_is_the_same_beside_whatever_other(data, tmp_path, monkeypatch):
    """Neither the cache nor the company of a teacher with another tokenizer changes its bits."""
    prepared = []
    for name, teachers in {"alone": "bert", "beside": "roberta,bert"}.items():
        run = succeed(
            data, tmp_path / name, teachers=teachers, method="kd", max_steps=1, cache_dir=tmp_path / f"c-{name}"
        )
        prepared.append(weights(run / "teachers" / "bert"))
    assert all(torch.equal(prepared[0][name], prepared[1][name]) for name in prepared[0])


def test_what_stood_in_is_recorded_and_repeated(data, tmp_path, monkeypatch, capsys):
    """Defaults for miniatures must not meet the real models when the hub is back."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run = succeed(data, tmp_path / "run", source="auto", method="finetune")
    assert "the hub cannot be reached (HF_HUB_OFFLINE is set)" in " ".join(capsys.readouterr().out.split())
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["source"] == "embedded" and saved["lr"] == 1e-3
