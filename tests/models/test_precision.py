"""What --precision does: the processor's or the GPU's choice, torch's switches, float32 where it has to stay."""

import json
import warnings

import pytest
import torch
import yaml
from run_helpers import assert_same_models, sentences, succeed, summary, table
from small_models import transformer

from engine.batch import Batch
from engine.errors import UserError
from engine.losses.objectives import Objective
from engine.meta.meta_step import MetaStep
from engine.models import precision
from engine.models.learner import Learner
from engine.models.network import Encoder
from engine.params.flat import FlatParameters

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
X86_OLD = {"architecture": "x86_64", "avx2": True, "avx512_bf16": False, "amx_bf16": False, "l2_cache_size": 1048576}


# What computes


def test_fp32_is_fp32_everywhere():
    for device in (CPU, CUDA):
        assert precision.choose("fp32", device) == ("fp32", None)


@pytest.mark.parametrize("found", [["avx512_bf16"], []])
def test_bf16_on_a_processor(found, monkeypatch):
    monkeypatch.setattr(precision, "bf16_instructions", lambda: found)
    chosen, said = precision.choose("bf16", CPU)
    assert chosen == ("bf16" if found else "fp32")
    assert (
        said is None if found else said.startswith("Precision: fp32 instead of bf16, since this processor has no bf16")
    )


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        (X86_OLD, []),
        (X86_OLD | {"avx512_bf16": True}, ["avx512_bf16"]),
        (X86_OLD | {"amx_bf16": True, "amx_tile": True}, ["amx_bf16"]),
        ({"architecture": "aarch64", "neon": True}, []),
        ({"architecture": "aarch64", "neon": True, "bf16": True, "sve_bf16": True}, ["bf16", "sve_bf16"]),
    ],
)
def test_what_torch_says_of_the_processor(capabilities, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(precision, "_cpuinfo", lambda: {"avx512_bf16"})  # not asked
    assert precision.bf16_instructions() == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512_bf16 amx_bf16\nbugs : none\n", ["amx_bf16", "avx512_bf16"]),
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512f\n\nprocessor\t: 1\n", []),
        ("processor\t: 0\nFeatures\t: fp asimd svebf16 bf16\n", ["bf16", "sve_bf16"]),
        ("", []),
        (None, []),
    ],
)
@pytest.mark.parametrize("torch_says", ["nothing", "has no such function"])
def test_where_torch_says_nothing_linux_is_asked(text, expected, torch_says, monkeypatch, tmp_path):
    if torch_says == "nothing":
        monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    else:
        monkeypatch.delattr(torch.cpu, "get_capabilities")
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


def test_tf32_is_for_gpus_that_have_it(monkeypatch):
    with pytest.raises(UserError, match="--precision is tf32, which needs a CUDA device.*on cpu; use --precision fp32"):
        precision.choose("tf32", CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "is_tf32_supported", lambda: False)
    with pytest.raises(UserError, match="tf32.*capability 8.0 or newer, and this one has 7.5; use --precision fp32"):
        precision.choose("tf32", CUDA)
    monkeypatch.setattr(torch.cuda, "is_tf32_supported", lambda: True)
    assert precision.choose("tf32", CUDA) == ("tf32", None)


@pytest.mark.parametrize("native", [True, False])
def test_bf16_on_a_gpu_is_not_emulated(native, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    if native:
        assert precision.choose("bf16", CUDA) == ("bf16", None)
    else:
        with pytest.raises(
            UserError, match="--precision is bf16, which this CUDA device cannot do; use --precision fp32"
        ):
            precision.choose("bf16", CUDA)


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


@pytest.mark.parametrize("given", ["fp32", "tf32"])
def test_products_are_ieee_inside(given, switches):
    precision.apply(given)
    now = lambda: torch.backends.cuda.matmul.fp32_precision  # noqa: E731
    outside = now()
    with precision.ieee():
        assert now() == "ieee"
        with precision.ieee():
            pass
        assert now() == "ieee"
    assert now() == outside == {"fp32": "ieee", "tf32": "tf32"}[given]
    with pytest.raises(ZeroDivisionError), precision.ieee():
        raise ZeroDivisionError
    assert now() == outside


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
    from engine.run import evaluation

    seen = []

    class Spy:
        encoding = "own"

        def in_mode(self, train):
            return torch.no_grad()

        def giving(self, inner):
            return torch.no_grad()

        def __call__(self, batch, precision):
            seen.append((precision, torch.backends.cuda.matmul.fp32_precision))
            return type("Outputs", (), {"logits": torch.zeros(2, 3)})

    class Split:
        def only(self, keys):
            return self

        def __len__(self):
            return 2

    batches = [([0, 1], Batch(torch.zeros(2), {}))]
    monkeypatch.setattr(evaluation, "evaluation_batches", lambda split, size: batches)
    precision.apply("tf32")
    evaluation.predict(Spy(), Split(), CPU)
    assert seen == [("fp32", "ieee")] and torch.backends.cuda.matmul.fp32_precision == "tf32"


# What stays float32


def batch(seed):
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 30, (4, 6), generator=random)
    return Batch(
        torch.randint(3, (4,), generator=random), {"own": {"input_ids": ids, "attention_mask": ids.clamp(max=1)}}
    )


@pytest.mark.parametrize(
    ("strategy", "soft_loss"),
    [
        ("exact", "kl"),
        ("exact", "mse_prob"),
        ("double_backward", "kl"),
        ("finite_difference", "kl"),
        ("first_order", "kl"),
    ],
)
@pytest.mark.parametrize("given", ["bf16", "tf32"])
def test_losses_and_cotangents_are_float32(given, strategy, soft_loss, monkeypatch):
    """Only between a model's inputs and its logits is anything bf16: every cotangent, gradient and loss is float32. tf32
    is all float32."""
    student = Encoder("student", transformer("bert", 0, layers=1, width=16), "own", given)
    teacher = Encoder("teacher", transformer("bert", 1, width=16), "own", given)
    common = {"steps": 5, "warmup_ratio": 0.0, "weight_decay": 0.0, "max_grad_norm": 1.0, "lr": 1e-3}
    learners = [Learner.adamw(network, **common) for network in (student, teacher)]
    seen, shadows, inner = [], [], FlatParameters._gradients_of

    def spied(flat, outputs, cotangents, leaves, *rest):
        seen.extend(t.dtype for t in (*outputs, *(cotangents or ())) if t is not None)
        shadows.extend(leaf.dtype for leaf in leaves.values())
        return inner(flat, outputs, cotangents, leaves, *rest)

    monkeypatch.setattr(FlatParameters, "_gradients_of", spied)
    step = MetaStep(learners[0], learners[1:], Objective(soft_loss, 3.0, 0.5), pilot_lr=0.1, strategy=strategy)
    values = step([batch(0)], [batch(1)])
    assert {v.dtype for v in values.values()} == {torch.float32} and all(v.isfinite() for v in values.values())
    assert len(seen) >= 2 and set(seen) == {torch.float32}
    assert (torch.bfloat16 in shadows) == (given == "bf16")
    assert {t.dtype for network in (student, teacher) for t in (network.flat.weights, network.flat.gradients)} == {
        torch.float32
    }


# Whole runs


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("METADISTIL_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_bf16_on_a_processor_without_it_is_a_run_in_fp32(place, monkeypatch, capsys):
    """Said once, and written down as what it was: the teacher is that of the run in fp32, and so is every weight."""
    monkeypatch.setattr(precision, "bf16_instructions", list)
    data = table(place / "d.tsv", sentences())
    plain = succeed(data, place / "plain")
    capsys.readouterr()
    run = succeed(data, place / "run", precision="bf16")
    said = capsys.readouterr().out
    assert said.count("fp32 instead of bf16") == 1 and "reused, prepared before" in said
    assert yaml.safe_load((run / "config.yaml").read_text())["precision"] == "fp32"
    assert summary(run)["settings"]["precision"] == "fp32"
    assert_same_models(run, plain)


def test_bf16_on_a_processor_with_it_is_a_run_in_bf16(place, monkeypatch, capsys):
    monkeypatch.setattr(precision, "bf16_instructions", lambda: ["avx512_bf16"])
    data = table(place / "d.tsv", sentences())
    run = succeed(data, place / "run", precision="bf16", method="finetune")
    assert "instead of" not in capsys.readouterr().out
    assert json.loads((run / "summary.json").read_text())["settings"]["precision"] == "bf16"
