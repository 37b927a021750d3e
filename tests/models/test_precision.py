"""What --precision does: the processor's or the GPU's choice, torch's switches, float32 where it has to stay."""

import warnings

import pytest
import torch
import yaml
from graph_training import Training
from run_helpers import assert_same_models, succeed, succeed_saying, summary
from small_models import CPU, CUDA, batch, encoder

from engine.errors import UserError
from engine.meta.strategies import STRATEGIES
from engine.models import precision
from engine.params.flat import FlatParameters
from engine.run import evaluation

X86_OLD = {"architecture": "x86_64", "avx2": True, "avx512_bf16": False, "amx_bf16": False, "l2_cache_size": 1048576}


# What computes


def found(monkeypatch, processor=(), bf16=False, tf32=False):
    """Devices that can do this much; emulation is not it."""
    monkeypatch.setattr(precision, "bf16_instructions", lambda: list(processor))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation)
    monkeypatch.setattr(torch.cuda, "is_tf32_supported", lambda: tf32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))


INSTEAD = "Precision: fp32 instead of bf16, since this processor has no bf16"
CHOSEN = [
    ("fp32", CPU, {}, "fp32", None),
    ("fp32", CUDA, {}, "fp32", None),
    ("bf16", CPU, {"processor": ["avx512_bf16"]}, "bf16", None),
    ("bf16", CPU, {"bf16": True}, "fp32", INSTEAD),
    ("bf16", CUDA, {"bf16": True}, "bf16", None),
    ("tf32", CUDA, {"tf32": True}, "tf32", None),
    ("bf16", CUDA, {"processor": ["avx512_bf16"]}, None, "bf16, which this CUDA device cannot do"),
    ("tf32", CPU, {"tf32": True}, None, "tf32, which needs a CUDA device, and this run is on cpu"),
    ("tf32", CUDA, {}, None, "tf32, .* compute capability 8.0 or newer, and this one has 7.5"),
]


@pytest.mark.parametrize(("given", "device", "able", "expected", "says"), CHOSEN)
def test_what_computes(given, device, able, expected, says, monkeypatch):
    found(monkeypatch, **able)
    if expected is None:
        with pytest.raises(UserError, match=f"^--precision is {says}; use --precision fp32.$"):
            precision.choose(given, device)
    else:
        chosen, said = precision.choose(given, device)
        assert chosen == expected and (said is None if says is None else said.startswith(says))


LINUX = {
    "processor\t: 0\nflags\t\t: fpu avx2 avx512_bf16 amx_bf16\nbugs : none\n": ["amx_bf16", "avx512_bf16"],
    "processor\t: 0\nflags\t\t: fpu avx2 avx512f\n\nprocessor\t: 1\n": [],
    "processor\t: 0\nFeatures\t: fp asimd svebf16 bf16\n": ["bf16", "sve_bf16"],
    "": [],
}
ARM_OLD = {"architecture": "aarch64", "neon": True}
INSTRUCTIONS = [
    (X86_OLD, next(iter(LINUX)), []),  # Linux is not asked where torch says something
    (X86_OLD | {"avx512_bf16": True}, "", ["avx512_bf16"]),
    (X86_OLD | {"amx_bf16": True, "amx_tile": True}, "", ["amx_bf16"]),
    (ARM_OLD, "", []),
    (ARM_OLD | {"bf16": True, "sve_bf16": True}, "", ["bf16", "sve_bf16"]),
    *(({}, text, expected) for text, expected in LINUX.items()),
    *((None, text, expected) for text, expected in LINUX.items()),  # torch before 2.11
    ({}, None, []),  # not on Linux
]


@pytest.mark.parametrize(("capabilities", "text", "expected"), INSTRUCTIONS)
def test_instructions_of_a_processor(capabilities, text, expected, monkeypatch, tmp_path):
    if capabilities is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities")
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    file, read = tmp_path / "cpuinfo", precision._cpuinfo
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(precision, "_cpuinfo", lambda: read(file))
    assert precision.bf16_instructions() == expected


def test_this_processor_is_one_kind():
    """torch and Linux agree on it, where both say something."""
    listed = {name for name, flag in (precision.X86 | precision.ARM).items() if flag in precision._cpuinfo()}
    if not precision._cpuinfo():
        pytest.skip("no /proc/cpuinfo here")
    assert set(precision.bf16_instructions()) == listed


# torch's switches


@pytest.fixture
def switches():
    """Behind the test they are as torch comes."""
    yield
    torch.backends.fp32_precision = torch.backends.cudnn.fp32_precision = "none"
    precision.apply("fp32")
    torch.backends.cudnn.allow_tf32 = True


USERS = {  # what a program may have set before; some are older calls, some newer ones
    "nothing": "",
    "high": "torch.set_float32_matmul_precision('high')",
    "medium": "torch.set_float32_matmul_precision('medium')",
    "cuBLAS": "torch.backends.cuda.matmul.allow_tf32 = True",
    "all tf32": "torch.backends.fp32_precision = 'tf32'",
    "all ieee": "torch.backends.fp32_precision = 'ieee'",
    "matmul tf32": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "cuDNN tf32": "torch.backends.cudnn.fp32_precision = 'tf32'",
    "conv ieee": "torch.backends.cudnn.conv.fp32_precision = 'ieee'",
    "oneDNN bf16": "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
}


@pytest.mark.parametrize("before", USERS)
@pytest.mark.parametrize("given", ["fp32", "tf32", "bf16"])
def test_the_switches_are_set_whatever_they_were(given, before, switches):
    """By the older names and the newer ones, which raise where they disagree; nothing is warned of."""
    exec(USERS[before], {"torch": torch})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        precision.apply(given)
        tf32 = given == "tf32"
        backends = torch.backends
        operations = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul)
        assert {operation.fp32_precision for operation in operations} == {"tf32" if tf32 else "ieee"}
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
        assert backends.cuda.matmul.allow_tf32 == backends.cudnn.allow_tf32 == tf32


def test_products_are_ieee_inside(switches):
    """Also inside twice, and after an error."""
    precision.apply("tf32")
    with pytest.raises(ZeroDivisionError), precision.ieee():
        with precision.ieee():
            pass
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        raise ZeroDivisionError
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_products_on_a_gpu(switches):
    """Of 1024 terms: float32 has 24 bits, TensorFloat-32 11."""
    if not torch.cuda.is_tf32_supported():
        pytest.skip("needs compute capability 8.0")
    torch.manual_seed(0)
    a, b = torch.randn(2, 1024, 1024, dtype=torch.float64, device="cuda")
    a, b = a.float(), b.float()
    exact, errors = a.double() @ b.double(), {}
    for given in ("fp32", "tf32", "bf16"):
        precision.apply(given)
        errors[given] = ((a @ b - exact).norm() / exact.norm()).item()
    precision.apply("tf32")
    with precision.ieee():
        errors["inside"] = ((a @ b - exact).norm() / exact.norm()).item()
    assert errors["fp32"] == errors["bf16"] == errors["inside"] < 1e-6 and 1e-5 < errors["tf32"] < 2e-3


def test_an_evaluation_is_ieee(switches, monkeypatch):
    """What is reported is what a user's own float32 evaluation finds."""

    class Split(list):
        def only(self, keys):
            return self

    network, now, seen = encoder(), lambda: torch.backends.cuda.matmul.fp32_precision, []
    network.module.register_forward_pre_hook(lambda *_: seen.append(now()))
    monkeypatch.setattr(evaluation, "evaluation_batches", lambda split, size: [([0, 1, 2, 3], batch())])
    precision.apply("tf32")
    evaluation.predict(network, Split(range(4)), CPU)
    assert seen == ["ieee"] and now() == "tf32"


# What stays float32


@pytest.mark.parametrize(("strategy", "soft_loss"), [*((name, "kl") for name in STRATEGIES), ("exact", "mse_prob")])
@pytest.mark.parametrize("given", ["bf16", "tf32"])
def test_losses_and_cotangents_are_float32(given, strategy, soft_loss, monkeypatch):
    """Only between a model's inputs and its logits is anything bf16: every cotangent, gradient and loss is float32. tf32
    is all float32."""
    training = Training("metadistil", mode="off", precision=given, strategy=strategy, soft_loss=soft_loss)
    seen, shadows, inner = [], [], FlatParameters._gradients_of

    def spied(flat, outputs, cotangents, leaves, *rest):
        seen.extend(t.dtype for t in (*outputs, *(cotangents or ())) if t is not None)
        shadows.extend(leaf.dtype for leaf in leaves.values())
        return inner(flat, outputs, cotangents, leaves, *rest)

    monkeypatch.setattr(FlatParameters, "_gradients_of", spied)
    (values,) = training.run(1)
    assert {v.dtype for v in values.values()} == {torch.float32} and all(v.isfinite() for v in values.values())
    assert len(seen) >= 2 and set(seen) == {torch.float32}
    assert (torch.bfloat16 in shadows) == (given == "bf16")
    flats = [learner.network.flat for learner in training.state.learners()]
    assert {t.dtype for flat in flats for t in (flat.weights, flat.gradients)} == {torch.float32}


# Whole runs


def test_bf16_without_and_with_instructions_for_it(data, tmp_path, monkeypatch):
    """A run in fp32 where there are none, said once and written down as what it was: the teacher is that of the run in fp32,
    and so is every weight."""
    found(monkeypatch)
    plain = succeed(data, tmp_path / "plain", method="kd")
    run, said = succeed_saying(data, tmp_path / "run", method="kd", precision="bf16")
    assert said.count("fp32 instead of bf16") == 1 and "reused, prepared before" in said
    assert yaml.safe_load((run / "config.yaml").read_text())["precision"] == "fp32"
    assert summary(run)["settings"]["precision"] == "fp32"
    assert_same_models(run, plain)
    found(monkeypatch, ["avx512_bf16"])
    run, said = succeed_saying(data, tmp_path / "low", method="finetune", precision="bf16")
    assert "instead of" not in said and summary(run)["settings"]["precision"] == "bf16"
