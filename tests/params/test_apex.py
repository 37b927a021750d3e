"""--optimizer apex is NVIDIA's apex or a sentence; who has its name alone is not imported."""

import sys

import fake_apex
import pytest
import torch
from torch import nn

from engine.errors import UserError
from engine.params import optim
from engine.params.flat import FlatParameters

CUDA = torch.device("cuda")


@pytest.fixture
def importing(tmp_path, monkeypatch):
    """The real look-up, with no apex imported and none left behind."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    names = ("apex", "apex.optimizers", "amp_C")
    kept = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    yield lambda install, **options: install(tmp_path, monkeypatch, **options)
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(kept)


@pytest.mark.parametrize(("install", "options", "message"), [
    (fake_apex.install_namesake, {}, "unrelated web-authentication toolkit.*NVIDIA/apex.*--optimizer flat"),
    (fake_apex.install, {"kernels": False}, "CUDA extensions.*amp_C.*NVIDIA/apex"),
    (lambda *_: None, {}, "not installed; build it from the source.*NVIDIA/apex"),
], ids=["another", "no kernels", "none"])  # fmt: skip
def test_what_is_no_usable_apex_is_refused(importing, install, options, message):
    """A stranger's package of that name is not even imported."""
    importing(install, **options)
    if "not installed" in message and optim.find_spec("apex") is not None:
        pytest.skip("some apex is installed here")
    with pytest.raises(UserError, match=message):
        optim.check("apex", CUDA)
    assert install is fake_apex.install or "apex" not in sys.modules


def test_apex_is_found_and_needs_cuda(importing):
    importing(fake_apex.install)
    optim.check("apex", CUDA)
    assert optim._fused_adam() is fake_apex.FusedAdam
    flat = FlatParameters(nn.Linear(2, 2))
    for make in (lambda: optim.check("apex", torch.device("cpu")), lambda: optim.adamw("apex", flat, 0.1, 0.0)):
        with pytest.raises(UserError, match="--optimizer apex needs a CUDA device, and this run is on cpu"):
            make()
