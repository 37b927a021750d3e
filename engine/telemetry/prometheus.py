"""A page of the newest measurements that Prometheus, or anybody with a browser, can read while a run trains."""

from __future__ import annotations

import errno
import ipaddress
import socket
import socketserver
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any

from engine.errors import UserError
from engine.telemetry.exposition import CONTENT_TYPE, Gauges
from engine.telemetry.sinks import Run

INDEX = b'<!DOCTYPE html><title>metadistil-engine</title><p>Measurements of a run: <a href="/metrics">/metrics</a>\n'
REQUEST_SECONDS = 5.0  # a client that says nothing for so long is left


class Prometheus:
    """Serves /metrics at `host`:`port` from a daemon thread; port 0 takes any free one.

    Raises UserError on construction where it cannot be had. What comes between that and `start` is seen by `start`.
    """

    name = "the metrics endpoint"

    def __init__(self, port: int, host: str):
        self._port, self._host = port, host
        self._lock = threading.Lock()
        self._server: _Server | None = None
        self._listen(port, host).server_close()

    @property
    def address(self) -> str:
        """The URL of what is served. For a host that stands for all of the machine's, one that reaches it from here."""
        host, port = self._server.server_address[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/metrics"

    def start(self, run: Run) -> None:
        self._gauges = Gauges({"run": run.name, "method": str(run.settings.get("method", ""))})
        self._server = self._listen(self._port, self._host)
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, name="metrics endpoint", daemon=True
        ).start()
        run.say(f"Metrics: {self.address}")
        if not ipaddress.ip_address(self._server.server_address[0].partition("%")[0]).is_loopback:
            run.warn(
                f"--metrics-host {self._host} is not this machine alone: anybody who reaches it can read the metrics."
            )

    def log(self, phase: str, step: int, values: Mapping[str, Any]) -> None:
        with self._lock:
            self._gauges.log(phase, step, values)

    def rewind(self, phase: str, step: int) -> None:
        """Nothing to forget: a new process has only what it logs itself."""

    def close(self, finished: bool) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()

    def _text(self) -> bytes:
        with self._lock:
            return self._gauges.text().encode()

    def _listen(self, port: int, host: str) -> _Server:
        try:
            return _Server(host, port, self._text)
        except (OSError, UnicodeError) as e:  # UnicodeError: no host can have that name
            host_is_wrong = isinstance(e, socket.gaierror | UnicodeError) or e.errno == errno.EADDRNOTAVAIL
            remedy = "another --metrics-host" if host_is_wrong else "another --metrics-port, or 0 for any free one"
            why = getattr(e, "strerror", None) or "not a name of a host"
            raise UserError(
                f"--metrics-port {port} at --metrics-host {host!r} cannot be opened ({why}); give {remedy}."
            ) from e


class _Server(socketserver.ThreadingTCPServer):
    """Without http.server's own class, which asks the name servers what this machine is called."""

    allow_reuse_address = True  # a port whose last connections are still winding up; never one that is listened on
    daemon_threads = True

    def __init__(self, host: str, port: int, text: Callable[[], bytes]):
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
        self.text = text
        self._open: set[socket.socket] = set()
        super().__init__(address, _Handler)

    def process_request(self, request: socket.socket, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: socket.socket) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: socket.socket, client_address: Any) -> None:
        """A client that hung up is no business of the run's."""

    def server_close(self) -> None:
        super().server_close()
        for request in list(self._open):  # so that no thread waits for a client that says nothing
            with suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    timeout = REQUEST_SECONDS

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            self._answer(self.server.text(), CONTENT_TYPE)
        elif path == "/":
            self._answer(INDEX, "text/html; charset=utf-8")
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def _answer(self, content: bytes, kind: str) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, format: str, *arguments: Any) -> None:
        """Not on the console of a run."""
