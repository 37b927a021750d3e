"""What tests of the benchmarks share: a device whose rates are known, and graphs that are simulated."""

import gc

import pytest
import torch

from bench import step_cases
from bench.devices import Host
from engine import kernels
from engine.models.network import Network


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setattr(Host, "cache", lambda self: 1024)
    monkeypatch.setattr(Host, "copy_rate", lambda self: 1e9)
    monkeypatch.setattr(Host, "product_rate", lambda self, *sizes: 1e12)
    monkeypatch.setattr(gc, "collect", lambda: 0)  # with all that the suite holds, half a second each
    return Host()


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Plain operations, which the simulation sees, no rows of tables, whose number depends on the data, and learning rates
    that lie on the device."""
    monkeypatch.setenv("ENGINE_KERNELS", "reference")
    monkeypatch.setattr(Network, "table_rows", None)
    monkeypatch.setattr(kernels.ops.common.checks, "check_labels", lambda *_, **__: None)
    honest = step_cases.learner
    monkeypatch.setattr(
        step_cases, "learner", lambda module, name, lr, *more: honest(module, name, torch.tensor(lr), *more)
    )
