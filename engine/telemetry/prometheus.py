"""The newest figures of a run as a page that Prometheus reads while the run trains, served by prometheus_client."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Iterator, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

from engine.errors import UserError
from engine.telemetry.families import LASTING, PREFIX, Sample, sample
from engine.telemetry.sinks import Run, numbers


class Prometheus:
    """A sink that serves /metrics at `host`:`port` from a daemon thread; port 0 takes any free one.

    It is a collector of prometheus_client: a scrape asks it for all figures at once.

    Args:
        client: the module prometheus_client

    Raises UserError, on construction and again in `start`, where the port or the host cannot be had.
    """

    name = "the metrics endpoint"

    def __init__(self, client: ModuleType, port: int, host: str):
        self._client, self._port, self._host = client, port, host
        self._families = import_module("prometheus_client.core")
        self._server: Any = None
        self._run: dict[str, str] = {}
        self._phase: str | None = None
        self._newest: dict[Sample, float] = {}  # replaced, never changed: a scrape sees the figures of one record
        try:  # here too, since models take a while to load before the server starts
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, _, _, _, address = found[0]
            with socket.socket(family) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that wind up do not matter
                probe.bind(address)
        except (OSError, UnicodeError) as e:  # UnicodeError: no host can have that name
            raise self._refusal(e) from e

    @property
    def address(self) -> str:
        """The URL that reaches the page from this machine."""
        host, port = self._server.server_address[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/metrics"

    def start(self, run: Run) -> None:
        self._run = {"run": run.name, "method": str(run.settings.get("method", ""))}
        # Not the client's global registry, which has figures of the Python process, and would keep those of an earlier run.
        registry = self._client.CollectorRegistry()
        registry.register(self)
        try:
            self._server, self._thread = self._client.start_http_server(self._port, self._host, registry)
        except OSError as e:  # somebody took the port since the construction
            raise self._refusal(e) from e
        self._server.handle_error = lambda *_: None  # a client that hung up would leave a traceback on the console
        run.say(f"Metrics: {self.address}")
        if not ipaddress.ip_address(self._server.server_address[0].partition("%")[0]).is_loopback:
            run.warn(
                f"--metrics-host {self._host} is not this machine alone: anybody who reaches it can read the metrics."
            )

    def log(self, phase: str, step: int, values: Mapping[str, Any]) -> None:
        """Take new values. Of a phase that is over only what stays true of it is kept."""
        newest = dict(self._newest)
        if phase != self._phase:
            over = ("phase", self._phase)
            newest = {which: n for which, n in newest.items() if which.family in LASTING or over not in which.labels}
            self._phase = phase
        newest |= {sample(phase, key): n for key, n in {"step": step, **numbers(values)}.items()}
        self._newest = newest

    def rewind(self, phase: str, step: int) -> None:
        """Nothing to forget: a new process has only what it logs itself."""

    def close(self, finished: bool) -> None:
        """Idempotent. Takes up to half a second, the interval at which the server looks whether it is to end."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
            self._thread.join()

    def collect(self) -> Iterator[Any]:
        """The families of prometheus_client, for its registry; called in the server's threads."""
        yield self._families.InfoMetricFamily(f"{PREFIX}run", "The run: always 1.", self._run)
        gauges: dict[str, Any] = {}
        for (family, help, labels), value in self._newest.items():
            if family not in gauges:
                names = [name for name, _ in labels]
                gauges[family] = self._families.GaugeMetricFamily(PREFIX + family, help, labels=names)
            gauges[family].add_metric([text for _, text in labels], value)
        yield from gauges.values()

    def _refusal(self, error: OSError | UnicodeError) -> UserError:
        host_is_wrong = isinstance(error, socket.gaierror | UnicodeError) or error.errno == errno.EADDRNOTAVAIL
        remedy = "another --metrics-host" if host_is_wrong else "another --metrics-port, or 0 for any free one"
        why = getattr(error, "strerror", None) or "not a name of a host"
        return UserError(
            f"--metrics-port {self._port} at --metrics-host {self._host!r} cannot be opened ({why}); give {remedy}."
        )
