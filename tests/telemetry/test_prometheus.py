"""The page for Prometheus: its text, read by a strict parser, and the server behind it."""

import http.client
import math
import re
import socket
import threading
import urllib.error
import urllib.request

import pytest

from engine.errors import UserError
from engine.telemetry.exposition import GROUPS, MACHINE, SINGLE, Gauges, sample
from engine.telemetry.monitor import Monitor
from engine.telemetry.prometheus import Prometheus
from engine.telemetry.sinks import Run

NAME, LABEL = r"[a-zA-Z_:][a-zA-Z0-9_:]*", r"[a-zA-Z_][a-zA-Z0-9_]*"
VALUE = r"[+-]?(?:\d+\.?\d*(?:e[+-]?\d+)?|Inf|NaN)"
PAIR = rf'({LABEL})="((?:[^"\\\n]|\\[\\n"])*)"'


def unescape(text: str) -> str:
    return re.sub(r"\\(.)", lambda m: {"n": "\n"}.get(m[1], m[1]), text)


def parse(text: str) -> dict[tuple[str, frozenset], float]:
    """Prometheus' text format 0.0.4, as strict as its description: HELP and TYPE come once and before the samples of a
    family, which stand together; no sample comes twice; the last line ends."""
    assert text.endswith("\n")
    found, families, family = {}, {}, None
    for line in text[:-1].split("\n"):
        if comment := re.fullmatch(rf"# (HELP|TYPE) ({NAME}) (.+)", line):
            kind, name, rest = comment.groups()
            if kind == "HELP":
                assert name not in families, line
                assert not re.search(r"(?<!\\)(?:\\\\)*\\[^\\n]", rest), line
                family, families[name] = name, None
            else:
                assert name == family and families[name] is None and rest in ("gauge", "counter", "untyped"), line
                families[name] = rest
            continue
        match = re.fullmatch(rf"({NAME})(?:\{{((?:{PAIR})(?:,{PAIR})*)\}})? ({VALUE})", line)
        assert match, line
        name, inside, value = match[1], match[2] or "", float(match.groups()[-1])
        assert name == family and families[name] is not None, line
        pairs = re.findall(PAIR, inside)
        assert len(dict(pairs)) == len(pairs), line
        key = name.removeprefix("metadistil_"), frozenset((label, unescape(text)) for label, text in pairs)
        assert key not in found and name.startswith("metadistil_"), line
        found[key] = value
    return found


def value(found, family: str, **labels: str) -> float:
    return found[family, frozenset(labels.items())]


def gauges(*logged, run="run-1"):
    it = Gauges({"run": run, "method": "metadistil"})
    for phase, step, values in logged:
        it.log(phase, step, values)
    return parse(it.text())


def test_the_parser_is_strict():
    good = '# HELP metadistil_a Help.\n# TYPE metadistil_a gauge\nmetadistil_a{b="c"} 1\n'
    assert parse(good) == {("a", frozenset({("b", "c")})): 1.0}
    for old, new in [('"c"', '"c'), ("} 1", "}"), ("} 1", "} x"), ("{b=", "{0b="), ("# TYPE metadistil_a gauge\n", ""),
                     ('{b="c"}', '{b="c",b="d"}'), (" gauge", " number"), ('"c"', '"\\c"'), ("1\n", "1"),
                     ("Help.", "He\\lp."), ("1\n", '1\nmetadistil_a{b="c"} 1\n')]:  # fmt: skip
        assert old in good
        with pytest.raises(AssertionError):
            parse(good.replace(old, new))


# Every key of metrics.jsonl, and where it goes
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


def test_every_key_has_its_family():
    found = gauges(("metadistil", 40, {key: i + 0.5 for i, key in enumerate(KEYS)}))
    for i, (key, (family, labels)) in enumerate(KEYS.items()):
        assert value(found, family, phase="metadistil", **labels) == i + 0.5, key
    assert value(found, "step", phase="metadistil") == 40
    assert value(found, "run_info", run="run-1", method="metadistil") == 1
    assert len(found) == len(KEYS) + 2


def test_figures_of_the_machine_have_no_phase():
    found = gauges(("a", 1, dict.fromkeys(MACHINE, 1.0)), ("b", 1, {"device/power": 250.5}))
    assert value(found, "device_power_watts") == 250.5
    assert value(found, "host_resident_bytes") == 1.0
    assert all(family in {f for f, _ in MACHINE.values()} or labels for family, labels in found)


def test_no_two_keys_share_a_sample():
    keys = [*SINGLE, *MACHINE, *KEYS, *(f"{group}/x" for group in GROUPS), "value", "seconds", "run_info", "x_loss", "x/loss",
            "step_seconds/x", "pilot loss", "pilot-loss", "memory", "weight_1", "weight_01", "teacher_weight"]  # fmt: skip
    keys = list(dict.fromkeys(keys))
    where = {sample("p", key)[::2] for key in keys}
    assert len(where) == len(keys)
    helps = {}
    for key in keys:
        family, text, _ = sample("p", key)
        assert helps.setdefault(family, text) == text and text.endswith(".")


def test_values_of_every_kind():
    kinds = {
        "a/nan": math.nan,
        "a/inf": math.inf,
        "a/minus": -math.inf,
        "a/int": 2**70,
        "a/small": 5e-324,
        "a/neg": -0.25,
    }
    found = gauges(("p", 1, kinds | {"a/text": "x", "a/bool": True, "a/none": None}))
    read = {dict(labels)["name"]: v for (family, labels), v in found.items() if family == "value"}
    assert math.isnan(read.pop("a/nan"))
    assert read == {key: float(v) for key, v in kinds.items() if key != "a/nan"}


@pytest.mark.parametrize("odd", ['say "hi"', "back\\slash", "two\nlines", "\\n", '\\"', "é 日本", "a}b,c={", "end\\"])
def test_labels_are_escaped(odd):
    found = gauges((odd, 1, {f"lr/{odd}": 0.5}), run=odd)
    assert value(found, "teacher_learning_rate", phase=odd, teacher=odd) == 0.5
    assert value(found, "run_info", run=odd, method="metadistil") == 1


def test_a_phase_that_is_over_keeps_what_stays_true():
    first = {
        "loss": 0.5,
        "examples_per_second": 9.0,
        "epoch": 3.0,
        "validation/f1": 0.75,
        "seconds/pilot": 1.0,
        "host/cpu": 80,
    }
    found = gauges(("prepare", 20, first), ("metadistil", 4, {"loss": 0.25}))
    old = {family for family, labels in found if ("phase", "prepare") in labels}
    assert old == {"step", "epoch", "validation"}
    assert value(found, "loss", phase="metadistil") == 0.25 and value(found, "host_cpu_percent") == 80


# The server


@pytest.fixture
def served(tmp_path):
    """A started endpoint at a free port, what it said and warned, closed afterwards."""
    said, warned = [], []
    sink = Prometheus(0, "127.0.0.1")
    sink.start(Run(tmp_path, {"method": "kd"}, said.append, warned.append))
    sink.said, sink.warned = said, warned
    yield sink
    sink.close(True)


def get(sink, path="/metrics", method="GET"):
    request = urllib.request.Request(sink.address.removesuffix("/metrics") + path, method=method)
    with urllib.request.urlopen(request, timeout=10) as response:
        return response.read().decode(), response.headers


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if "metrics" in t.name or "process_request" in t.name]


def test_metrics_are_served(served, tmp_path):
    served.log("metadistil", 20, {"loss": 0.5, "seconds/pilot": 0.125})
    text, headers = get(served)
    assert headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert int(headers["Content-Length"]) == len(text.encode())
    found = parse(text)
    assert value(found, "seconds", phase="metadistil", section="pilot") == 0.125
    assert value(found, "run_info", run=tmp_path.name, method="kd") == 1
    assert served.said == [f"Metrics: {served.address}"] and served.warned == []
    assert get(served, "/metrics?name=x")[0] == text


def test_index_and_nothing_else(served):
    assert '<a href="/metrics">' in get(served, "/")[0]
    for path in ("/x", "/metrics/", "/metrics/../etc", "/%6detrics"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            get(served, path)
        assert refused.value.code == 404
        refused.value.close()
    with pytest.raises(urllib.error.HTTPError) as refused:
        get(served, method="POST")
    assert refused.value.code == 501
    refused.value.close()


def test_head_has_no_body(served):
    text, headers = get(served, method="HEAD")
    assert text == "" and int(headers["Content-Length"]) > 0


def test_it_listens_on_this_machine_only(served):
    assert served.address.startswith("http://127.0.0.1:")
    assert served._server.socket.getsockname()[0] == "127.0.0.1" and served._server.socket.family == socket.AF_INET


def test_localhost_is_ipv4(tmp_path, monkeypatch):
    """Also where its IPv6 address comes first."""
    found = [(socket.AF_INET6, 1, 6, "", ("::1", 0, 0, 0)), (socket.AF_INET, 1, 6, "", ("127.0.0.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    sink = Prometheus(0, "localhost")
    sink.start(Run(tmp_path, say=lambda _: None, warn=pytest.fail))
    try:
        assert sink.address.startswith("http://127.0.0.1:")
    finally:
        sink.close(True)


def test_another_host_is_warned_of(tmp_path):
    warned = []
    sink = Prometheus(0, "0.0.0.0")
    sink.start(Run(tmp_path, say=lambda _: None, warn=warned.append))
    try:
        assert parse(get(sink)[0])
    finally:
        sink.close(True)
    assert len(warned) == 1 and "anybody who reaches it can read" in warned[0]


def test_a_second_run_at_the_same_port(served, tmp_path):
    port = served._server.server_address[1]
    with pytest.raises(
        UserError, match=rf"^--metrics-port {port} at .* \(Address already in use\); give another --metrics-port"
    ):
        Prometheus(port, "127.0.0.1")
    assert parse(get(served)[0])


def test_a_port_taken_between_the_check_and_the_start(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
    sink = Prometheus(port, "127.0.0.1")
    with socket.create_server(("127.0.0.1", port)), pytest.raises(UserError, match=f"--metrics-port {port} "):
        Monitor(tmp_path, [sink], say=pytest.fail, warn=pytest.fail)


@pytest.mark.parametrize("host", ["192.0.2.1", "256.256.256.256.", "a" * 70 + ".b", "", "a b"])
def test_a_host_that_is_not_ours(host, monkeypatch):
    real = socket.getaddrinfo
    asked = lambda name, *rest, **more: real(name, *rest, **{**more, "flags": socket.AI_NUMERICHOST})  # noqa: E731 - no name server
    monkeypatch.setattr(socket, "getaddrinfo", asked)
    with pytest.raises(UserError, match=r"^--metrics-port 0 at --metrics-host .*; give another --metrics-host\.$"):
        Prometheus(0, host)


def test_closing_frees_the_port_and_ends_the_threads(tmp_path):
    sink = Prometheus(0, "127.0.0.1")
    sink.start(Run(tmp_path, say=lambda _: None))
    address = sink._server.server_address
    silent = socket.create_connection(address)  # never says anything, and must not hold the end up
    get(sink)
    assert "metrics endpoint" in threads()
    running = [t for t in threading.enumerate() if t.name in threads()]
    sink.close(True)
    sink.close(True)
    for thread in running:
        thread.join(2)
    assert threads() == []
    silent.close()
    with pytest.raises(OSError):
        socket.create_connection(address).close()
    Prometheus(address[1], "127.0.0.1")


def test_the_threads_do_not_keep_the_process(served):
    with socket.create_connection(served._server.server_address):
        get(served)
        assert all(t.daemon for t in threading.enumerate() if t.name in threads())


def test_a_client_that_hangs_up_is_nobodys_business(served, capfd):
    with socket.create_connection(served._server.server_address) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # reset the connection
        client.sendall(b"GET /metrics HTTP/1.0\r\n")
    with socket.create_connection(served._server.server_address) as client:
        client.sendall(b"\0\xff nonsense\r\n\r\n")
        client.recv(100)
    get(served)
    served.close(True)
    assert capfd.readouterr() == ("", "")


def test_scrapes_while_it_is_logged(served):
    """Each scrape is one state: all its values are those of one record."""
    stop, failed, seen = threading.Event(), [], set()

    def scrape():
        connection = http.client.HTTPConnection(*served._server.server_address[:2], timeout=10)
        try:
            while not stop.is_set():
                connection.request("GET", "/metrics")
                found = parse(connection.getresponse().read().decode())
                values = {v for (family, _), v in found.items() if family in ("seconds", "step")}
                assert len(values) <= 1, values
                seen.update(values)
        except Exception as e:  # noqa: BLE001 - of a thread
            failed.append(e)
        finally:
            connection.close()

    scraping = [threading.Thread(target=scrape) for _ in range(4)]
    for thread in scraping:
        thread.start()
    step = 0
    while len(seen) < 20 and not failed and step < 10**6:
        step += 1
        served.log("kd", step, {f"seconds/{i}": step for i in range(20)})
    stop.set()
    for thread in scraping:
        thread.join(10)
    assert not failed and len(seen) >= 20
