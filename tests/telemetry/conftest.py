"""What tests of telemetry share."""

import socketserver

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def servers_end_soon():
    """A server looks every 10 ms whether it is to end, where it would every 500."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socketserver.BaseServer.serve_forever, "__defaults__", (0.01,))
        yield


@pytest.fixture
def no_torch_device(monkeypatch):
    """On a machine with a GPU too, it is the fake one that is looked at."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
