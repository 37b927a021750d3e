"""--compile: compiled encoder layers give what the eager ones give, in the passes that they are for, and compile once."""

import re
import signal
from functools import partial

import pytest
import small_models
import torch
from graph_training import Training
from run_helpers import assert_same_models, flags, run_signalled, sentences, start, succeed_saying, table
from small_models import batch, forward_and_backward
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import counters
from transformers import AlbertConfig, AlbertForSequenceClassification

from engine.errors import UserError
from engine.models import compiling
from engine.models.checkpointing import checkpointed
from engine.models.compiling import LARGE, LIMIT, SIZES, CompiledLayers
from engine.models.features import InnerStates
from engine.models.network import Encoder
from engine.models.teacher_params import restrict
from engine.params.flat import Lookups

LAYERS = 3
families = pytest.mark.parametrize("family", ["bert", "distilbert"])
encoder = partial(small_models.encoder, layers=LAYERS, positions=520)


@pytest.fixture(autouse=True)
def forgotten():
    """Nothing is compiled before a test; the counters are its own."""
    torch._dynamo.reset()
    counters.clear()


class Counted(CompiledLayers):
    """Counts the layers that it runs."""

    calls = 0

    def __call__(self, *args):
        self.calls += 1
        return super().__call__(*args)


def assert_agree(one, two, tolerance):
    assert (one[0] - two[0]).norm() <= tolerance * two[0].norm()
    assert (one[1] - two[1]).norm() <= tolerance * two[1].norm()
    assert torch.equal(one[2], two[2]), "other random numbers were drawn"


# What is compiled, and what it computes; dynamo's graphs run by torch


@pytest.mark.parametrize(
    ("family", "train", "choice", "graphs"),
    [
        ("bert", True, "all", 1),
        ("distilbert", True, "all", 1),
        ("bert", False, "last-1", 1),
        ("bert", False, "lora:2", 2),  # the first layer's input takes no gradient
    ],
)
def test_values_gradients_and_masks_are_the_eager_ones(family, train, choice, graphs):
    """Also where transformers has left hooks inside the layers, as it does when it first gives hidden states; dynamo cannot
    trace them."""
    compiled, given = Counted("eager"), batch(family)
    networks = network, plain = encoder(family, compiled=compiled), encoder(family)
    for each in networks:
        restrict(each.module, choice).train(train)
        each.flatten()
    assert_agree(forward_and_backward(network, given), forward_and_backward(plain, given), 1e-6)
    assert compiled.calls == LAYERS - 1 and compiled.spent()[0] == graphs
    features = []
    for each in networks:
        each.inner = InnerStates(token=(1, 2))
        each(given, precision="fp32")
        torch.manual_seed(1)
        features.append(each(given).features)
    torch.testing.assert_close(*features)
    hooks, expected = (len([m for m in each.module.modules() if m._forward_hooks]) for each in networks)
    assert hooks == expected > LAYERS and compiled.spent()[0] == graphs


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, True), ({"repeated": True}, False), ({"higher": True}, False), ({"precision": "fp32"}, False)],
    ids=str,
)
def test_which_passes_are_compiled(settings, expected):
    compiled = Counted("eager")
    network = encoder(compiled=compiled)
    with torch.no_grad():
        found = network(batch(), **settings).logits
        assert compiled.calls == (LAYERS - 1 if expected else 0)
        torch.testing.assert_close(found, network(batch(), precision="fp32").logits)


def test_a_batch_of_one_runs_as_it_is():
    compiled, plain = Counted("eager"), encoder()
    network = encoder(compiled=compiled)
    for given in (batch(size=1), batch(length=1)):
        assert_agree(forward_and_backward(network, given), forward_and_backward(plain, given), 1e-6)
    assert compiled.calls == 2 * (LAYERS - 1) and compiled.spent()[0] == 0


def test_layers_are_left_as_they_were():
    """Also after an error."""
    network = encoder(compiled=CompiledLayers("eager"))
    before = [dict(layer.__dict__) for layer in network.module.bert.encoder.layer]
    network(batch())
    network.module.classifier = None
    with pytest.raises(TypeError):
        network(batch())
    assert [dict(layer.__dict__) for layer in network.module.bert.encoder.layer] == before


def test_no_size_makes_a_graph_of_its_own():
    """All kinds of passes once, then 11 of any size; weights move between them, and bf16 ones stand in for the module's."""
    compiled = Counted("eager")
    networks = [encoder("bert", "bf16", compiled, layers=n) for n in (2, 3)]  # models of one shape share graphs
    kinds = [(train, grad) for train in (False, True) for grad in (False, True)]

    def passes(network, given, train, grad):
        network.module.train(train)
        with torch.set_grad_enabled(grad):
            logits = network(given).logits
        if grad:
            network.flat.backward([logits.sum()], None, network.leaves(), Lookups())
            with torch.no_grad():
                network.flat.weights.add_(network.flat.gradients, alpha=-0.01)
            network.flat.clear_gradients()

    for kind in kinds:
        passes(networks[0], batch(size=9), *kind)
    graphs = compiled.spent()[0]
    assert graphs == len(kinds)
    sizes = torch.randint(1, 40, (8, 2), generator=torch.Generator().manual_seed(0)).tolist()
    for i, (size, length) in enumerate([(64, 65), (2, 2), (32, 64), *sizes]):
        passes(networks[i % 2], batch("bert", length, size), *kinds[i % 4 if i % 8 < 4 else i % 3])
    assert compiled.spent()[0] == graphs


@pytest.mark.parametrize(("size", "expected"), [((2, 5), SIZES), ((70, 60), LARGE)], ids=str)
def test_code_is_made_for_the_same_sizes_whatever_comes_first(size, expected):
    hints = []

    def backend(graph, inputs):
        hints.append({x.node.hint for x in inputs if isinstance(x, torch.SymInt)})
        return graph

    assert (size[0] * size[1] > LIMIT) == (expected == LARGE)
    network = encoder(compiled=CompiledLayers(backend))
    network.module.train()
    forward_and_backward(network, batch("bert", size[1], size[0]))
    assert hints == [set(expected)]


def test_more_kinds_than_expected_are_an_error(monkeypatch):
    """torch's own answer is to go on without compiling."""
    monkeypatch.setattr(compiling, "GRAPHS", 1)
    network = encoder(compiled=CompiledLayers("eager"))
    network(batch())
    with torch.no_grad(), pytest.raises(FailOnRecompileLimitHit):
        network(batch())


@pytest.mark.parametrize(("method", "precision", "calls"), [("kd", "bf16", 6), ("metadistil", "fp32", 10)])
def test_steps_of_methods(method, precision, calls):
    """With dropout, whose masks are those of eager passes; a meta-step's pilot is not compiled, its teachers and quiz are."""
    compiled, losses, weights = Counted("eager"), [], []
    for each in (compiled, None):
        training = Training(method, mode="off", precision=precision, compiled=each)
        losses.append(torch.stack([values["loss"] for values in training.run(2)]))
        weights.append(training.state.student.network.flat.weights)
    # of 2 steps and the first of two layers: the student's, and those of two teachers; the teachers' twice and the quiz
    assert compiled.calls == calls
    torch.testing.assert_close(*losses, rtol=1e-3 if precision == "bf16" else 1e-5, atol=0)
    # bf16: gradients that are nearly zero change sign, and AdamW makes whole steps of them
    assert (weights[0] - weights[1]).norm() <= (2e-2 if precision == "bf16" else 1e-4) * weights[1].norm()


# What is refused


def test_checkpointing_is_refused():
    network = encoder(compiled=CompiledLayers("eager"))
    with checkpointed(network.module), pytest.raises(ValueError, match="activation checkpointing"):
        network(batch())
    with checkpointed(network.module):
        assert network(batch(), repeated=True).logits.isfinite().all()


def test_a_model_whose_layers_are_not_known():
    albert = AlbertForSequenceClassification(AlbertConfig(
        vocab_size=30, embedding_size=4, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2
    ))  # fmt: skip
    with pytest.raises(UserError, match="^--compile knows the layers of bert, .* and mine is a albert; leave it out.$"):
        Encoder("mine", albert, "own", compiled=CompiledLayers("eager"))
    Encoder("mine", albert, "own")


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["none", "broken"])
def test_without_a_compiler(compiler, tmp_path, monkeypatch):
    """Also where the cache holds what was compiled before; nothing is made of the run."""
    CompiledLayers().try_out(torch.device("cpu"))
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken if compiler == "broken" else tmp_path / "none"))
    monkeypatch.setenv("METADISTIL_NATIVE", "torch")
    data = table(tmp_path / "d.tsv", sentences())
    process = start(flags(data, tmp_path / "out", method="finetune", compile=True))
    said = process.communicate()[1]
    assert process.returncode == 2
    assert re.fullmatch(r"error: --compile needs a compiler .* leave it out\.\n", said), said
    assert not (tmp_path / "out").exists()


# inductor


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@families
def test_inductor_computes_the_same(family, precision):
    """Dropout included: on a CPU its masks are those of an eager pass. bf16 comes as near to fp32 as eager passes in bf16."""
    compiled = Counted()
    network, plain = (encoder(family, precision, c, width=32) for c in (compiled, None))
    exact = encoder(family, width=32)
    for train in (False, True):
        for given in (batch(family, 12, 5), batch(family, 16, 32)):
            for each in (network, plain, exact):
                each.module.train(train)
            found, eager, fp32 = (forward_and_backward(each, given) for each in (network, plain, exact))
            if precision == "fp32":
                assert_agree(found, eager, 1e-5)  # fused sums are taken in another order
            else:
                for ours, theirs, true in zip(found[:2], eager[:2], fp32[:2], strict=True):
                    # 3: of a dozen logits, by luck, the one's roundings cancel and the other's do not
                    assert (ours - true).norm() <= 3 * (theirs - true).norm()
                assert torch.equal(found[2], eager[2])
            with torch.no_grad():
                torch.manual_seed(1)
                assert (network(given).logits - found[0]).norm() <= 3e-2 * found[0].norm()
    assert compiled.spent()[0] == 4


@pytest.mark.slow
def test_inductor_makes_no_graph_for_a_size():
    """But for more than LIMIT tokens, and for the fused attention of 64 tokens and more."""
    compiled = Counted()
    network = encoder(compiled=compiled, dropout=0.0)
    network.module.train()
    for size, length in ((4, 9), (4, 70), (64, 70)):
        forward_and_backward(network, batch("bert", length, size))
    graphs = compiled.spent()[0]
    sizes = torch.randint(2, 100, (50, 2), generator=torch.Generator().manual_seed(0)).tolist()
    for size, length in [(100, 60), (64, 64), (65, 63), *sizes]:
        forward_and_backward(network, batch("bert", length, size))
    assert compiled.spent()[0] <= graphs + 1  # many short examples


@pytest.mark.slow
def test_inductor_gives_the_same_bits_whatever_comes_first():
    """In bf16, where without a first call of a size of its own the sums of (2, 9) first were other ones."""
    from torch._inductor.utils import fresh_cache

    found = []
    for size, length in ((32, 64), (2, 9)):
        torch._dynamo.reset()
        network = encoder("bert", "bf16", CompiledLayers(), width=384, layers=2)
        network.module.train()
        with fresh_cache():
            forward_and_backward(network, batch("bert", length, size))
            found.append(forward_and_backward(network, batch("bert", 40, 32)))
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
        process = start(words)
        logs.append(process.communicate()[0])
        assert process.returncode == 0
    assert "Resuming 'finetune'" in logs[2]
    assert all(re.search(r"torch.compile: [1-9] graphs in", logs[i]) for i in (0, 2))
    assert_same_models(tmp_path / "one", tmp_path / "two")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 5e-2)])  # sums in another order; 8 bits
@families
def test_on_a_gpu(family, precision, tolerance):
    """Without dropout, whose masks are the compiler's own there; with it, a pass repeats itself bit for bit."""
    given, compiled = batch(family, 24, 8).to(torch.device("cuda")), CompiledLayers()
    for dropout in (0.0, 0.1):
        networks = [encoder(family, precision, c, width=64, dropout=dropout) for c in (compiled, None)]
        for network in networks:
            network.module.cuda().train()
        found, again, plain = (forward_and_backward(n, given) for n in (networks[0], networks[0], networks[1]))
        assert torch.equal(found[0], again[0])
        if not dropout:
            assert (found[0] - plain[0]).norm() <= tolerance * plain[0].norm()
            assert (found[1] - plain[1]).norm() <= tolerance * plain[1].norm()


@pytest.mark.slow
def test_the_command(data, tmp_path, monkeypatch):
    """What a run with --compile says, and that its students are trained; the backend is exchanged for speed."""
    monkeypatch.setenv("METADISTIL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("engine.run.members.CompiledLayers", lambda: CompiledLayers("eager"))
    settings = {"method": "kd", "teachers": "bert", "student": "tinybert"}
    run, said = succeed_saying(data, tmp_path / "run", **settings, compile=True)
    said = " ".join(said.split())
    assert "torch.compile: encoder layers in training passes (the student's and the teachers')" in said
    assert re.search(r"torch.compile: [2-9] graphs in \d+ s", said)
    plain, said = succeed_saying(data, tmp_path / "plain", **settings)
    assert "torch.compile" not in said
    prepared = list((tmp_path / "cache" / "teachers").iterdir())
    assert len(prepared) == 2, "teachers prepared with and without it are not the same"
    assert_same_models(run, plain)
