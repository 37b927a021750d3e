"""Stand-ins for the clients of wandb 0.31, mlflow 3.17 and trackio 0.43: mocks, which keep what they are given."""

import sys
from importlib.machinery import ModuleSpec
from types import SimpleNamespace
from unittest.mock import Mock


def metric(key, value, timestamp, step):
    return SimpleNamespace(key=key, value=value, timestamp=timestamp, step=step)


def install(monkeypatch) -> SimpleNamespace:
    """`import` finds them as long as the test runs. Returns the modules by their names, and of each `run`, what a run's records
    go to."""
    for name in ("wandb", "mlflow", "trackio"):
        monkeypatch.setitem(sys.modules, name, Mock(__spec__=ModuleSpec(name, None, origin="a mock")))
    found = SimpleNamespace(**{name: sys.modules[name] for name in ("wandb", "mlflow", "trackio")})
    found.wandb.run, found.trackio.run = found.wandb.init.return_value, found.trackio.init.return_value
    found.wandb.run.id, found.trackio.run.name = "made-id", "made-name"
    found.mlflow.run = found.mlflow.MlflowClient.return_value
    found.mlflow.run.get_experiment_by_name.return_value = None
    found.mlflow.run.create_experiment.return_value = "7"
    found.mlflow.run.create_run.return_value.info.run_id = "made-id"
    found.mlflow.entities = SimpleNamespace(Metric=metric, Param=lambda key, value: (key, value))
    return found
