"""The clients of wandb 0.31, mlflow 3.17 and trackio 0.43, as far as the engine calls them: the same signatures, and
what they are given stays in `calls`. `install` puts them where `import` finds them."""

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
    def init(entity=None, project=None, dir=None, id=None, name=None, notes=None, tags=None, config=None,
             config_exclude_keys=None, config_include_keys=None, allow_val_change=None, group=None, job_type=None, mode=None,
             force=None, reinit=None, resume=None, resume_from=None, fork_from=None, save_code=None, tensorboard=None,
             sync_tensorboard=None, monitor_gym=None, settings=None, anonymous=None):  # fmt: skip
        note("init", project, dir, id, name, config, resume, allow_val_change, settings.console)
        return Wandb()

    def define_metric(self, name, step_metric=None, step_sync=None, hidden=None, summary=None, overwrite=None):
        note("define_metric", name, step_metric)

    def log(self, data, step=None, commit=None):
        note("log", data)

    def finish(self, exit_code=None):
        note("finish", exit_code)


class Trackio:
    def __init__(self, name):
        self.name = name

    @staticmethod
    def init(project, name=None, group=None, space_id=None, server_url=None, dataset_id=None, bucket_id=None, config=None,
             resume="never", settings=None, private=None, embed=True, auto_log_gpu=None, gpu_log_interval=10.0,
             auto_log_cpu=None, cpu_log_interval=10.0, webhook_url=None, webhook_min_level=None):  # fmt: skip
        note("init", project, name, config, resume, auto_log_gpu, auto_log_cpu)
        return Trackio(name)

    def log(self, metrics, step=None):
        note("log", metrics, step)

    def finish(self):
        note("finish")


class Mlflow:
    """mlflow.entities."""

    class Metric(SimpleNamespace):
        def __init__(
            self, key, value, timestamp, step, model_id=None, dataset_name=None, dataset_digest=None, run_id=None
        ):
            super().__init__(key=key, value=value, timestamp=timestamp, step=step)

    class Param(SimpleNamespace):
        def __init__(self, key, value):
            super().__init__(key=key, value=value)


class MlflowClient:
    def __init__(self, tracking_uri=None, registry_uri=None, workspace_store_uri=None):
        pass

    def get_experiment_by_name(self, name):
        note("get_experiment_by_name", name)

    def create_experiment(self, name, artifact_location=None, tags=None):
        note("create_experiment", name)
        return "7"

    def create_run(self, experiment_id, start_time=None, tags=None, run_name=None):
        note("create_run", experiment_id, run_name)
        return SimpleNamespace(info=SimpleNamespace(run_id="made-id"))

    def log_batch(self, run_id, metrics=(), params=(), tags=(), synchronous=None):
        assert len(params) <= 100 and len(metrics) <= 1000
        note("log_batch", run_id, list(metrics), list(params))

    def update_run(self, run_id, status=None, name=None):
        note("update_run", run_id, status)

    def set_terminated(self, run_id, status=None, end_time=None):
        note("set_terminated", run_id, status)
