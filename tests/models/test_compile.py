"""--compile: compiled encoder layers give what the eager ones give, in the passes that they are for, and compile once."""

import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from run_helpers import ROOT, assert_same_models, flags, run_signalled, sentences, succeed, table
from small_models import transformer
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import counters
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
)

from engine.batch import Batch
from engine.errors import UserError
from engine.losses.objectives import Objective
from engine.meta.meta_step import MetaStep
from engine.methods import METHODS, State
from engine.models import compiling
from engine.models.checkpointing import checkpointed
from engine.models.compiling import LARGE, LIMIT, SIZES, CompiledLayers
from engine.models.features import InnerStates
from engine.models.learner import Learner
from engine.models.network import Encoder
from engine.models.teacher_params import restrict

LAYERS, WORDS = 3, 30
families = pytest.mark.parametrize("family", ["bert", "distilbert"])


@pytest.fixture(autouse=True)
def forgotten():
    """Nothing is compiled before a test; the counters are its own."""
    torch._dynamo.reset()
    counters.clear()


def batch(size=4, length=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([length, *torch.randint(1, length + 1, (size - 1,), generator=generator)])
    mask = (torch.arange(length) < lengths[:, None]).long()
    ids = torch.randint(1, WORDS, (size, length), generator=generator) * mask
    return Batch(torch.arange(size) % 3, {"own": {"input_ids": ids, "attention_mask": mask}})


class Counted(CompiledLayers):
    """Counts the layers that it runs."""

    calls = 0

    def __call__(self, *args):
        self.calls += 1
        return super().__call__(*args)


def encoder(compiled=None, precision="fp32", **settings):
    return Encoder(
        "model",
        transformer(**{"family": "bert", "layers": LAYERS, "positions": 520} | settings).eval(),
        "own",
        precision,
        compiled,
    )


def forward_and_backward(network, given, train):
    """Logits, gradient of all weights, and where the random numbers stand afterwards."""
    network.module.train(train)
    torch.manual_seed(1)
    with network.flat.lookups() as lookups:
        logits = network(given).logits
    after = torch.get_rng_state()
    gradient = network.flat.gradients_of([logits.square().sum()], None, network.leaves(), lookups)
    return logits.detach(), torch.cat([gradient.dense, *(t.values.flatten() for t in gradient.tables)]), after


def assert_agree(one, two, tolerance):
    assert (one[0] - two[0]).norm() <= tolerance * two[0].norm()
    assert (one[1] - two[1]).norm() <= tolerance * two[1].norm()
    assert torch.equal(one[2], two[2]), "other random numbers were drawn"


# What is compiled, and what it computes; dynamo's graphs run by torch


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@families
def test_values_gradients_and_masks_are_the_eager_ones(family, train):
    compiled, given = Counted("eager"), batch()
    found = forward_and_backward(encoder(compiled, family=family), given, train)
    assert_agree(found, forward_and_backward(encoder(family=family), given, train), 1e-6)
    assert compiled.calls == LAYERS - 1
    assert compiled.spent()[0] == 1


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, True), ({"repeated": True}, False), ({"higher": True}, False), ({"precision": "fp32"}, False)],
    ids=str,
)
def test_which_passes_are_compiled(settings, expected):
    compiled = Counted("eager")
    network = encoder(compiled)
    with torch.no_grad():
        found = network(batch(), **settings).logits
        assert compiled.calls == (LAYERS - 1 if expected else 0)
        torch.testing.assert_close(found, network(batch(), precision="fp32").logits)


def test_a_batch_of_one_runs_as_it_is():
    compiled, plain = Counted("eager"), encoder()
    network = encoder(compiled)
    for given in (batch(1, 9), batch(4, 1)):
        found = forward_and_backward(network, given, True)
        assert_agree(found, forward_and_backward(plain, given, True), 1e-6)
    assert compiled.calls == 2 * (LAYERS - 1) and compiled.spent()[0] == 0


def test_layers_are_left_as_they_were():
    network = encoder(CompiledLayers("eager"))
    layers = network.module.bert.encoder.layer
    before = [dict(layer.__dict__) for layer in layers]
    network(batch())
    assert [dict(layer.__dict__) for layer in layers] == before
    network.module.classifier = None
    with pytest.raises(TypeError):
        network(batch())
    assert [dict(layer.__dict__) for layer in layers] == before


def test_no_size_makes_a_graph_of_its_own():
    """All kinds of passes once, then 20 of any size; weights move between them, and bf16 ones stand in for the module's."""
    compiled = Counted("eager")
    networks = [encoder(compiled, "bf16"), encoder(compiled, "bf16", layers=5)]  # models of one shape share graphs
    kinds = [(train, grad) for train in (False, True) for grad in (False, True)]

    def passes(network, given, train, grad):
        network.module.train(train)
        with torch.set_grad_enabled(grad):
            logits = network(given).logits
        if grad:
            network.flat.backward([logits.sum()], None, network.leaves(), _no_lookups())
            with torch.no_grad():
                network.flat.weights.add_(network.flat.gradients, alpha=-0.01)
            network.flat.clear_gradients()

    for kind in kinds:
        passes(networks[0], batch(9, 9), *kind)
    graphs = compiled.spent()[0]
    assert graphs == len(kinds)
    sizes = torch.randint(1, 40, (20, 2), generator=torch.Generator().manual_seed(0)).tolist()
    for i, size in enumerate([(64, 65), (2, 2), (32, 64), *sizes]):
        passes(networks[i % 2], batch(*size), *kinds[i % 4 if i % 8 < 4 else i % 3])
    assert compiled.spent()[0] == graphs


def _no_lookups():
    from engine.params.flat import Lookups

    return Lookups()


@pytest.mark.parametrize(("size", "expected"), [((2, 5), SIZES), ((33, 7), SIZES), ((70, 60), LARGE)], ids=str)
def test_code_is_made_for_the_same_sizes_whatever_comes_first(size, expected):
    hints = []

    def backend(graph, inputs):
        hints.append({x.node.hint for x in inputs if isinstance(x, torch.SymInt)})
        return graph

    assert (size[0] * size[1] > LIMIT) == (expected == LARGE)
    forward_and_backward(encoder(CompiledLayers(backend)), batch(*size), True)
    assert hints == [set(expected)]


def test_more_kinds_than_expected_are_an_error(monkeypatch):
    """torch's own answer is to go on without compiling."""
    monkeypatch.setattr(compiling, "GRAPHS", 1)
    network = encoder(CompiledLayers("eager"))
    network(batch())
    with torch.no_grad(), pytest.raises(FailOnRecompileLimitHit):
        network(batch())


@families
def test_features(family):
    """transformers leaves hooks inside the layers when it first gives hidden states; dynamo cannot trace them."""
    network, plain = encoder(CompiledLayers("eager"), family=family), encoder(family=family)
    for each in (network, plain):
        each.inner = InnerStates(first=(1, 2))
    network(batch(), precision="fp32")
    torch.testing.assert_close(network(batch()).features, plain(batch()).features)
    hooks = [m for m in network.module.modules() if m._forward_hooks]
    assert len(hooks) == len([m for m in plain.module.modules() if m._forward_hooks]) > LAYERS


@pytest.mark.parametrize("choice", ["last-1", "head", "lora:2"])
def test_partly_trained_teachers(choice):
    compiled, given = Counted("eager"), batch()
    network, plain = encoder(compiled), encoder()
    for each in (network, plain):
        restrict(each.module, choice)
    assert_agree(forward_and_backward(network, given, False), forward_and_backward(plain, given, False), 1e-6)
    assert compiled.calls == LAYERS - 1


@pytest.mark.parametrize(
    ("method", "precision"), [("finetune", "fp32"), ("kd", "bf16"), ("metadistil", "fp32"), ("metadistil", "bf16")]
)
def test_steps_of_every_method(method, precision):
    """With dropout, whose masks are those of eager passes; a meta-step's pilot is not compiled, its teachers and quiz are."""
    losses, weights, compiled = [], [], Counted("eager")
    for each in (None, compiled):
        student, teacher = (
            Learner.adamw(encoder(each, precision, layers=n), lr=0.01, steps=9, warmup_ratio=0.0, weight_decay=0.01, max_grad_norm=1.0)
            for n in (2, 3)
        )  # fmt: skip
        torch.manual_seed(2)
        if method == "metadistil":
            step = MetaStep(student, [teacher], Objective(), pilot_lr=0.1)
            call = lambda: step([batch()], [batch(seed=1)])  # noqa: E731, B023
        else:
            teachers = [teacher.network] if method == "kd" else []
            call = lambda: METHODS[method].step(State(student, Objective(), teachers), [batch()])  # noqa: E731, B023
        losses.append(torch.stack([call()["loss"] for _ in range(2)]))
        weights.append(torch.cat([learner.network.flat.weights for learner in (student, teacher)]))
    # of 2 steps: a student's layer, and 2 of the teacher; the teacher's twice and the quiz
    assert compiled.calls == {"finetune": 2, "kd": 6, "metadistil": 10}[method]
    torch.testing.assert_close(*losses, rtol=1e-3 if precision == "bf16" else 1e-5, atol=0)
    # bf16: gradients that are nearly zero change sign, and AdamW makes whole steps of them
    assert (weights[0] - weights[1]).norm() <= (2e-2 if precision == "bf16" else 1e-4) * weights[1].norm()


# What is refused


def test_checkpointing_is_refused():
    network = encoder(CompiledLayers("eager"))
    with checkpointed(network.module), pytest.raises(ValueError, match="activation checkpointing"):
        network(batch())
    with checkpointed(network.module):
        assert network(batch(), repeated=True).logits.isfinite().all()


def test_a_model_whose_layers_are_not_known():
    albert = AlbertForSequenceClassification(AlbertConfig(
        vocab_size=WORDS, embedding_size=4, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2
    ))  # fmt: skip
    with pytest.raises(UserError, match="^--compile knows the layers of BERT, .* and mine is a albert; leave it out.$"):
        Encoder("mine", albert, "own", compiled=CompiledLayers("eager"))
    Encoder("mine", albert, "own")


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["none", "broken"])
def test_without_a_compiler(compiler, tmp_path):
    """Also where the cache holds what was compiled before; nothing is made of the run."""
    CompiledLayers().try_out(torch.device("cpu"))
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    environment = os.environ | {
        "CXX": str(broken if compiler == "broken" else tmp_path / "none"),
        "METADISTIL_NATIVE": "torch",
    }
    data = table(tmp_path / "d.tsv", sentences())
    words = flags(data, tmp_path / "out", method="finetune", compile=True)
    done = subprocess.run([sys.executable, "-m", "engine.train", *words], cwd=ROOT, env=environment, text=True,
                          capture_output=True, check=False)  # fmt: skip
    assert done.returncode == 2
    assert re.fullmatch(r"error: --compile needs a compiler .* leave it out\.\n", done.stderr), done.stderr
    assert not (tmp_path / "out").exists()


# inductor


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@families
def test_inductor_computes_the_same(family, precision):
    """Dropout included: on a CPU its masks are those of an eager pass. bf16 comes as near to fp32 as eager passes in bf16."""
    compiled = Counted()
    network, plain = (encoder(c, precision, family=family, width=32) for c in (compiled, None))
    for train in (False, True):
        for given in (batch(5, 12), batch(32, 16)):
            found = forward_and_backward(network, given, train)
            eager = forward_and_backward(plain, given, train)
            if precision == "fp32":
                assert_agree(found, eager, 1e-5)  # fused sums are taken in another order
            else:
                exact = forward_and_backward(encoder(family=family, width=32), given, train)
                for ours, theirs, fp32 in zip(found[:2], eager[:2], exact[:2], strict=True):
                    # 3: of a dozen logits, by luck, the one's roundings cancel and the other's do not
                    assert (ours - fp32).norm() <= 3 * (theirs - fp32).norm()
                assert torch.equal(found[2], eager[2])
            with torch.no_grad():
                torch.manual_seed(1)
                assert (network(given).logits - found[0]).norm() <= 3e-2 * found[0].norm()
    assert compiled.spent()[0] == 4


@pytest.mark.slow
def test_inductor_makes_no_graph_for_a_size():
    """But for more than LIMIT tokens, and for the fused attention of 64 tokens and more."""
    compiled = Counted()
    network = encoder(compiled, dropout=0.0)
    for given in (batch(4, 9), batch(4, 70), batch(64, 70)):
        forward_and_backward(network, given, True)
    graphs = compiled.spent()[0]
    sizes = torch.randint(2, 100, (50, 2), generator=torch.Generator().manual_seed(0)).tolist()
    for size in [(100, 60), (64, 64), (65, 63), *sizes]:
        forward_and_backward(network, batch(*size), True)
    assert compiled.spent()[0] <= graphs + 1  # many short examples


@pytest.mark.slow
def test_inductor_gives_the_same_bits_whatever_comes_first():
    """In bf16, where without a first call of a size of its own the sums of (2, 9) first were other ones."""
    from torch._inductor.utils import fresh_cache

    found = []
    for first in ((32, 64), (2, 9)):
        torch._dynamo.reset()
        network = encoder(CompiledLayers(), "bf16", width=384, layers=2)
        with fresh_cache():
            forward_and_backward(network, batch(*first), True)
            found.append(forward_and_backward(network, batch(32, 40), True))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.slow
def test_a_run_repeats_itself_bit_for_bit(tmp_path, monkeypatch):
    """In one go, and interrupted; each from an empty cache of compiled code."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    data, logs = table(tmp_path / "d.tsv", sentences(200)), []
    settings = {"method": "finetune", "compile": True, "student": "bert", "log_steps": 1, "seed": 5}
    for run in ("one", "two"):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / f"code-{run}"))
        words = flags(data, tmp_path / run, **settings, cache_dir=tmp_path / f"cache-{run}")
        if run == "two":
            logs.append(run_signalled(words, "finetune", 2, signal.SIGTERM).stdout)
            assert not (tmp_path / run / "summary.json").exists()
            words = ["--resume", "--output", str(tmp_path / run)]
        done = subprocess.run([sys.executable, "-m", "engine.train", *words], cwd=ROOT, text=True, capture_output=True,
                              check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr
        logs.append(done.stdout)
    assert "Resuming 'finetune'" in logs[2]
    assert all(re.search(r"torch.compile: [1-9] graphs in", logs[i]) for i in (0, 2))
    assert_same_models(tmp_path / "one", tmp_path / "two")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 5e-2)])  # sums in another order; 8 bits
@families
def test_on_a_gpu(family, precision, tolerance):
    """Without dropout, whose masks are the compiler's own there; with it, a pass repeats itself bit for bit."""
    given, compiled = batch(8, 24).to(torch.device("cuda")), CompiledLayers()
    for dropout in (0.0, 0.1):
        networks = [encoder(c, precision, family=family, width=64, dropout=dropout) for c in (compiled, None)]
        for network in networks:
            network.module.cuda()
        found, again, plain = (forward_and_backward(n, given, True) for n in (networks[0], networks[0], networks[1]))
        assert torch.equal(found[0], again[0])
        if not dropout:
            assert (found[0] - plain[0]).norm() <= tolerance * plain[0].norm()
            assert (found[1] - plain[1]).norm() <= tolerance * plain[1].norm()


def test_the_command(tmp_path, monkeypatch, capsys):
    """What a run with --compile says, and that its students are trained; the backend is exchanged for speed."""
    monkeypatch.setenv("METADISTIL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("engine.run.members.CompiledLayers", lambda: CompiledLayers("eager"))
    data = table(tmp_path / "d.tsv", sentences())
    run = succeed(data, tmp_path / "run", method="kd", compile=True, teachers="bert", student="tinybert")
    said = " ".join(capsys.readouterr().out.split())
    assert "torch.compile: encoder layers in training passes (the student's and the teachers')" in said
    assert re.search(r"torch.compile: [2-9] graphs in \d+ s", said)
    plain = succeed(data, tmp_path / "plain", method="kd", teachers="bert", student="tinybert")
    assert "torch.compile" not in capsys.readouterr().out
    assert len(list((tmp_path / "cache" / "teachers").iterdir())) == 2, (
        "teachers prepared with and without it are not the same"
    )
    assert_same_models(run, plain)
