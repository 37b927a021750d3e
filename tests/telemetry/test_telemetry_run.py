"""Telemetry of whole runs: sums hold, and nothing that is learned depends on it."""

import json
import shlex

import pytest
from run_helpers import assert_same_models, flags, metrics, succeed, summary

from engine.sections import SECTIONS
from engine.telemetry.telemetry import APART
from engine.train import main

SETTINGS = {"teachers": "bert,roberta", "max_steps": 24, "log_steps": 8, "prepare_epochs": 6, "checkpoint_steps": 5}


@pytest.fixture(scope="module")
def measured(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    return succeed(data, folder / "run", cache_dir=folder / "cache", **SETTINGS)


def training(sections: dict) -> float:
    return sum(each["seconds"] for name, each in sections.items() if name not in APART)


def test_sections_add_up_to_the_steps(measured):
    records = [line for line in metrics(measured) if "step_seconds" in line]
    assert {line["phase"] for line in records} == {"prepare bert", "prepare roberta", "metadistil"}
    for line in records:
        parts = {key.removeprefix("seconds/"): s for key, s in line.items() if key.startswith("seconds/")}
        assert set(parts) <= set(SECTIONS) - set(APART)
        # a record of a few milliseconds a step: the scheduler may take some between the two readings of the clock
        assert sum(parts.values()) == pytest.approx(line["step_seconds"], rel=0.2)
    for name, found in summary(measured)["telemetry"]["phases"].items():
        assert set(found["sections"]) <= set(SECTIONS)
        assert training(found["sections"]) == pytest.approx(found["seconds"], rel=0.03 if name == "metadistil" else 0.2)


def test_examples_per_second_are_examples_over_wall_time(measured):
    lines = [line for line in metrics(measured) if line["phase"] == "metadistil" and "step_seconds" in line]
    steps = [
        b - a for a, b in zip([0, *(line["step"] for line in lines)], [line["step"] for line in lines], strict=False)
    ]
    seconds = [n * line["step_seconds"] for n, line in zip(steps, lines, strict=True)]
    examples = sum(line["examples_per_second"] * s for s, line in zip(seconds, lines, strict=True))
    assert examples == pytest.approx(24 * 16, rel=1e-3)
    found = summary(measured)["telemetry"]["phases"]["metadistil"]
    assert sum(seconds) == pytest.approx(found["seconds"], rel=0.03)
    tokens = sum(line["tokens_per_second"] * s for s, line in zip(seconds, lines, strict=True))
    assert tokens == pytest.approx(found["tokens"], rel=1e-3)


def test_every_section_of_a_meta_step_is_seen(measured):
    found = summary(measured)["telemetry"]
    assert set(found["phases"]["metadistil"]["sections"]) == set(SECTIONS)
    assert set(found["phases"]["prepare bert"]["sections"]) == {
        "data wait", "real step", "optimizer", "logging", "evaluation", "checkpoint", "other"}  # fmt: skip
    assert found["cause"] == "no NVML: the device is cpu" and found["device"] is None
    assert found["phases"]["metadistil"]["flops"] > found["phases"]["prepare bert"]["flops"] > 1e6
    # the names that sections have are the work that is done: what a meta-step does in them is most of it
    seconds = {name: each["seconds"] for name, each in found["phases"]["metadistil"]["sections"].items()}
    assert seconds["other"] < 0.1 * training(found["phases"]["metadistil"]["sections"])


def test_drift_begins_with_the_teachers_own_steps(measured):
    lines = [line for line in metrics(measured) if "drift/bert" in line]
    assert lines and all(line["phase"] == "metadistil" for line in lines)
    for name in ("bert", "roberta"):
        values = [line[f"drift/{name}"] for line in lines]
        assert all(0 < value < 0.1 for value in values) and values[0] < values[-1]


@pytest.mark.parametrize("changes", [{}, {"pilot_steps": 2}, {"method": "kd"}], ids=str)
def test_the_same_bits_without_telemetry(changes, data, tmp_path):
    settings = {"cache_dir": tmp_path / "cache", "max_steps": 4, **changes}
    on = succeed(data, tmp_path / "on", **settings)
    off = succeed(data, tmp_path / "off", telemetry="off", **settings)
    assert_same_models(on, off)
    lines = metrics(off)
    assert not [key for line in lines for key in line if key.startswith(("seconds/", "memory/", "host/", "device/"))]
    assert all(line["examples_per_second"] > 0 for line in lines if "loss" in line)
    assert summary(off)["telemetry"]["cause"] == "no NVML: --telemetry is off"


def test_a_sampler_that_fails_stops_no_run(data, tmp_path, monkeypatch):
    from engine.telemetry import host

    def fail(self):
        raise OSError("no /proc")

    monkeypatch.setattr(host.Host, "resident", fail)
    found = summary(succeed(data, tmp_path / "run", cache_dir=tmp_path / "cache", max_steps=4))
    assert "no /proc" in found["telemetry"]["cause"]
    assert training(found["telemetry"]["phases"]["metadistil"]["sections"]) > 0


def test_a_resumed_run_counts_both_parts(measured, data, tmp_path, monkeypatch):
    """Tokens are of every step once; drift goes on from where the teachers started."""
    from engine.run.trainer import Trainer

    class Stop(Exception):
        pass

    save, saves = Trainer._save, []

    def save_and_stop(self, run):
        save(self, run)
        saves.append(run.phase.name)
        if saves.count("metadistil") == 2:  # at step 10
            raise Stop

    words = flags(data, tmp_path / "run", cache_dir=tmp_path / "cache", **SETTINGS)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Trainer, "_save", save_and_stop)
        main(words)
    assert main(["--resume", "--output", str(tmp_path / "run")]) == 0
    ours, whole = (summary(run)["telemetry"]["phases"]["metadistil"] for run in (tmp_path / "run", measured))
    assert ours["tokens"] == whole["tokens"] and ours["flops"] == pytest.approx(whole["flops"], rel=0.1)
    assert training(ours["sections"]) == pytest.approx(ours["seconds"], rel=0.05)
    drifts = [
        [line["drift/bert"] for line in metrics(run) if "drift/bert" in line] for run in (tmp_path / "run", measured)
    ]
    assert drifts[0] == drifts[1]


def test_a_checkpoint_of_before_telemetry_is_read():
    from engine.run.phase import Progress

    saved = {"step": 3, "examples": 9, "seconds": 1.0, "skipped": 0, "best_step": 0, "best": {}}
    assert Progress.of(json.loads(json.dumps(saved))).costs.seconds == {}


def test_the_summary_has_the_command_and_what_was_warned_of(data, tmp_path):
    words = flags(
        data, tmp_path / "run", cache_dir=tmp_path / "cache", max_steps=4, student="bert", teachers="distilbert"
    )
    assert main(words) == 0
    found = summary(tmp_path / "run")
    assert shlex.split(found["command"]) == ["python", "-m", "engine.train", *words]
    assert any("a student is meant to be smaller" in warning for warning in found["warnings"])
