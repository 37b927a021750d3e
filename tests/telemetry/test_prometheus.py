"""The page for Prometheus, read by prometheus_client's own parsers."""

import socket
import threading
import urllib.request

import prometheus_client
import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from engine.errors import UserError
from engine.telemetry.families import GROUPS, MACHINE, SINGLE, sample
from engine.telemetry.monitor import Monitor
from engine.telemetry.prometheus import Prometheus
from engine.telemetry.sinks import Run


def endpoint(port: int = 0, host: str = "127.0.0.1") -> Prometheus:
    return Prometheus(prometheus_client, port, host)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A started endpoint at a free port, what it said and warned, closed afterwards."""
    sink, said, warned = endpoint(), [], []
    sink.start(Run(tmp_path_factory.mktemp("run-1"), {"method": "kd"}, said.append, warned.append))
    sink.said, sink.warned = said, warned
    yield sink
    sink.close(True)


def fetch(sink, accept: str = "") -> tuple[str, str]:
    """The page and its content type."""
    request = urllib.request.Request(sink.address, headers={"Accept": accept} if accept else {})
    with urllib.request.urlopen(request, timeout=10) as response:
        return response.read().decode(), response.headers["Content-Type"]


def samples(families) -> dict[tuple[str, frozenset], float]:
    """Name without prefix and labels of every sample to its value; none comes twice."""
    found = [
        (s.name.removeprefix("metadistil_"), frozenset(s.labels.items()), s.value) for f in families for s in f.samples
    ]
    values = {(name, labels): value for name, labels, value in found}
    assert len(values) == len(found)
    return values


def of(family: str, **labels: str) -> tuple[str, frozenset]:
    return family, frozenset(labels.items())


# Every kind of key of metrics.jsonl, and where it goes
KEYS = {
    "loss": ("loss", {}),
    "quiz_loss": ("quiz_loss", {}),
    "weight_2": ("teacher_weight", {"teacher": "2"}),
    "lr": ("learning_rate", {}),
    "lr/bert": ("teacher_learning_rate", {"teacher": "bert"}),
    "seconds/data wait": ("seconds", {"section": "data wait"}),
    "memory/JVP": ("memory_bytes", {"section": "JVP"}),
    "memory/allocated": ("memory_allocated_bytes", {}),
    "joules/pilot": ("joules", {"section": "pilot"}),
    "joules_per_step": ("joules_per_step", {}),
    "time": ("logged_timestamp_seconds", {}),
    "validation/f1": ("validation", {"metric": "f1"}),
    "drift/bert2": ("drift", {"teacher": "bert2"}),
    "something/else": ("value", {"name": "something/else"}),
    "Odd name": ("value", {"name": "Odd name"}),
    "weight_x": ("value", {"name": "weight_x"}),
}


def test_every_key_has_its_family(served):
    """In both formats that Prometheus asks for."""
    kinds = {key: i + 0.5 for i, key in enumerate(KEYS)} | {"text": "x", "flag": True, "none": None}
    served.log("metadistil", 40, kinds | dict.fromkeys(MACHINE, 2.0))
    text, kind = fetch(served)
    found = samples(text_string_to_metric_families(text))
    assert kind.startswith("text/plain; version=0.0.4")
    expected = {of(family, phase="metadistil", **labels): i + 0.5 for i, (family, labels) in enumerate(KEYS.values())}
    expected |= {of(family): 2.0 for family, _ in MACHINE.values()} | {of("step", phase="metadistil"): 40}
    assert found == expected | {of("run_info", run="run-10", method="kd"): 1}
    text, kind = fetch(served, accept="application/openmetrics-text; version=1.0.0")
    assert kind.startswith("application/openmetrics-text")
    assert samples(openmetrics.text_string_to_metric_families(text)) == found


def test_no_two_keys_share_a_sample():
    keys = [*SINGLE, *MACHINE, *KEYS, *(f"{group}/x" for group in GROUPS), "value", "seconds", "run_info", "x_loss", "x/loss",
            "step_seconds/x", "pilot loss", "pilot-loss", "memory", "weight_1", "weight_01", "teacher_weight"]  # fmt: skip
    keys = list(dict.fromkeys(keys))
    where = [sample("p", key) for key in keys]
    assert len({(each.family, each.labels) for each in where}) == len(keys)
    assert len({each.family for each in where}) == len({each[:2] for each in where})  # one help text a family


def test_a_phase_that_is_over_keeps_what_stays_true():
    first = {"loss": 0.5, "examples_per_second": 9.0, "epoch": 3.0, "validation/f1": 0.75, "seconds/pilot": 1.0}
    sink = endpoint()
    sink.log("prepare", 20, first | {"host/cpu": 80, "drift/bert": 0.1})
    sink.log("metadistil", 4, {"loss": 0.25})
    _, *families = sink.collect()
    assert samples(families) == {
        of("step", phase="prepare"): 20, of("epoch", phase="prepare"): 3.0, of("drift", phase="prepare", teacher="bert"): 0.1,
        of("validation", phase="prepare", metric="f1"): 0.75, of("host_cpu_percent"): 80,
        of("step", phase="metadistil"): 4, of("loss", phase="metadistil"): 0.25,
    }  # fmt: skip


def test_a_scrape_sees_one_record():
    """Its thread may be in the middle of the figures when the next ones come."""
    sink = endpoint()
    sink.log("kd", 1, {"loss": 1.0})
    kept, seen = dict(sink._newest), sink._newest
    sink.log("kd", 2, {"loss": 2.0, "lr": 1.0})
    assert seen == kept != sink._newest


# The server


def test_it_listens_on_this_machine_only_unless_asked(served, tmp_path):
    assert served._server.socket.getsockname()[0] == "127.0.0.1"
    assert served.said == [f"Metrics: http://127.0.0.1:{served._server.server_port}/metrics"] and served.warned == []
    sink, warned = endpoint(host="0.0.0.0"), []
    sink.start(Run(tmp_path, say=lambda _: None, warn=warned.append))
    try:
        assert sink.address.startswith("http://127.0.0.1:") and fetch(sink)
    finally:
        sink.close(True)
    assert len(warned) == 1 and "anybody who reaches it can read" in warned[0]


def test_a_port_that_is_taken(served, tmp_path):
    port = served._server.server_port
    with pytest.raises(UserError, match=rf"^--metrics-port {port} at .* \(Address already in use\); give another --metrics-port"):  # fmt: skip
        endpoint(port)
    assert fetch(served)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
    late = endpoint(port)
    with socket.create_server(("127.0.0.1", port)), pytest.raises(UserError, match=f"^--metrics-port {port} "):
        Monitor(tmp_path, [late], say=pytest.fail, warn=pytest.fail)


@pytest.mark.parametrize("host", ["192.0.2.1", "256.256.256.256.", "a" * 70 + ".b", "", "a b"])
def test_a_host_that_is_not_ours(host, monkeypatch):
    real = socket.getaddrinfo
    asked = lambda name, *rest, **more: real(name, *rest, **{**more, "flags": socket.AI_NUMERICHOST})  # noqa: E731 - no name server
    monkeypatch.setattr(socket, "getaddrinfo", asked)
    with pytest.raises(UserError, match=r"^--metrics-port 0 at --metrics-host .*; give another --metrics-host\.$"):
        endpoint(0, host)


def test_closing_frees_the_port_and_ends_the_thread(tmp_path, capfd):
    """A client that says nothing does not hold it up, and one that hangs up leaves nothing on the console."""
    before = set(threading.enumerate())
    sink = endpoint()
    sink.start(Run(tmp_path, say=lambda _: None))
    address = sink._server.server_address
    (thread,) = set(threading.enumerate()) - before
    with socket.create_connection(address) as rude:
        rude.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # reset the connection
        rude.sendall(b"GET /metrics HTTP/1.0\r\n")
    with socket.create_connection(address):
        fetch(sink)
        assert all(each.daemon for each in set(threading.enumerate()) - before)
        sink.close(True)
        sink.close(True)
        assert not thread.is_alive()
        with pytest.raises(OSError):
            socket.create_connection(address).close()
        endpoint(address[1])
    assert capfd.readouterr() == ("", "")
