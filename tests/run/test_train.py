"""Whole jobs on tiny data: what they leave behind, and that they repeat themselves."""

import json
from functools import cache
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import yaml
from run_helpers import (
    assert_same_models,
    flags,
    job,
    metrics,
    sentences,
    succeed,
    succeed_saying,
    summary,
    table,
    weights,
)
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from engine.losses.objectives import Objective
from engine.run import checkpoint
from engine.run.tally import Tally
from engine.train import main

JOBS = {
    "two samples": {"method": "kd", "teachers": "bert,bert2", "max_steps": 7},  # more steps than an epoch
    "warm-up, a pilot of two batches": {"student_warmup_epochs": 1, "pilot_steps": 2, "quiz_batches": 2},
    "its own tokenizer": {"teachers": "roberta", "student": "tinybert", "soft_loss": "mse_prob"},
    "reptile": {"method": "reptile", "teachers": "bert,roberta"},
}


@pytest.mark.parametrize("name", JOBS)
def test_jobs(name, data, tmp_path):
    changes = {"method": "metadistil", "teachers": "bert", "max_steps": 3} | JOBS[name]
    run = succeed(data, tmp_path / "run", train_size=48, **changes)
    found = summary(run)
    assert found["method"] == changes["method"]
    assert [t["name"] for t in found["teachers"]] == changes["teachers"].split(",")
    assert found["phases"][found["method"]]["steps"] == metrics(run)[-1]["step"] == changes["max_steps"]
    assert ("warm up" in found["phases"]) == ("student_warmup_epochs" in changes)
    assert all(0 <= found["metrics"][split]["accuracy"] <= 1 for split in ("validation", "test"))


def test_finetuning_some_layers_of_what_stood_in(data, tmp_path, monkeypatch):
    """It is recorded: defaults for miniatures must not meet the real models when the hub is back."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    changes = {"source": "auto", "method": "finetune", "student": "bert", "student_layers": "0,2", "max_steps": 1}
    run, said = succeed_saying(data, tmp_path / "run", **changes)
    assert "the hub cannot be reached (HF_HUB_OFFLINE is set)" in " ".join(said.split())
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["source"] == "embedded" and saved["lr"] == 1e-3
    assert summary(run)["student"]["name"] == "bert[0,2]" and summary(run)["teachers"] == []
    assert AutoModelForSequenceClassification.from_pretrained(run / "student").config.num_hidden_layers == 2


def test_pairs_of_three_classes(finished, tmp_path):
    """A teacher with a head for other labels is given a new one."""
    texts = zip(sentences(150, 1), sentences(150, 2), strict=True)
    rows = [(a, b, ("bad", "fair", "good")[i % 3]) for i, ((a, _), (b, _)) in enumerate(texts)]
    data = table(tmp_path / "p.tsv", rows, "sentence1\tsentence2\tlabel")
    run = succeed(data, tmp_path / "run", teachers=finished / "teachers" / "bert", max_length=32, cache_dir=tmp_path / "c",
                  quiz_size=15, validation_size=15, test_size=15)  # fmt: skip
    assert summary(run)["task"] == {"kind": "classification", "labels": ["bad", "fair", "good"], "pair": True}
    assert summary(run)["teachers"][0]["origin"] == "fine-tuned"
    row = json.loads((run / "predictions" / "test.jsonl").read_text().splitlines()[0])
    assert set(row) == {"text", "pair", "label", "prediction", "logits"}
    config = AutoModelForSequenceClassification.from_pretrained(run / "student").config
    assert config.id2label == {0: "bad", 1: "fair", 2: "good"}
    assert config.label2id == {"bad": 0, "fair": 1, "good": 2}


def test_regression_by_lgtm(tmp_path):
    rows = [(text, round(len(text) / 7, 2)) for text, _ in sentences(120)]
    changes = {"method": "lgtm", "pilot_steps": 2, "cache_dir": tmp_path / "cache"}
    run, out = succeed_saying(table(tmp_path / "r.tsv", rows), tmp_path / "run", **changes)
    assert "--soft-loss kl does not compare the one output of a regression; mse_logits is used instead" in out
    assert summary(run)["metric"] == "pearson" and summary(run)["task"]["kind"] == "regression"
    assert summary(run)["phases"]["lgtm"]["steps"] == 4
    config = AutoModelForSequenceClassification.from_pretrained(run / "student").config
    assert (config.num_labels, config.problem_type) == (1, "regression")
    assert yaml.safe_load((run / "config.yaml").read_text())["soft_loss"] == "mse_logits"


# What a run leaves


def test_contents_of_the_output_directory(finished):
    assert {p.name for p in finished.iterdir()} == {
        "config.yaml", "metrics.jsonl", "predictions", "report.html", "student", "summary.json", "teachers", "tensorboard"}  # fmt: skip
    assert {p.name for p in (finished / "teachers").iterdir()} == {"bert", "roberta"}
    ids = []
    for folder in (finished / "student", finished / "teachers" / "bert", finished / "teachers" / "roberta"):
        model = AutoModelForSequenceClassification.from_pretrained(folder, use_safetensors=True)
        assert type(model).__module__.startswith("transformers.")
        assert model.config.id2label == {0: "0", 1: "1"} and model.config.label2id == {"0": 0, "1": 1}
        ids.append(AutoTokenizer.from_pretrained(folder)("A fine film.")["input_ids"])
        card = (folder / "README.md").read_text()
        assert card.startswith("---\n") and "embedded demonstration" in card and "metadistil" in card
    assert ids[1] != ids[2]


def test_plain_transformers_agrees(finished):
    """The student as anybody loads it, one text at a time, against the padded batches of the run."""
    model = AutoModelForSequenceClassification.from_pretrained(finished / "student").eval()
    tokenizer = AutoTokenizer.from_pretrained(finished / "student")
    rows = [json.loads(line) for line in (finished / "predictions" / "test.jsonl").read_text().splitlines()]
    right = []
    for row in rows:
        with torch.no_grad():
            given = tokenizer(row["text"], truncation=True, max_length=16, return_tensors="pt")
            logits = model(**given).logits[0]
        torch.testing.assert_close(logits, torch.tensor(row["logits"]), rtol=0, atol=1e-5)
        right.append(int(logits.argmax()) == row["label"])
    assert len(rows) == 12
    assert sum(right) / 12 == pytest.approx(summary(finished)["metrics"]["test"]["accuracy"], abs=1e-6)  # rounded there


def test_summary(finished):
    found = summary(finished)
    keys = {"times_smaller", "seconds", "peak_memory", "device", "versions", "git_commit"}
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
    for folder, entry in [("student", found["student"]), *((f"teachers/{t['name']}", t) for t in found["teachers"])]:
        assert sum(t.numel() for t in weights(finished / folder).values()) == entry["parameters"]


def test_metrics_and_tensorboard(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    training = [line for line in metrics(finished) if "loss" in line]
    phases = ("prepare bert", "prepare roberta", "metadistil")
    assert [(line["phase"], line["step"]) for line in training] == list(product(phases, (2, 4)))
    assert {"pilot_loss", "quiz_loss", "examples_per_second", "epoch", "lr", "lr/bert"} <= training[-1].keys()
    (file,) = (finished / "tensorboard").glob("events.*")
    events = EventAccumulator(str(file)).Reload()
    assert {"metadistil/loss", "metadistil/validation/accuracy"} <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("metadistil/quiz_loss")] == [2, 4]


# Teachers


def test_prepared_teachers_are_the_same_in_any_company_and_reused(data, finished, tmp_path):
    cache = tmp_path / "cache"
    changes = {"method": "kd", "seed": 1, "max_steps": 1, "cache_dir": cache}
    first, said = succeed_saying(data, tmp_path / "first", **changes)
    assert "reused" not in said
    (file,) = (cache / "teachers").iterdir()
    beside_roberta, _ = checkpoint.load(finished.parent / "cache" / "teachers" / file.name)
    alone, _ = checkpoint.load(file)
    assert all(torch.equal(alone[name], beside_roberta[name]) for name in alone)
    second, said = succeed_saying(data, tmp_path / "second", **changes)
    assert said.count("Teacher bert: reused, prepared before with the same data and settings") == 1
    file.write_bytes(b"damaged")
    again = succeed(data, tmp_path / "again", **changes)
    origins = [summary(run)["teachers"][0]["origin"] for run in (first, second, again)]
    assert origins == ["fine-tuned", "reused", "fine-tuned"]
    assert_same_models(first, second)
    assert_same_models(first, again)


@pytest.fixture(scope="module")
def taught(data, finished, tmp_path_factory):
    """`taught(...)`: a step of KD by a trained teacher; the run, and what it said."""

    @cache
    def run(**changes):
        settings = {"method": "kd", "max_steps": 1, "teachers": finished / "teachers" / "bert", **changes}
        return succeed_saying(data, tmp_path_factory.mktemp("taught") / "run", **settings)

    return run


@pytest.mark.parametrize("retrain", [None, True])
def test_a_trained_head_is_used_unless_it_is_to_be_trained_anew(retrain, taught, finished):
    teacher = finished / "teachers" / "bert"
    run, said = taught(retrain_teachers=True) if retrain else taught()
    (entry,) = summary(run)["teachers"]
    assert (entry["origin"], entry["source"]) == ("fine-tuned" if retrain else "as given", str(teacher))
    assert ("its trained head is used as it is (--retrain-teachers changes that)" in said) == (not retrain)
    assert ("prepare bert" in summary(run)["phases"]) == bool(retrain)
    given, kept = weights(teacher), weights(run / "teachers" / entry["name"])
    assert all(torch.equal(given[name], kept[name]) for name in given) == (not retrain)


# The same again, and not the same


def test_its_config_repeats_a_run(finished, tmp_path):
    """Nothing is shared with the first, not even its cache."""
    words = ["--config", finished / "config.yaml", "--cache-dir", tmp_path / "cache", "--output", tmp_path / "same"]
    assert job([str(word) for word in words]) == 0
    assert_same_models(finished, tmp_path / "same")


def test_another_seed(taught):
    """Makes another student, measured on the same examples."""
    runs = [run for run, _ in (taught(), taught(seed=6))]
    first, second = (weights(run / "student") for run in runs)
    assert not all(torch.equal(first[name], second[name]) for name in first)
    files = [(run / "predictions" / "test.jsonl").read_text().splitlines() for run in runs]
    assert [json.loads(line)["text"] for line in files[0]] == [json.loads(line)["text"] for line in files[1]]


@pytest.mark.slow
def test_exact_meta_gradient_agrees_with_the_oracle(data, tmp_path):
    runs = [succeed(data, tmp_path / kind, meta_grad=kind, max_steps=4, teachers="bert,roberta", pilot_steps=2)
            for kind in ("exact", "double_backward")]  # fmt: skip
    for name in ("teachers/bert", "teachers/roberta", "student"):
        exact, oracle = (weights(run / name) for run in runs)
        distance = sum(float((exact[k] - oracle[k]).square().sum()) for k in exact) ** 0.5
        assert distance / sum(float(t.square().sum()) for t in oracle.values()) ** 0.5 < 1e-4  # float32


def test_a_loss_that_is_not_finite_is_an_error(data, tmp_path, capsys):
    assert main(flags(data, tmp_path / "run", method="finetune", lr=1e30, epochs=3)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: The loss of 'finetune' was not finite in the last ") and error.count("\n") == 1
    assert "lower --lr" in error
    assert not (tmp_path / "run" / "summary.json").exists()


def test_updates_that_are_not_finite_are_left_out_and_counted(data, tmp_path, monkeypatch):
    """Two of twelve batches have labels that no loss is finite for: the run goes on, and its weights stay finite."""
    taken, hard = [], Objective.hard

    def spoilt(self, student, labels):
        if student.requires_grad:
            taken.append(len(taken))
        bad = student.requires_grad and taken[-1] in (3, 7)
        return hard(self, student, labels) * (float("inf") if bad else 1.0)

    monkeypatch.setattr(Objective, "hard", spoilt)
    run, said = succeed_saying(data, tmp_path / "run", method="finetune", epochs=3, log_steps=6)
    said = " ".join(said.split())
    assert "finetune: 1 update up to step 4 left out because the gradient was not finite (1 so far)" in said
    assert "finetune: 1 update up to step 8 left out" in said and "(2 so far)" in said
    assert summary(run)["phases"]["finetune"]["skipped"] == 2
    assert all(t.isfinite().all() for t in weights(run / "student").values())
    rows = [row for row in metrics(run) if "loss" in row]
    assert len(rows) == 4 and all(0 < row["loss"] < 10 for row in rows)  # means of what was finite


def test_rounds_that_are_not_finite_count_until_one_is():
    tally, learner = Tally(), SimpleNamespace(skipped=torch.tensor(2.0), below_eps=None)
    found = []
    for values in ([1.0, float("nan"), 3.0], [float("inf")], [float("nan"), float("nan")], [5.0]):
        for value in values:
            tally.add({"loss": torch.tensor(value), "lr": torch.tensor(0.5)})
        found.append(tally.read([learner, SimpleNamespace(skipped=None, below_eps=None)]))
    nothing = {"lr": 0.5}
    assert found == [(nothing | {"loss": 2}, 0, 2), (nothing, 1, 0), (nothing, 3, 0), (nothing | {"loss": 5}, 0, 0)]
    assert tally.rounds == 7
