"""Trackers get the run by their own clients, in a thread of their own, and cannot stop it."""

import importlib.util
import json
import re
import threading
import time
from types import SimpleNamespace

import fake_trackers
import pytest
from run_helpers import assert_same_models, flags, metrics, sentences, succeed, table

from engine.config import Config, TelemetryConfig
from engine.errors import UserError
from engine.telemetry import trackers
from engine.telemetry.monitor import Monitor
from engine.telemetry.sinks import Run
from engine.train import main

NAMES = ["wandb", "mlflow", "trackio"]
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


def reported(names: str, output, *, finished: bool = True, settings=None) -> list[str]:
    """A run that logs one record; returns what it warned of."""
    warned = []
    monitor = Monitor(
        output,
        trackers.chosen(TelemetryConfig(report_to=names)),
        settings=settings or {"lr": None, "seed": 3},
        say=lambda _: None,
        warn=warned.append,
    )
    monitor.log("warm up", 20, VALUES)
    monitor.close(finished)
    return warned


def test_wandb(clients, tmp_path):
    assert reported("wandb", tmp_path) == []
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
    assert reported("mlflow", tmp_path, settings=Config().to_flat() | {"text": "x" * 7000}) == []
    assert called("create_experiment") == [("metadistil",)]
    assert called("create_run") == [("7", tmp_path.name)]
    *_, (_, metrics, _) = called("log_batch")
    assert {m.key: m.value for m in metrics} == DRAWN
    assert {m.step for m in metrics} == {20}
    assert all(before * 1000 - 1 <= m.timestamp <= time.time() * 1000 for m in metrics)
    parameters = {p.key: p.value for _, _, params in called("log_batch") for p in params}
    assert parameters == {k: str(v) for k, v in Config().to_flat().items()} | {"text": "x" * 6000}
    assert called("set_terminated") == [("made-id", "FINISHED")]
    clients.calls.clear()
    reported("mlflow", tmp_path, finished=False)
    assert called("update_run") == [("made-id", "RUNNING")]
    assert not called("create_run")
    assert [params for _, _, params in called("log_batch")] == [[]]  # what MLFlow has of them cannot be changed
    assert called("set_terminated") == [("made-id", "KILLED")]


def test_mlflow_names_are_ones_it_takes(clients, tmp_path):
    monitor = Monitor(
        tmp_path, trackers.chosen(TelemetryConfig(report_to="mlflow")), say=lambda _: None, warn=pytest.fail
    )
    monitor.log("prepare org@model(1)", 1, {"loss": 1.0})
    monitor.close()
    assert [m.key for _, metrics, _ in called("log_batch") for m in metrics] == ["prepare org_model_1_/loss"]


def test_trackio(clients, tmp_path):
    assert reported("trackio", tmp_path) == []
    assert called("init") == [("metadistil", tmp_path.name, {"lr": None, "seed": 3}, "never", False, False)]
    assert called("log") == [(DRAWN, 20)]
    assert called("finish") == [()]
    clients.calls.clear()
    reported("trackio", tmp_path)
    assert called("init")[0][1:4:2] == (tmp_path.name, "allow")


def test_project_is_the_clients_own_setting(clients, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "ours")
    reported("wandb,mlflow", tmp_path)
    assert called("init")[0][0] == "mine"
    assert called("create_experiment") == [("ours",)]
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"wandb": "made-id", "mlflow": "made-id"}


def test_a_name_given_twice_is_one_tracker(clients):
    assert [sink.name for sink in trackers.chosen(TelemetryConfig(report_to="wandb, trackio,wandb"))] == [
        "wandb",
        "trackio",
    ]
    assert trackers.chosen(TelemetryConfig()) == []


@pytest.mark.parametrize("given", ["", "wandb,", "comet", "wandb,tensorboard"])
def test_unknown_tracker(clients, given):
    with pytest.raises(UserError, match="^--report-to has '.*'; it must be one or more of wandb, mlflow, trackio"):
        trackers.chosen(TelemetryConfig(report_to=given))


@pytest.mark.parametrize("found", [None, SimpleNamespace(origin=None)], ids=["nothing", "just a folder"])
@pytest.mark.parametrize(("config", "flag", "package", "install"), [
    *((TelemetryConfig(report_to=name), f"--report-to {name}", name, name) for name in NAMES),
    (TelemetryConfig(metrics_port=0), "--metrics-port", "prometheus_client", "'metadistil-engine[prometheus]'"),
])  # fmt: skip
def test_package_that_is_not_installed(monkeypatch, found, config, flag, package, install):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: found)
    said = f"{flag} needs the package {package}; install it (pip install {install}), or leave {flag} out."
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        trackers.chosen(config)


def test_tracker_that_cannot_be_imported(clients, tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text("raise RuntimeError('protobuf\\nis too old')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"wandb cannot be imported \(RuntimeError: protobuf\); repair it"):
        trackers.chosen(TelemetryConfig(report_to="wandb"))


@pytest.mark.parametrize(("name", "call"), [("wandb", "init"), ("mlflow", "create_run"), ("trackio", "init")])
def test_tracker_that_cannot_begin(clients, tmp_path, name, call):
    clients.failing[call] = ValueError("no account\nand more")
    with pytest.raises(
        UserError, match=rf"^--report-to {name} cannot begin a run \(ValueError: no account\); .* leave {name} out.$"
    ):
        reported(name, tmp_path)


@pytest.mark.parametrize(("name", "call"), [("wandb", "log"), ("mlflow", "log_batch"), ("trackio", "log")])
def test_tracker_that_fails_is_dropped_with_one_warning(clients, tmp_path, name, call):
    warned = []
    chosen = trackers.chosen(TelemetryConfig(report_to=name))
    monitor = Monitor(tmp_path, chosen, say=lambda _: None, warn=warned.append)
    clients.failing[call] = ConnectionError("gone")
    monitor.log("metadistil", 1, {"loss": 1.0})
    chosen[0]._thread.join(10)
    for step in (2, 3):
        monitor.log("metadistil", step, {"loss": 1.0})
    monitor.close()
    assert warned == [f"{name} failed (ConnectionError: gone) and gets nothing more; metrics.jsonl has everything."]
    assert [record["step"] for record in metrics(tmp_path)] == [1, 2, 3]


class Stuck:
    """A server that takes nothing until it is let go."""

    name = "wandb"

    def __init__(self):
        self.let_go, self.taken, self.closed = threading.Event(), [], []

    def start(self, run):
        pass

    def log(self, phase, step, values, time):
        self.let_go.wait(30)
        self.taken.append(step)

    def close(self, finished):
        self.closed.append(finished)


def test_a_slow_tracker_holds_nothing_up_and_gets_everything(tmp_path):
    slow = Stuck()
    background = trackers.Background(slow)
    background.start(Run(tmp_path, say=lambda _: None))
    started = time.monotonic()
    for step in range(100):
        background.log("metadistil", step, {"loss": 1.0})
    assert time.monotonic() - started < 5 and not slow.taken
    threading.Timer(0.1, slow.let_go.set).start()
    background.close(True)
    assert slow.taken == list(range(100)) and slow.closed == [True]
    assert not background._thread.is_alive()


def test_values_are_those_of_the_moment(tmp_path):
    slow = Stuck()
    slow.log = lambda phase, step, values, time: slow.let_go.wait(30) and slow.taken.append(values)
    background = trackers.Background(slow)
    background.start(Run(tmp_path, say=lambda _: None))
    values = {"loss": 1.0}
    background.log("metadistil", 1, values)
    values["loss"] = 2.0
    slow.let_go.set()
    background.close(True)
    assert slow.taken == [{"loss": 1.0}]


def test_a_tracker_that_never_answers_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "WAITING", 3)
    monkeypatch.setattr(trackers, "CLOSING_SECONDS", 0.1)
    stuck, late, warned = Stuck(), Stuck(), []
    late.name = "trackio"
    threads = [trackers.Background(each) for each in (stuck, late)]
    monitor = Monitor(tmp_path, threads, say=lambda _: None, warn=warned.append)
    for step in range(8):
        monitor.log("metadistil", step, {"loss": 1.0})
    monitor.close()
    assert sorted(text.split(" (")[0] for text in warned) == ["trackio failed", "wandb failed"]
    assert all("3 records behind" in text for text in warned)
    assert len(metrics(tmp_path)) == 8
    for each, thread in zip((stuck, late), threads, strict=True):
        each.let_go.set()
        thread._thread.join(10)
        assert not thread._thread.is_alive()


def test_the_end_of_a_run_waits_only_so_long(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "CLOSING_SECONDS", 0.2)
    stuck, warned = Stuck(), []
    monitor = Monitor(tmp_path, [trackers.Background(stuck)], say=lambda _: None, warn=warned.append)
    monitor.log("metadistil", 1, {"loss": 1.0})
    monitor.close()
    stuck.let_go.set()
    assert len(warned) == 1 and warned[0].startswith(
        "wandb could not be closed (TimeoutError: it did not take everything"
    )


def test_a_run_with_trackers_is_the_same_run(clients, tmp_path, monkeypatch, capsys):
    """Whole commands: reported to nothing, to everything, and to a tracker that breaks."""
    monkeypatch.setenv("METADISTIL_CACHE", str(tmp_path / "cache"))
    data = table(tmp_path / "d.tsv", sentences())
    plain = succeed(data, tmp_path / "plain", log_steps=2)
    with_all = succeed(data, tmp_path / "all", log_steps=2, report_to="wandb,mlflow,trackio", metrics_port=0)
    assert_same_models(plain, with_all)
    assert "Metrics: http://127.0.0.1:" in capsys.readouterr().out
    assert len(called("init")) == 2 and len(called("finish")) == 2
    assert called("set_terminated") == [("made-id", "FINISHED")]
    assert any("metadistil/quiz_loss" in data for data, *_ in called("log"))
    clients.failing["log"] = ConnectionError("gone")
    broken = succeed(data, tmp_path / "broken", log_steps=2, report_to="trackio")
    assert_same_models(plain, broken)
    assert capsys.readouterr().out.count("trackio failed (ConnectionError: gone)") == 1
    losses = [[(r["step"], r["loss"], r["quiz_loss"]) for r in metrics(run) if r["phase"] == "metadistil" and "loss" in r]
              for run in (plain, with_all, broken)]  # fmt: skip
    assert len(losses[0]) == 2 and losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("version", ["this", "older"])
def test_settings_of_telemetry_may_change_on_resume(version, tmp_path, monkeypatch, capsys):
    """And the configuration of a run from before these settings is read."""
    monkeypatch.setenv("METADISTIL_CACHE", str(tmp_path / "cache"))
    data, run = table(tmp_path / "d.tsv", sentences()), tmp_path / "run"
    log = Monitor.log

    def stopping(self, phase, step, values):
        log(self, phase, step, values)
        if phase == "finetune":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "log", stopping)
        with pytest.raises(KeyboardInterrupt):
            main(flags(data, run, method="finetune", log_steps=1))
    config = (run / "config.yaml").read_text().splitlines(keepends=True)
    older = [line for line in config if line.split(":")[0] not in ("report_to", "metrics_port", "metrics_host")]
    assert len(older) == len(config) - 3
    if version == "older":
        (run / "config.yaml").write_text("".join(older))
    capsys.readouterr()
    assert main(["--resume", "--output", str(run), "--metrics-port", "0"]) == 0
    assert "Metrics: http://127.0.0.1:" in capsys.readouterr().out
