"""What tests of whole runs share."""

import gc
import os
import signal
from pathlib import Path

import pytest
import torch

from engine.params import native

# Runs with a cache of their own need not compile the native operations again.
os.environ.setdefault("METADISTIL_NATIVE_CACHE", str(Path("~/.cache/metadistil-engine/native").expanduser()))
# On a CPU Triton's kernels are interpreted; Triton reads this when it is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# A shell starts what it puts into the background with SIGINT ignored, and children inherit that: tests of Ctrl-C would wait.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish():
    """What the imported libraries hold is collected no more: each collection would go through it, a third of a second. And
    collections are rarer, a fourteenth of the tests' time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


@pytest.fixture(scope="session")
def compiled():
    """The compiled operations, taken from the cache or compiled once."""
    chosen = native.backend()
    if chosen.name == "torch" and (native.VARIABLE in chosen.why or "no C++ compiler" in chosen.why):
        pytest.skip(f"nothing is compiled here, {chosen.why}")
    assert chosen.name != "torch", chosen.why
    return torch.ops.metadistil


@pytest.fixture
def interpreted(monkeypatch):
    """`engine.kernels` computes with Triton's kernels on the CPU."""
    if os.environ.get("TRITON_INTERPRET", "0") != "1":
        pytest.skip("where there is a GPU, Triton is not interpreted: tests/kernels/test_kernels_gpu.py")
    monkeypatch.setenv("ENGINE_KERNELS", "triton")


@pytest.fixture(params=["reference", "triton", "cpp"])
def backend(request, monkeypatch):
    """What `engine.kernels` computes with, on the CPU. One that is missing fails; only a user may switch one off."""
    if request.param == "triton":
        request.getfixturevalue("interpreted")
    if request.param == "cpp":
        request.getfixturevalue("compiled")
    monkeypatch.setenv("ENGINE_KERNELS", request.param)
    return request.param


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache of its own for a module's runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METADISTIL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def reviews_file(tmp_path_factory):
    from run_helpers import sentences, table  # not above: the kernels' tests run where few packages are installed

    return table(tmp_path_factory.mktemp("data") / "reviews.tsv", sentences(200))


@pytest.fixture(scope="module")
def data(reviews_file, cache):
    """Two hundred reviews, for runs whose cache is the module's."""
    return reviews_file


@pytest.fixture(scope="session")
def finished(reviews_file, tmp_path_factory):
    """One run of MetaDistil with two unlike teachers, looked at from many sides; its cache is `cache` beside it."""
    from run_helpers import succeed

    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METADISTIL_CACHE", str(folder / "cache"))
        return succeed(reviews_file, folder / "run", teachers="bert,roberta", seed=1, log_steps=2, page=True)
