"""Trackers get the run by their own clients, in a thread of their own, and cannot stop it."""

import importlib.util
import json
import re
import threading
import time
from operator import attrgetter
from types import SimpleNamespace
from unittest.mock import call

import fake_trackers
import pytest
from run_helpers import metrics

from engine.config import TelemetryConfig
from engine.errors import UserError
from engine.telemetry import trackers
from engine.telemetry.monitor import Monitor
from engine.telemetry.sinks import Run

VALUES = {"loss": 0.5, "seconds/data wait": 0.25, "note": "text", "flag": True}
DRAWN = {"warm up/loss": 0.5, "warm up/seconds/data wait": 0.25}


@pytest.fixture
def clients(monkeypatch):
    for name in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    return fake_trackers.install(monkeypatch)


def reported(names: str, output, *records, finished: bool = True, settings=None) -> None:
    """A run that logs these records of one phase, "warm up" where there are none, and warns of nothing."""
    chosen = trackers.chosen(TelemetryConfig(report_to=names))
    settings = settings or {"lr": None, "seed": 3}
    monitor = Monitor(output, chosen, settings=settings, say=lambda _: None, warn=pytest.fail)
    for record in records or [("warm up", 20, VALUES)]:
        monitor.log(*record)
    monitor.close(finished)


def test_wandb(clients, tmp_path):
    reported("wandb", tmp_path)
    wandb, run = clients.wandb, clients.wandb.run
    wandb.Settings.assert_called_once_with(console="off")
    wandb.init.assert_called_once_with(
        project="metadistil", dir=str(tmp_path), id=None, name=tmp_path.name, config={"lr": None, "seed": 3}, resume="allow",
        allow_val_change=True, settings=wandb.Settings.return_value,
    )  # fmt: skip
    assert run.define_metric.mock_calls == [call("warm up/step"), call("warm up/*", step_metric="warm up/step")]
    run.log.assert_called_once_with(DRAWN | {"warm up/step": 20})
    run.finish.assert_called_once_with(exit_code=0)
    reported("wandb", tmp_path, finished=False)
    assert wandb.init.call_args.kwargs["id"] == "made-id"  # the same run goes on
    run.finish.assert_called_with(exit_code=1)


def test_mlflow(clients, tmp_path):
    before, run, many = time.time(), clients.mlflow.run, {f"setting {i}": i for i in range(130)}
    reported("mlflow", tmp_path, settings=many | {"text": "x" * 7000})
    run.create_experiment.assert_called_once_with("metadistil")
    run.create_run.assert_called_once_with("7", run_name=tmp_path.name)
    *settings, last = run.log_batch.mock_calls
    assert last == call("made-id", metrics=last.kwargs["metrics"])
    assert {m.key: m.value for m in last.kwargs["metrics"]} == DRAWN
    assert all(m.step == 20 and before * 1000 - 1 <= m.timestamp <= time.time() * 1000 for m in last.kwargs["metrics"])
    parameters = [each.kwargs["params"] for each in settings]
    assert settings == [call("made-id", params=some) for some in parameters] and max(map(len, parameters)) <= 100
    assert dict(sum(parameters, [])) == {k: str(v) for k, v in many.items()} | {"text": "x" * 6000}
    run.set_terminated.assert_called_once_with("made-id", status="FINISHED")
    run.reset_mock()
    reported("mlflow", tmp_path, ("prepare org@model(1)", 1, {"loss": 1.0}), finished=False)
    run.update_run.assert_called_once_with("made-id", status="RUNNING")
    (batch,) = run.log_batch.mock_calls  # what MLFlow has of parameters cannot be changed
    assert [m.key for m in batch.kwargs["metrics"]] == [
        "prepare org_model_1_/loss"
    ]  # it takes no other letters in a name
    run.set_terminated.assert_called_once_with("made-id", status="KILLED")
    run.create_run.assert_not_called()


def test_trackio(clients, tmp_path):
    reported("trackio", tmp_path)
    first = {"project": "metadistil", "name": tmp_path.name, "config": {"lr": None, "seed": 3}, "resume": "never",
             "auto_log_gpu": False, "auto_log_cpu": False, "embed": False}  # fmt: skip
    clients.trackio.run.log.assert_called_once_with(DRAWN, step=20)
    clients.trackio.run.finish.assert_called_once_with()
    reported("trackio", tmp_path)
    again = first | {"name": "made-name", "resume": "allow"}
    assert clients.trackio.init.call_args_list == [call(**first), call(**again)]


def test_project_is_the_clients_own_setting(clients, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "ours")
    reported("wandb, mlflow,wandb", tmp_path)  # given twice, it is one tracker
    assert clients.wandb.init.call_count == 1 and clients.wandb.init.call_args.kwargs["project"] == "mine"
    clients.mlflow.run.create_experiment.assert_called_once_with("ours")
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"wandb": "made-id", "mlflow": "made-id"}


# What cannot be had, or fails


@pytest.mark.parametrize("found", [None, SimpleNamespace(origin=None)], ids=["nothing", "just a folder"])
def test_what_cannot_be_had(tmp_path, monkeypatch, found):
    """Trackers that there are not, packages that are not installed, and one that is broken."""
    for given in ("", "wandb,", "comet", "wandb,tensorboard"):
        with pytest.raises(UserError, match="^--report-to has '.*'; it must be one or more of wandb, mlflow, trackio"):
            trackers.chosen(TelemetryConfig(report_to=given))
    (tmp_path / "wandb.py").write_text("raise RuntimeError('protobuf\\nis too old')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"wandb cannot be imported \(RuntimeError: protobuf\); repair it"):
        trackers.chosen(TelemetryConfig(report_to="wandb"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: found)
    for config, flag, package, install in (
        *(
            (TelemetryConfig(report_to=name), f"--report-to {name}", name, name)
            for name in ("wandb", "mlflow", "trackio")
        ),
        (TelemetryConfig(metrics_port=0), "--metrics-port", "prometheus_client", "'metadistil-engine[prometheus]'"),
    ):
        said = f"{flag} needs the package {package}; install it (pip install {install}), or leave {flag} out."
        with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
            trackers.chosen(config)


@pytest.mark.parametrize("start", ["wandb.init", "mlflow.run.create_run", "trackio.init"])
def test_tracker_that_cannot_begin(clients, tmp_path, start):
    """It refuses the run; one that cannot go on is in test_telemetry_run.py."""
    name, _, _ = start.partition(".")
    attrgetter(start)(clients).side_effect = ValueError("no account\nand more")
    said = rf"^--report-to {name} cannot begin a run \(ValueError: no account\); .* leave {name} out.$"
    with pytest.raises(UserError, match=said):
        reported(name, tmp_path)


# The thread


class Stuck:
    """A tracker that takes nothing until it is let go."""

    def __init__(self, name="wandb"):
        self.name, self.let_go, self.taken, self.closed = name, threading.Event(), [], []

    def start(self, run):
        pass

    def log(self, phase, step, values, time):
        self.let_go.wait(30)
        self.taken.append((step, values))

    def close(self, finished):
        self.closed.append(finished)


def test_a_slow_tracker_holds_nothing_up_and_gets_everything(tmp_path):
    slow = Stuck()
    background = trackers.Background(slow)
    background.start(Run(tmp_path, say=lambda _: None))
    values = {}
    started = time.monotonic()
    for step in range(100):
        values["loss"] = step  # it gets the values of the moment
        background.log("metadistil", step, values)
    assert time.monotonic() - started < 5 and not slow.taken
    threading.Timer(0.1, slow.let_go.set).start()
    background.close(True)
    assert slow.taken == [(step, {"loss": step}) for step in range(100)] and slow.closed == [True]
    assert not background._thread.is_alive()


@pytest.mark.parametrize(("records", "said"), [
    (8, "failed (TimeoutError: it is 3 records behind)"), (1, "could not be closed (TimeoutError: it did not take everything"),
])  # fmt: skip
def test_a_tracker_that_never_answers_is_given_up(tmp_path, monkeypatch, records, said):
    """When too many records wait, or the end of the run has waited long enough."""
    monkeypatch.setattr(trackers, "WAITING", 3)
    monkeypatch.setattr(trackers, "CLOSING_SECONDS", 0.1)
    stuck, warned = [trackers.Background(Stuck(name)) for name in ("wandb", "trackio")], []
    monitor = Monitor(tmp_path, stuck, say=lambda _: None, warn=warned.append)
    for step in range(records):
        monitor.log("metadistil", step, {"loss": 1.0})
    monitor.close()
    assert len(warned) == 2 and all(any(f"{s.name} {said}" in text for text in warned) for s in stuck)
    assert len(metrics(tmp_path)) == records
    for each in stuck:
        each.tracker.let_go.set()
        each._thread.join(10)
        assert not each._thread.is_alive()
