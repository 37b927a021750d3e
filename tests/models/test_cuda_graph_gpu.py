"""CUDA graphs where there is CUDA: replays against eager steps bit for bit, and what cannot be captured.

Imports little, so that it runs on a machine with few packages.
"""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts: products repeat bit for bit

import pytest
import torch
from graph_training import DRAWN_AGAIN, METHODS_AND_SETTINGS, Training, as_eager, draws, same, skip_what_is_not_finite

from engine.errors import UserError
from engine.models.cuda_graph import StepGraphs
from engine.params.optim import adamw

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def repeatable():
    """Fused attention sums in any order otherwise, and then no two eager runs agree either."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", METHODS_AND_SETTINGS)
def test_replays_are_eager_steps_bit_for_bit(name):
    """Ten steps with dropout, over two shapes."""
    graphs = as_eager(*METHODS_AND_SETTINGS[name], device="cuda").graphs
    assert graphs.cause is None, graphs.cause
    assert graphs.captured == 2


@pytest.mark.parametrize("name", METHODS_AND_SETTINGS)
def test_no_step_waits_for_the_device(name):
    """Eagerly, too: the host only launches."""
    method, settings = METHODS_AND_SETTINGS[name]
    training = Training(method, device="cuda", mode="off", **settings)
    training.run(2)  # the first one makes buffers, tunes kernels and copies constants
    batches, quizzes = ([b.to("cuda") for b in each] for each in draws()[0])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        training.graphs(batches, quizzes)
        training.state.advance(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_masks_differ_between_replays():
    """One batch again and again, nothing learnt: only dropout is left to make losses differ."""
    training = Training("finetune", device="cuda")
    for group in training.state.student.optimizer.param_groups:
        group["lr"].zero_()
    batch = [b.to("cuda") for b in draws()[0][0]]
    losses = {training.graphs(batch, [])["loss"].item() for _ in range(12)}
    assert training.graphs.captured == 1 and len(losses) == 12


def test_snapshots_in_pinned_memory():
    graphed = Training("metadistil", device="cuda", store="pinned")
    eager = Training("metadistil", device="cuda", mode="off", store="device")
    graphed.run(), eager.run()
    assert graphed.graphs.cause is None, graphed.graphs.cause
    assert same(graphed, eager)


@pytest.mark.parametrize("name", DRAWN_AGAIN)
def test_masks_that_are_drawn_again_run_eagerly(name):
    """The capture breaks off, and leaves the generator, the pool and the weights fit for use."""
    training = as_eager("metadistil", DRAWN_AGAIN[name], device="cuda")
    assert "dropout masks twice" in training.graphs.cause and len(training.said) == 1


def test_a_step_that_waits_for_the_device_runs_eagerly():
    total = torch.zeros((), device="cuda")

    def step(batches):
        total.add_(batches[0].sum())
        return {"total": total * float(total.item() >= 0)}

    said = []
    graphs = StepGraphs(step, torch.device("cuda"), say=said.append)
    for _ in range(6):
        graphs([torch.ones(3, device="cuda")])
    assert total.item() == 18 and graphs.captured == 0
    assert len(said) == 1 and said[0].startswith("CUDA graphs: not used, since")
    torch.nn.functional.dropout(torch.rand(4, device="cuda"))  # the generator serves again
    with pytest.raises(UserError, match="--cuda-graphs on, but the step cannot be captured"):
        graphs = StepGraphs(step, torch.device("cuda"), "on")
        for _ in range(6):
            graphs([torch.ones(3, device="cuda")])


def test_non_finite_steps_are_skipped_in_a_replay():
    training = Training("metadistil", device="cuda")
    skip_what_is_not_finite(training)
    assert training.graphs.captured == 2


@pytest.mark.parametrize("kind", ["flat", "torch"])
def test_optimizers_follow_their_schedule_in_a_replay(kind):
    """Their learning rates are device scalars that a schedule writes into."""
    trainings = [Training("kd", device="cuda", mode=mode) for mode in ("auto", "off")]
    for training in trainings:
        learner = training.state.student
        learner.optimizer = adamw(kind, learner.network.flat, 1e-2, weight_decay=0.1)
        learner.schedule = torch.optim.lr_scheduler.LambdaLR(learner.optimizer, lambda step: 0.8**step)
        training.run()
    assert trainings[0].graphs.cause is None, trainings[0].graphs.cause
    assert same(*trainings)


def test_a_pool_is_shared():
    """Ten shapes take little more memory than the largest: graphs are replayed one at a time."""
    device = torch.device("cuda")
    graphs = StepGraphs(lambda x: {"sum": (x @ x.T).relu().sum()}, device)
    reserved = []
    for size in (2048, *range(1024, 2048, 128)):
        x = torch.rand(size, size, device=device)
        for _ in range(5):
            graphs(x)
        reserved.append(torch.cuda.memory_reserved())
    assert graphs.captured == 9
    assert reserved[-1] < 2.5 * reserved[0]
