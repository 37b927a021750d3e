"""The clients of wandb 0.31, mlflow 3.17 and trackio 0.43, as far as the engine calls them: what they are given stays in
`calls`. The parameters are some of the clients' own, under their names. `install` puts them where `import` finds them."""

import sys
from types import SimpleNamespace

calls: list[tuple] = []
failing: dict[str, Exception] = {}  # the name of a call -> what it raises


def install(monkeypatch, folder) -> None:
    """Importable packages `wandb`, `mlflow` and `trackio` in `folder`; nothing is left of a call before."""
    calls.clear()
    failing.clear()
    for name, content in {"wandb": "init, Settings = Wandb.init, Wandb.Settings", "trackio": "init = Trackio.init",
                          "mlflow": "entities, MlflowClient = Mlflow, MlflowClient"}.items():  # fmt: skip
        (folder / f"{name}.py").write_text(f"from fake_trackers import *\n{content}\n")
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(folder)


def forget() -> None:
    for name in ("wandb", "mlflow", "trackio"):
        sys.modules.pop(name, None)


def note(name: str, *given) -> None:
    if name in failing:
        raise failing[name]
    calls.append((name, *given))


class Wandb:
    id = "made-id"

    class Settings:
        def __init__(self, console="auto"):
            self.console = console

    @staticmethod
    def init(*, project, dir, id, name, config, resume, allow_val_change, settings):
        note("init", project, dir, id, name, config, resume, allow_val_change, settings.console)
        return Wandb()

    def define_metric(self, name, step_metric=None):
        note("define_metric", name, step_metric)

    def log(self, data):
        note("log", data)

    def finish(self, exit_code):
        note("finish", exit_code)


class Trackio:
    def __init__(self, name):
        self.name = name

    @staticmethod
    def init(*, project, name, config, resume, auto_log_gpu, auto_log_cpu, embed):
        note("init", project, name, config, resume, auto_log_gpu, auto_log_cpu)
        return Trackio(name)

    def log(self, metrics, step):
        note("log", metrics, step)

    def finish(self):
        note("finish")


class Mlflow:
    """mlflow.entities."""

    class Metric(SimpleNamespace):
        def __init__(self, key, value, timestamp, step):
            super().__init__(key=key, value=value, timestamp=timestamp, step=step)

    class Param(SimpleNamespace):
        def __init__(self, key, value):
            super().__init__(key=key, value=value)


class MlflowClient:
    def get_experiment_by_name(self, name):
        note("get_experiment_by_name", name)

    def create_experiment(self, name):
        note("create_experiment", name)
        return "7"

    def create_run(self, experiment_id, run_name):
        note("create_run", experiment_id, run_name)
        return SimpleNamespace(info=SimpleNamespace(run_id="made-id"))

    def log_batch(self, run_id, metrics=(), params=()):
        assert len(params) <= 100 and len(metrics) <= 1000
        note("log_batch", run_id, list(metrics), list(params))

    def update_run(self, run_id, status):
        note("update_run", run_id, status)

    def set_terminated(self, run_id, status):
        note("set_terminated", run_id, status)
