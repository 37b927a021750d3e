"""Trackers get the run by their own clients, in a thread of their own, and cannot stop it."""

import importlib.util
import json
import re
import threading
import time
from types import SimpleNamespace

import fake_trackers
import pytest
from run_helpers import metrics

from engine.config import Config, TelemetryConfig
from engine.errors import UserError
from engine.telemetry import trackers
from engine.telemetry.monitor import Monitor
from engine.telemetry.sinks import Run

VALUES = {"loss": 0.5, "seconds/data wait": 0.25, "note": "text", "flag": True}
DRAWN = {"warm up/loss": 0.5, "warm up/seconds/data wait": 0.25}


@pytest.fixture
def clients(tmp_path_factory, monkeypatch):
    for name in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    fake_trackers.install(monkeypatch, tmp_path_factory.mktemp("clients"))
    yield fake_trackers
    fake_trackers.forget()


def called(name: str) -> list[tuple]:
    return [call[1:] for call in fake_trackers.calls if call[0] == name]


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
    assert called("init") == [
        ("metadistil", str(tmp_path), None, tmp_path.name, {"lr": None, "seed": 3}, "allow", True, "off")
    ]
    assert called("define_metric") == [("warm up/step", None), ("warm up/*", "warm up/step")]
    assert called("log") == [(DRAWN | {"warm up/step": 20},)]
    assert called("finish") == [(0,)]
    clients.calls.clear()
    reported("wandb", tmp_path, finished=False)
    assert called("init")[0][2] == "made-id"  # the same run goes on
    assert called("finish") == [(1,)]


def test_mlflow(clients, tmp_path):
    before = time.time()
    reported("mlflow", tmp_path, settings=Config().to_flat() | {"text": "x" * 7000})
    assert called("create_experiment") == [("metadistil",)]
    assert called("create_run") == [("7", tmp_path.name)]
    *_, (_, metrics, _) = called("log_batch")
    assert {m.key: m.value for m in metrics} == DRAWN and {m.step for m in metrics} == {20}
    assert all(before * 1000 - 1 <= m.timestamp <= time.time() * 1000 for m in metrics)
    parameters = {p.key: p.value for _, _, params in called("log_batch") for p in params}
    assert parameters == {k: str(v) for k, v in Config().to_flat().items()} | {"text": "x" * 6000}
    assert called("set_terminated") == [("made-id", "FINISHED")]
    clients.calls.clear()
    reported("mlflow", tmp_path, ("prepare org@model(1)", 1, {"loss": 1.0}), finished=False)
    assert called("update_run") == [("made-id", "RUNNING")] and not called("create_run")
    ((_, metrics, params),) = called("log_batch")
    assert params == []  # what MLFlow has of them cannot be changed
    assert [m.key for m in metrics] == ["prepare org_model_1_/loss"]  # it takes no other letters in a name
    assert called("set_terminated") == [("made-id", "KILLED")]


def test_trackio(clients, tmp_path):
    reported("trackio", tmp_path)
    assert called("init") == [("metadistil", tmp_path.name, {"lr": None, "seed": 3}, "never", False, False)]
    assert called("log") == [(DRAWN, 20)]
    assert called("finish") == [()]
    clients.calls.clear()
    reported("trackio", tmp_path)
    assert called("init")[0][1:4:2] == (tmp_path.name, "allow")


def test_project_is_the_clients_own_setting(clients, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "ours")
    reported("wandb, mlflow,wandb", tmp_path)  # given twice, it is one tracker
    assert [project for project, *_ in called("init")] == ["mine"] and called("create_experiment") == [("ours",)]
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"wandb": "made-id", "mlflow": "made-id"}


# What cannot be had, or fails


@pytest.mark.parametrize("found", [None, SimpleNamespace(origin=None)], ids=["nothing", "just a folder"])
def test_what_cannot_be_had(clients, tmp_path, monkeypatch, found):
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


@pytest.mark.parametrize(("name", "start"), [("wandb", "init"), ("mlflow", "create_run"), ("trackio", "init")])
def test_tracker_that_cannot_begin(clients, tmp_path, name, start):
    """It refuses the run; one that cannot go on is in test_telemetry_run.py."""
    clients.failing[start] = ValueError("no account\nand more")
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
