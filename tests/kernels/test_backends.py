"""Which kernels serve a device, and what is said of it."""

import logging
import sys

import pytest
import torch

from engine.kernels import fused_linear_kd, kd_loss, meta_cotangent
from engine.kernels.ops.common import backends
from engine.kernels.ops.common.scaling import scaled
from engine.params import native

triton = pytest.importorskip("triton")

SETTINGS = {"temperature": 2.0, "alpha": 0.3}
x = torch.zeros(2, 3)


@pytest.fixture(autouse=True)
def undecided(monkeypatch, caplog):
    """As in a new process."""
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    backends._decide.cache_clear()
    caplog.set_level(logging.INFO, "engine.kernels")
    yield
    backends._decide.cache_clear()


def without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)


def library(monkeypatch, *devices, why="there is no compiler"):
    monkeypatch.setattr(backends, "native", lambda: (frozenset(devices), why))


@pytest.mark.parametrize(
    ("device", "choice", "devices", "name", "why"),
    [
        ("cuda", None, [], "triton", "the usual one"), ("cuda", "auto", [], "triton", "the usual one"),
        ("cuda", "triton", [], "triton", "because ENGINE_KERNELS says so"), ("cpu", "", ["cpu"], "cpp", "the usual one"),
        ("cpu", "cpp", ["cpu", "cuda"], "cpp", "because ENGINE_KERNELS says so"),
        ("cpu", "reference", ["cpu"], "reference", "because ENGINE_KERNELS says so"),
        ("cpu", None, [], "reference", "because there is no compiler"), ("mps", None, ["cpu"], "reference", "the usual one"),
    ],
)  # fmt: skip
def test_choice(device, choice, devices, name, why, monkeypatch, caplog):
    library(monkeypatch, *devices)
    if choice is not None:
        monkeypatch.setenv(backends.VARIABLE, choice)
    found = backends.backend(device)
    assert found.name == name and why in found.why
    assert backends.backend(device) == found
    (record,) = caplog.records
    assert (record.getMessage(), record.levelno) == (f"kernels on {device}: {name}, {found.why}", logging.INFO)


def test_cuda_without_triton_is_worth_a_warning(monkeypatch, caplog):
    without_triton(monkeypatch)
    assert backends.backend("cuda").name == "reference"
    assert "triton is not installed" in backends.backend("cuda").why
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    monkeypatch.setenv(backends.VARIABLE, "reference")
    backends.backend("cuda")
    assert [r.levelno for r in caplog.records] == [logging.WARNING, logging.INFO], "who asks for it knows"


@pytest.mark.parametrize(
    ("device", "choice", "says"),
    [
        ("cpu", "Triton", "ENGINE_KERNELS is 'Triton'; it must be one of auto, triton, cpp, reference"),
        ("cpu", "cpp", "ENGINE_KERNELS is 'cpp', but there is no compiler; with auto"),
        ("cuda", "cpp", "ENGINE_KERNELS is 'cpp', but the C.. kernels do not serve cuda"),
        ("meta", "triton", "ENGINE_KERNELS is 'triton', but triton does not serve meta"),
        ("cuda", "triton", "ENGINE_KERNELS is 'triton', but triton is not installed"),
        ("cpu", "triton", "but triton does not serve cpu .on a CPU its interpreter does, with TRITON_INTERPRET=1"),
    ],
)
def test_refusals(device, choice, says, monkeypatch):
    library(monkeypatch)
    if "not installed" in says:
        without_triton(monkeypatch)
    elif "interpreter" in says:
        monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setenv(backends.VARIABLE, choice)
    for _ in range(2):
        with pytest.raises(ValueError, match=says):
            backends.backend(device)


@pytest.mark.parametrize("call", [
    lambda: kd_loss(x, [x], **SETTINGS), lambda: meta_cotangent(x, [x], x, **SETTINGS),
    lambda: fused_linear_kd(x, x, [x], [x], **SETTINGS),
])  # fmt: skip
def test_every_function_refuses_a_bad_choice(call, monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, "none")
    with pytest.raises(ValueError, match="ENGINE_KERNELS is 'none'"):
        call()


def test_without_a_library_the_reference_computes(monkeypatch, caplog):
    library(monkeypatch, why="there are no native operations, because they do not compile")
    student = torch.randn(2, 3, requires_grad=True)
    assert kd_loss(student, [x], **SETTINGS).grad_fn is not None
    assert fused_linear_kd(student, x, [x], [x], **SETTINGS).isfinite()
    assert [r.getMessage() for r in caplog.records] == [
        "kernels on cpu: reference, because there are no native operations, because they do not compile"
    ]


def test_the_package_says_where_the_library_is(monkeypatch):
    monkeypatch.setattr(native, "_chosen", native.Backend("torch", "because METADISTIL_NATIVE=torch says so"))
    devices, why = backends.native()
    assert not devices
    assert why == "there are no native operations, because METADISTIL_NATIVE=torch says so"
    monkeypatch.setattr(native, "_chosen", native.Backend("just in time", "", frozenset({"cpu"})))
    assert backends.native()[0] == {"cpu"}


@pytest.mark.parametrize("op", ["kd_loss", "meta_cotangent", "fused_linear_kd"])
def test_every_op_has_a_file_for_each_backend(op, monkeypatch):
    for name, device, devices in (("naive", "cpu", []), ("cpp", "cpu", ["cpu"]), ("triton_kernels", "cuda", [])):
        library(monkeypatch, *devices)
        backends._decide.cache_clear()
        assert backends.module(op, device).__name__ == f"engine.kernels.ops.{op}.{name}"


def test_the_reference_has_no_ops(monkeypatch):
    library(monkeypatch)
    with pytest.raises(ValueError, match="the reference has no ops"):
        torch.ops.metadistil.kd_loss(x, [x], None, None, [1.0], 2.0, 0.3, -100, "mean", [False, False])


def test_gradients_are_scaled_on_a_device_that_only_the_reference_serves(monkeypatch):
    library(monkeypatch)
    gradient = torch.ones(2, device="meta")
    assert scaled([gradient], torch.tensor(0.5, device="meta"))[0] is gradient
