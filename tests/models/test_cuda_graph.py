"""Captured steps against eager ones, bit for bit, over a CPU's simulation of CUDA graphs (graph_simulator.py)."""

import pytest
import torch
from graph_simulator import SimulatedCapture
from graph_training import DRAWN_AGAIN, METHODS_AND_SETTINGS, Training, as_eager, skip_what_is_not_finite
from run_helpers import assert_same_models, metrics, succeed

from engine import kernels
from engine.batch import Batch
from engine.errors import UserError
from engine.models import cuda_graph
from engine.models.cuda_graph import StepGraphs
from engine.models.network import Network
from engine.params import optim
from engine.run import trainer

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Plain operations, which the simulation sees, and no rows of tables, whose number depends on the data."""
    monkeypatch.setenv("ENGINE_KERNELS", "reference")
    monkeypatch.setattr(Network, "table_rows", None)
    monkeypatch.setattr(kernels.ops.common.checks, "check_labels", lambda *_, **__: None)


@pytest.mark.parametrize("name", METHODS_AND_SETTINGS)
def test_replays_are_eager_steps_bit_for_bit(name):
    capture = SimulatedCapture()
    graphs = as_eager(*METHODS_AND_SETTINGS[name], capture, steps=8).graphs
    assert graphs.cause is None, graphs.cause
    assert capture.captures == graphs.captured == 2
    assert (capture.warm, capture.replays) == (5, 3)


@pytest.mark.parametrize("name", DRAWN_AGAIN)
def test_masks_that_are_drawn_again_run_eagerly_and_it_is_said_once(name):
    capture = SimulatedCapture()
    training = as_eager("metadistil", DRAWN_AGAIN[name], capture, steps=7)
    assert capture.captures == capture.replays == 0
    assert "dropout masks twice" in training.graphs.cause
    (said,) = training.said
    assert said.startswith("CUDA graphs: not used, since a CUDA graph cannot draw") and "run eagerly" in said


@pytest.mark.parametrize(
    ("operation", "precision"), [(0, "fp32"), (40, "fp32"), (400, "fp32"), (1200, "fp32"), (400, "bf16")]
)
def test_a_broken_capture_leaves_no_trace(operation, precision):
    """It breaks in the teachers' forward, the pilot, the excursion, or the real step; the run goes on as if eager."""
    capture = SimulatedCapture(broken=lambda now: now == operation)
    training = as_eager("metadistil", {"precision": precision}, capture, steps=7)
    assert training.graphs.cause == "the capture was broken" and capture.replays == 0


def test_on_fails_where_a_capture_does():
    training = Training("metadistil", SimulatedCapture(broken=lambda now: now == 40), mode="on")
    with pytest.raises(
        UserError, match="--cuda-graphs on, but the step cannot be captured: the capture was broken; use"
    ):
        training.run()


def test_on_needs_cuda():
    with pytest.raises(UserError, match="--cuda-graphs on needs a CUDA device, and this run is on cpu"):
        StepGraphs(lambda batches: {}, CPU, "on")
    assert StepGraphs(lambda batches: {}, CPU, "auto").cause == "the device is cpu"
    assert StepGraphs(lambda batches: {}, CPU, "off", capture=SimulatedCapture()).cause == "they are switched off"
    with pytest.raises(ValueError, match="mode is 'maybe'"):
        StepGraphs(lambda batches: {}, CPU, "maybe")


@pytest.mark.parametrize("mode", ["auto", "off"])
def test_non_finite_steps_are_skipped_in_a_replay_too(mode):
    training = Training("metadistil", SimulatedCapture(), mode)
    skip_what_is_not_finite(training)
    assert training.graphs.captured == (2 if mode == "auto" else 0)


# Inputs


def toy(capture=None, **settings):
    """A step that counts in a weight, and says what it was given."""
    total = torch.zeros(())

    def step(batches, quizzes=()):
        total.add_(batches[0].labels.sum())
        return {"total": total.clone(), "first": batches[0].inputs["words"]["input_ids"].sum().float()}

    return StepGraphs(step, CPU, capture=capture or SimulatedCapture(), **settings), total


def words(size=3, length=2, dtype=torch.int64, value=1):
    return Batch(torch.full((size,), 2.0), {"words": {"input_ids": torch.full((size, length), value, dtype=dtype)}})


def test_first_calls_are_steps_and_each_shape_has_its_graph():
    """What a caller does with a batch afterwards is none of the graph's, and values of a replay outlive the next."""
    capture = SimulatedCapture()
    step, total = toy(capture)
    values = []
    for i in range(6):
        batch = words(value=i)
        values.append(step([batch], []))
        batch.labels.zero_()
        assert values[-1]["total"] == total == 6 * (i + 1)
    assert [v["first"].item() for v in values] == [6 * i for i in range(6)]
    assert [v["total"].item() for v in values] == [6 * i + 6 for i in range(6)]
    assert (capture.warm, capture.captures, capture.replays) == (3, 1, 3)
    for i in range(3):  # another shape: one step as it is
        assert step([words(length=4, value=i)], [])["first"] == 12 * i
    assert (capture.warm, capture.captures, capture.replays) == (4, 2, 5)
    step([words()], [])
    assert capture.captures == step.captured == 2


@pytest.mark.parametrize(("other", "says"), [
    (words(size=5), r"batches\[0\].labels is float32 \[5\] .* captured with float32 \[3\]"),
    (words(length=7), r"batches\[0\].inputs\['words'\]\['input_ids'\] is int64 \[3, 7\] .* int64 \[3, 2\] on cpu"),
    (words(dtype=torch.int32), r"\['input_ids'\] is int32 \[3, 2\] .* int64 \[3, 2\]"),
])  # fmt: skip
def test_a_graph_names_the_input_that_changed(other, says):
    graph = cuda_graph.Graph(toy()[0].step, ([words()], []), SimulatedCapture())
    with pytest.raises(ValueError, match=f"{says}.*one shape, dtype and device"):
        graph([other], [])
    with pytest.raises(ValueError, match="structure"):
        graph([words(), words()], [])
    assert graph([words()], [])["first"] == 6


def test_inputs_elsewhere_are_named():
    elsewhere, learning = words(), words()
    elsewhere.inputs["words"]["input_ids"] = elsewhere.inputs["words"]["input_ids"].to("meta")
    learning.labels.requires_grad_()
    for given, says in ((elsewhere, r"inputs\['words'\]\['input_ids'\] is int64 .* on meta; .* on cpu"),
                        (learning, "labels is .*that requires grad")):  # fmt: skip
        with pytest.raises(ValueError, match=rf"batches\[0\].{says}"):
            toy()[0]([given], [])


def test_there_is_an_end_to_graphs(monkeypatch):
    monkeypatch.setattr(cuda_graph, "MOST", 2)
    said, capture = [], SimulatedCapture()
    step, _ = toy(capture, say=said.append)
    for length in (2, 3, 4, 5, 2):
        for _ in range(5):
            step([words(length=length)], [])
    assert step.captured == 2 and step.cause is None and capture.replays == 2 + 4 + 5
    assert said == ["CUDA graphs: 2 shapes are captured; further ones run eagerly."]


# Whole runs


@pytest.mark.slow
@pytest.mark.parametrize("method", ["finetune", "kd", "metadistil", "lgtm", "reptile"])
def test_a_whole_run_is_the_same(method, data, tmp_path, monkeypatch):
    """Teachers prepared, student distilled, interrupted by validations, with its schedule: every model is bit for bit that
    of an eager run. Learning rates are numbers on a CPU; made tensors, as on a GPU, they have other last bits, so both."""
    made = []

    def adamw(kind, flat, lr, weight_decay):
        return optim_adamw(kind, flat, torch.tensor(lr), weight_decay)

    def graphs(*args, **kwargs):
        made.append(StepGraphs(*args, **kwargs, capture=SimulatedCapture()))
        return made[-1]

    optim_adamw = optim.adamw
    monkeypatch.setattr(optim, "adamw", adamw)
    settings = {"method": method, "eval_steps": 5, "epochs": 6, "batch_size": 8, "length_buckets": 2}
    eager = succeed(data, tmp_path / "eager", cache_dir=tmp_path / "eager-cache", **settings)
    monkeypatch.setattr(trainer, "StepGraphs", graphs)
    graphed = succeed(data, tmp_path / "graphed", cache_dir=tmp_path / "graphed-cache", **settings)
    assert_same_models(eager, graphed)
    assert [g.cause for g in made] == [None] * len(made) and made[-1].captured
    assert sum(g._capture.replays for g in made) > 20
    assert [row.get("loss") for row in metrics(eager)] == [row.get("loss") for row in metrics(graphed)]
