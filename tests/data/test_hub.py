"""Whether the hub can be used is decided once, in time, and with a reason."""

import socket
import threading
import time

import datasets
import huggingface_hub
import pytest
from huggingface_hub import constants

from engine import hub as hub_module
from engine.errors import UserError
from engine.hub import Hub


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(hub_module, "_answers", {})
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def asked(monkeypatch, answer=None):
    """Record the endpoints that are asked, and answer them."""
    calls = []

    def ask(endpoint, timeout):
        calls.append(endpoint)
        return answer() if callable(answer) else answer

    monkeypatch.setattr(hub_module, "_ask", ask)
    return calls


def test_asks_once_per_process(monkeypatch):
    calls = asked(monkeypatch)
    assert Hub("auto").reachable() and Hub("hub").reachable() and Hub("auto").reachable()
    assert len(calls) == 1


def test_a_no_is_remembered_with_its_reason(monkeypatch):
    calls = asked(monkeypatch, "name resolution failed")
    for hub in (Hub("auto"), Hub("hub")):
        assert not hub.reachable() and hub.why == "name resolution failed"
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("source", "value", "why"),
    [
        ("embedded", "", "--source embedded was given"),
        ("auto", "1", "HF_HUB_OFFLINE is set"),
        ("hub", "true", "HF_HUB_OFFLINE is set"),
    ],
)
def test_no_network_where_none_is_wanted(monkeypatch, source, value, why):
    calls = asked(monkeypatch)
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    hub = Hub(source)
    assert not hub.reachable() and hub.why == why and not calls


def test_offline_known_to_the_library_alone(monkeypatch):
    calls = asked(monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not Hub().reachable() and not calls


def test_endpoint_is_honoured(monkeypatch):
    calls = asked(monkeypatch)
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
    assert Hub().reachable() and calls == ["https://mirror.example"]


def test_gives_up_by_time_even_if_the_request_hangs(monkeypatch):
    release = threading.Event()
    asked(monkeypatch, lambda: release.wait(20))
    start, hub = time.monotonic(), Hub("auto", timeout=0.2)
    assert not hub.reachable() and hub.why == "no answer within 0.2 s"
    assert time.monotonic() - start < 10
    release.set()


def test_a_server_that_never_answers(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        start, hub = time.monotonic(), Hub("auto", timeout=0.5)
        assert not hub.reachable() and time.monotonic() - start < 10
        assert "0.5 s" in hub.why or "timed out" in hub.why


def test_refused(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    hub = Hub()
    assert not hub.reachable() and hub.why == "connection refused"


def test_name_resolution_fails(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid")  # .invalid never resolves (RFC 2606)
    start, hub = time.monotonic(), Hub()
    assert not hub.reachable() and hub.why
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(("status", "usable"), [(200, True), (307, True), (404, True), (403, False), (503, False)])
def test_status(monkeypatch, status, usable):
    class Session:
        def head(self, url, timeout):
            return type("Response", (), {"status_code": status})

    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    hub = Hub()
    assert hub.reachable() is usable
    assert usable or hub.why == f"it answered with status {status}"


def test_offline_is_undone():
    def now():
        return constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE

    before = now()
    with pytest.raises(RuntimeError), Hub().offline():
        assert constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE
        raise RuntimeError
    assert now() == before


def test_unknown_source():
    with pytest.raises(UserError, match="auto, hub or embedded"):
        Hub("local")
