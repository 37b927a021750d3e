"""Experiment trackers, each through its own client: Weights & Biases, MLflow and Trackio.

A client is imported only where `--report-to` names it. Where it sends to (a server, an account, offline) is the client's
own configuration: WANDB_MODE, MLFLOW_TRACKING_URI, TRACKIO_SPACE_ID and so on. A resumed run goes on in the tracker's run
that it began; the stretch after its checkpoint is there twice, since no client can take back what it has.

accelerate speaks to the same clients, but from the thread that trains, where a server that is away holds up the steps.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from queue import Full, Queue
from types import ModuleType
from typing import Any, Protocol

from engine.config import TelemetryConfig
from engine.errors import UserError
from engine.telemetry.prometheus import Prometheus
from engine.telemetry.sinks import Run, Sink, cause, numbers

PROJECT = "metadistil"
WAITING = 1000  # records that a tracker may be behind before it is given up: hours of logging
CLOSING_SECONDS = 60.0  # how long the end of a run waits for a tracker


def chosen(config: TelemetryConfig) -> list[Sink]:
    """The sinks that the flags ask for, not yet started; raises UserError where one cannot be had."""
    names = [name.strip() for name in config.report_to.split(",")] if config.report_to is not None else []
    for name in names:
        if name not in CLIENTS:
            raise UserError(
                f"--report-to has {name!r}; it must be one or more of {', '.join(CLIENTS)}, comma-separated."
            )
    sinks: list[Sink] = [
        Background(CLIENTS[name](_client(name, f"--report-to {name}", name))) for name in dict.fromkeys(names)
    ]
    if config.metrics_port is not None:
        client = _client("prometheus_client", "--metrics-port", "'metadistil-engine[prometheus]'")
        sinks.append(Prometheus(client, config.metrics_port, config.metrics_host))
    elif config.metrics_host != TelemetryConfig.metrics_host:
        raise UserError(
            f"--metrics-host {config.metrics_host} needs --metrics-port; give a port, or 0 for any free one."
        )
    return sinks


def _client(package: str, flag: str, install: str) -> ModuleType:
    """The package that `flag` needs; `install` is what pip is to be given."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:  # without origin: just a folder of that name, as clients leave behind
        raise UserError(f"{flag} needs the package {package}; install it (pip install {install}), or leave {flag} out.")
    try:
        return importlib.import_module(package)
    except Exception as e:  # broken installations raise anything
        raise UserError(
            f"{flag}: the package {package} cannot be imported ({cause(e)}); repair it, or leave {flag} out.") from e  # fmt: skip


class Tracker(Protocol):
    """A client's run. `time` is when a record was made, in seconds since 1970."""

    name: str

    def start(self, run: Run) -> None: ...

    def log(self, phase: str, step: int, values: Mapping[str, Any], time: float) -> None: ...

    def close(self, finished: bool) -> None: ...


class Background:
    """Hands a tracker its records in a thread of their own: a server that is slow or away must not hold up a step."""

    def __init__(self, tracker: Tracker):
        self.name, self.tracker = tracker.name, tracker
        self._queue: Queue[tuple | None] = Queue(WAITING)
        self._failure: Exception | None = None
        self._abandoned = self._finished = False

    def start(self, run: Run) -> None:
        """Raises UserError where the tracker cannot begin: whoever asked for it should know before the training."""
        run.say(f"Reporting to {self.name}.")  # before: a client tries for minutes to reach a server that is away
        try:
            self.tracker.start(run)
        except UserError:
            raise
        except Exception as e:
            raise UserError(
                f"--report-to {self.name} cannot begin a run ({cause(e)}); set the client up, or leave {self.name} out.") from e  # fmt: skip
        self._thread = threading.Thread(target=self._work, name=f"report to {self.name}", daemon=True)
        self._thread.start()

    def log(self, phase: str, step: int, values: Mapping[str, Any]) -> None:
        self._raise_failure()
        try:
            self._queue.put_nowait((phase, step, dict(values), time.time()))
        except Full:
            self._abandoned = True
            raise TimeoutError(f"it is {WAITING} records behind") from None

    def rewind(self, phase: str, step: int) -> None:
        self._raise_failure()

    def close(self, finished: bool) -> None:
        """Waits until everything is sent, for a minute at most."""
        self._finished = finished
        end = time.monotonic() + CLOSING_SECONDS
        if self._failure is None and not self._abandoned:
            with suppress(Full):  # then the thread is stuck, and alive below
                self._queue.put(None, timeout=CLOSING_SECONDS)
            self._thread.join(max(0.0, end - time.monotonic()))
            if self._thread.is_alive():
                self._abandoned = True
                raise TimeoutError(f"it did not take everything within {CLOSING_SECONDS:.0f} seconds")
        self._raise_failure()

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            self._abandoned = True
            raise failure

    def _work(self) -> None:
        try:
            while (record := self._queue.get()) is not None and not self._abandoned:
                self.tracker.log(*record[:3], time=record[3])
            self.tracker.close(self._finished)
        except Exception as e:  # noqa: BLE001 - told to the thread that trains, at its next record
            self._failure = e
            with suppress(Exception):
                self.tracker.close(False)


class Wandb:
    """Weights & Biases, wandb 0.31: a step of its own for every phase, since wandb's only counts up."""

    name = "wandb"

    def __init__(self, client: ModuleType):
        self._client, self._phases = client, set()

    def start(self, run: Run) -> None:
        self._run = self._client.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), dir=str(run.output), name=run.name, config=dict(run.settings),
            id=run.remembered(self.name), resume="allow", allow_val_change=True,  # settings that may differ on --resume
            settings=self._client.Settings(console="off"),  # it would record a live display as thousands of lines
        )  # fmt: skip
        run.remember(self.name, self._run.id)

    def log(self, phase: str, step: int, values: Mapping[str, Any], time: float) -> None:
        if phase not in self._phases:
            self._phases.add(phase)
            self._run.define_metric(f"{phase}/step")
            self._run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
        self._run.log({f"{phase}/{name}": value for name, value in numbers(values).items()} | {f"{phase}/step": step})

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class Mlflow:
    """MLflow 3.17, by its client object: the `mlflow.log_...` functions keep a run for each thread."""

    name = "mlflow"
    PARAMETERS, LENGTH = 100, 6000  # of one request, and of one parameter: mlflow.utils.validation

    def __init__(self, client: ModuleType):
        self._entities, self._client = client.entities, client.MlflowClient()

    def start(self, run: Run) -> None:
        if (known := run.remembered(self.name)) is not None:
            self._id = known
            self._client.update_run(known, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment is not None else self._client.create_experiment(name)
        self._id = self._client.create_run(number, run_name=run.name).info.run_id
        run.remember(self.name, self._id)
        settings = [self._entities.Param(key, str(value)[: self.LENGTH]) for key, value in run.settings.items()]
        for first in range(0, len(settings), self.PARAMETERS):
            self._client.log_batch(self._id, params=settings[first : first + self.PARAMETERS])

    def log(self, phase: str, step: int, values: Mapping[str, Any], time: float) -> None:
        metrics = [
            self._entities.Metric(re.sub(r"[^\w\-. :/]", "_", f"{phase}/{name}"), float(value), int(time * 1000), step)
            for name, value in numbers(values).items()
        ]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self._id, status="FINISHED" if finished else "KILLED")


class Trackio:
    """Trackio 0.43. Its own sampling is off: what it would sample is among our figures."""

    name = "trackio"

    def __init__(self, client: ModuleType):
        self._client = client

    def start(self, run: Run) -> None:
        known = run.remembered(self.name)
        self._run = self._client.init(
            project=PROJECT, name=known or run.name, config=dict(run.settings),
            resume="never" if known is None else "allow", auto_log_gpu=False, auto_log_cpu=False, embed=False,
        )  # fmt: skip
        run.remember(self.name, self._run.name)

    def log(self, phase: str, step: int, values: Mapping[str, Any], time: float) -> None:
        self._run.log({f"{phase}/{name}": value for name, value in numbers(values).items()}, step=step)

    def close(self, finished: bool) -> None:
        self._run.finish()


CLIENTS = {"wandb": Wandb, "mlflow": Mlflow, "trackio": Trackio}
