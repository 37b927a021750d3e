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
    monkeypatch.setattr(hub_module, "_ask", lambda endpoint, timeout: calls.append(endpoint) or answer)
    return calls


@pytest.mark.parametrize("answer", [None, "name resolution failed"])
def test_asks_once_per_process_and_remembers_the_reason(monkeypatch, answer):
    calls = asked(monkeypatch, answer)
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
    for hub in (Hub("auto"), Hub("hub"), Hub("auto")):
        assert hub.reachable() is (answer is None) and hub.why == answer
    assert calls == ["https://mirror.example"]


@pytest.mark.parametrize(
    ("source", "value", "library", "why"),
    [
        ("embedded", "", False, "--source embedded was given"),
        ("auto", "1", False, "HF_HUB_OFFLINE is set"),
        ("hub", "true", False, "HF_HUB_OFFLINE is set"),
        ("auto", "", True, "HF_HUB_OFFLINE is set"),
    ],
)
def test_no_network_where_none_is_wanted(monkeypatch, source, value, library, why):
    calls = asked(monkeypatch)
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", library)
    hub = Hub(source)
    assert not hub.reachable() and hub.why == why and not calls


@pytest.mark.parametrize("where", ["lookup", "server"])
def test_gives_up_by_time(monkeypatch, where):
    """Whether a lookup hangs, which no client's timeout covers, or a server never answers."""
    release, start, hub = threading.Event(), time.monotonic(), Hub("auto", timeout=0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        if where == "lookup":
            monkeypatch.setattr(hub_module, "_ask", lambda *_: release.wait(20))
        assert not hub.reachable() and ("0.1 s" in hub.why or "timed out" in hub.why)
        assert time.monotonic() - start < 10
        release.set()


def test_refused_and_unknown(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for endpoint, why in ((f"http://127.0.0.1:{port}", "connection refused"), ("https://hub.invalid", None)):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)  # .invalid never resolves (RFC 2606)
        hub = Hub()
        assert not hub.reachable() and hub.why and why in (None, hub.why)


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
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    with pytest.raises(RuntimeError), Hub().offline():
        assert constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE
        raise RuntimeError
    assert before == (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)


def test_unknown_source():
    with pytest.raises(UserError, match="auto, hub or embedded"):
        Hub("local")
