"""Whole jobs on tiny data: what they leave behind, that they repeat themselves, and that an interruption costs nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from run_helpers import ROOT, contents, flags, run_signalled, sentences, start, succeed, table, weights
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from engine.train import main


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METADISTIL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return table(tmp_path_factory.mktemp("data") / "reviews.tsv", sentences(200))


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """One run of MetaDistil with two unlike teachers, looked at from many sides."""
    return succeed(data, tmp_path_factory.mktemp("runs") / "finished", teachers="bert,roberta", seed=1, log_steps=2)


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_models(one: Path, two: Path) -> None:
    names = ["student", *(f"teachers/{p.name}" for p in sorted((one / "teachers").glob("*")))]
    assert names == ["student", *(f"teachers/{p.name}" for p in sorted((two / "teachers").glob("*")))]
    for name in names:
        first, second = weights(one / name), weights(two / name)
        assert first.keys() == second.keys()
        different = [key for key in first if not torch.equal(first[key], second[key])]
        assert not different, (name, different)


# Jobs

JOBS = {
    "finetune": {"method": "finetune"},
    "kd": {"method": "kd"},
    "kd from two teachers": {"method": "kd", "teachers": "bert,bert2"},
    "metadistil": {"method": "metadistil"},
    "two samples, pilot of two batches": {"teachers": "bert,bert2", "pilot_steps": 2},
    "double backward": {"meta_grad": "double_backward", "pilot_steps": 2},
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


@pytest.mark.parametrize("method", ["kd", "metadistil"])
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
        "config.yaml", "metrics.jsonl", "predictions", "student", "summary.json", "teachers", "tensorboard"}  # fmt: skip
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


# Resume


def test_a_finished_run_says_so(finished, capsys):
    before = contents(finished)
    assert main(["--resume", "--output", str(finished)]) == 0
    out = capsys.readouterr().out
    assert "is finished" in out and str(finished / "summary.json") in out
    assert contents(finished) == before


LONG = {"max_steps": 40, "log_steps": 1, "checkpoint_steps": 2, "teachers": "bert,roberta", "eval_steps": 7}


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return succeed(data, folder / "run", cache_dir=folder / "cache", **LONG)


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal. Python has none for SIGTERM, so it is ours."""
    (mask,) = (line.split()[1] for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "SigCgt" in line)
    return bool(int(mask, 16) >> (number - 1) & 1)


def wait_for(run: Path, process: subprocess.Popen, phase: str, step: int) -> None:
    """Until the run has logged a step of a phase."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        file = run / "metrics.jsonl"
        lines = file.read_bytes().decode().split("\n")[:-1] if file.exists() else []
        if any(line["phase"] == phase and line["step"] >= step for line in map(json.loads, lines)):
            return
        time.sleep(0.005)
    raise AssertionError(f"{phase} never reached step {step}")


def assert_as_if_nothing_had_happened(run: Path, whole: Path) -> None:
    assert_same_models(run, whole)
    keys = [[(line["phase"], line["step"], "loss" in line) for line in metrics(r)] for r in (run, whole)]
    assert keys[0] == keys[1]
    values = [[line.get("loss") for line in metrics(r)] for r in (run, whole)]
    assert values[0] == values[1]
    assert summary(run)["metrics"] == summary(whole)["metrics"]
    assert {p.name for p in run.iterdir()} == {p.name for p in whole.iterdir()}


# Phase and step at which the process is killed, and flags that differ from LONG. The whole run has a cache of its own, so
# that a teacher that was half prepared is not found there.
KILLS = {
    "distilling": ("metadistil", 13, {}),
    "pilots of two": ("metadistil", 13, {"pilot_steps": 2}),
    "preparing the second": ("prepare roberta", 7, {"prepare_epochs": 8}),
    "warming up": ("warm up", 7, {"student_warmup_epochs": 8}),
    "kd": ("kd", 13, {"method": "kd", "max_steps": 120}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLS)
def test_kill_and_resume(name, data, tmp_path, monkeypatch, capsys):
    phase, step, changes = KILLS[name]
    run, settings = tmp_path / "run", LONG | changes
    monkeypatch.setenv("METADISTIL_CACHE", str(tmp_path / "cache of the whole"))
    whole = succeed(data, tmp_path / "whole", **settings)
    monkeypatch.setenv("METADISTIL_CACHE", str(tmp_path / "cache"))
    assert run_signalled(flags(data, run, **settings), phase, step, signal.SIGKILL).returncode == -signal.SIGKILL
    assert not (run / "summary.json").exists()
    capsys.readouterr()
    assert main(["--resume", "--output", str(run)]) == 0
    assert f"Resuming '{phase}' after step" in capsys.readouterr().out
    assert_as_if_nothing_had_happened(run, whole)


@pytest.mark.slow
def test_killed_before_the_first_checkpoint(data, tmp_path, monkeypatch, uninterrupted):
    monkeypatch.setenv("METADISTIL_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "run"
    words = flags(data, run, **LONG | {"checkpoint_steps": 1000})
    assert run_signalled(words, "metadistil", 5, signal.SIGKILL).returncode == -signal.SIGKILL
    assert main(["--resume", "--output", str(run)]) == 0
    assert_as_if_nothing_had_happened(run, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_and_resume_with_the_printed_command(number, data, tmp_path, uninterrupted, monkeypatch):
    monkeypatch.setenv("METADISTIL_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "a run's output"  # a name that a shell has to be told about
    stopped = run_signalled(flags(data, run, **LONG | {"checkpoint_steps": 1000}), "metadistil", 5, number)
    assert stopped.returncode == 128 + number
    assert "Traceback" not in stopped.stderr
    last = stopped.stdout.strip().splitlines()[-1]
    assert last.startswith(f"Stopped by {number.name}; the checkpoint is saved. Resume with: ")
    command = last.split("Resume with: ")[1]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(command, shell=True, cwd=ROOT, env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_as_if_nothing_had_happened(run, uninterrupted)


@pytest.mark.slow
def test_a_second_signal_does_not_wait_and_the_run_can_still_be_resumed(data, tmp_path, uninterrupted):
    run = tmp_path / "run"
    stopped = run_signalled(flags(data, run, **LONG), "metadistil", 9, signal.SIGINT, signal.SIGTERM)
    assert stopped.returncode == 143
    assert "Traceback" not in stopped.stderr
    assert "Resume with: python -m engine.train --resume --output" in stopped.stdout.splitlines()[-1]
    assert main(["--resume", "--output", str(run)]) == 0
    assert_same_models(run, uninterrupted)


@pytest.mark.slow
def test_a_stop_before_there_is_anything_leaves_nothing(data, tmp_path):
    process = start(flags(data, tmp_path / "run"))
    while not catches(process.pid, signal.SIGTERM):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in error
    assert out.splitlines()[-1] == "Stopped by SIGINT; nothing was written."
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_signal_with_the_last_step_keeps_the_finished_phase(data, tmp_path, uninterrupted, monkeypatch):
    """A stop while everything is trained but nothing exported: nothing is trained again."""
    monkeypatch.setenv("METADISTIL_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "run"
    words = flags(data, run, **LONG | {"checkpoint_steps": 1000})
    stopped = run_signalled(words, "metadistil", 40, signal.SIGTERM)
    assert stopped.returncode == 143 and not (run / "summary.json").exists()
    again = run_signalled(["--resume", "--output", str(run)], "metadistil", 1, signal.SIGKILL)
    assert again.returncode == 0, again.stderr  # no step of it was logged again
    assert_as_if_nothing_had_happened(run, uninterrupted)


@pytest.mark.slow
def test_resume_without_the_cache_prepares_the_teachers_again(data, tmp_path, uninterrupted, monkeypatch):
    monkeypatch.setenv("METADISTIL_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "run"
    run_signalled(flags(data, run, **LONG), "metadistil", 13, signal.SIGKILL)
    shutil.rmtree(tmp_path / "cache")
    assert main(["--resume", "--output", str(run)]) == 0
    assert_same_models(run, uninterrupted)


def test_resume_refuses_data_that_changed(data, tmp_path, capsys):
    copy, run = tmp_path / "d.tsv", tmp_path / "run"
    copy.write_bytes(Path(data).read_bytes())
    stopped = run_signalled(flags(copy, run, max_steps=40, log_steps=1), "metadistil", 3, signal.SIGINT)
    assert stopped.returncode == 130
    copy.write_text(copy.read_text().replace("The", "A"))
    assert main(["--resume", "--output", str(run)]) == 2
    assert "other models or data" in capsys.readouterr().err


def test_a_teacher_is_the_same_beside_whatever_other(data, tmp_path, monkeypatch):
    """Neither the cache nor the company of a teacher with another tokenizer changes its bits."""
    prepared = []
    for name, teachers in {"alone": "bert", "beside": "roberta,bert"}.items():
        run = succeed(
            data, tmp_path / name, teachers=teachers, method="kd", max_steps=1, cache_dir=tmp_path / f"c-{name}"
        )
        prepared.append(weights(run / "teachers" / "bert"))
    assert all(torch.equal(prepared[0][name], prepared[1][name]) for name in prepared[0])


@pytest.mark.slow
def test_an_output_is_for_one_process(data, tmp_path, capsys):
    run = tmp_path / "run"
    process = start(flags(data, run, **LONG | {"max_steps": 100_000, "eval_steps": 100_000}))
    try:
        wait_for(run, process, "metadistil", 2)
        assert main(flags(data, run, **LONG)) == 2
        assert f"--output {run} is in use" in capsys.readouterr().err
        assert main(["--resume", "--output", str(run)]) == 2
        assert f"--output {run} is in use by another process; wait for it or stop it." in capsys.readouterr().err
        before = len(metrics(run))
        wait_for(run, process, "metadistil", before + 2)  # and the first one goes on
    finally:
        process.kill()
        process.communicate()


def test_what_stood_in_is_recorded_and_repeated(data, tmp_path, monkeypatch, capsys):
    """Defaults for miniatures must not meet the real models when the hub is back."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run = succeed(data, tmp_path / "run", source="auto", method="finetune")
    assert "the hub cannot be reached (HF_HUB_OFFLINE is set)" in " ".join(capsys.readouterr().out.split())
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["source"] == "embedded" and saved["lr"] == 1e-3
