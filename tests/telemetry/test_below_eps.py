"""The share of a meta-gradient that is below its optimizer's eps: counted right, logged, and warned of once."""

import pytest
import torch
from run_helpers import metrics, succeed_saying, summary
from torch import nn

from engine.models.learner import Learner
from engine.models.network import Network
from engine.telemetry.below_eps import SAMPLE, count_below


@pytest.mark.parametrize("width", [768, SAMPLE, 1 << 10])
def test_a_sample_has_the_share_of_the_whole(width):
    """Of a matrix as wide as a stride could be, whose columns are zero, below eps, or above it: 1/2, 1/8 and 3/8."""
    columns = torch.arange(width) % 8
    row = torch.where(columns < 4, 0.0, torch.where(columns == 4, -1e-9, -1.0))
    reached, below = count_below(row.repeat(64 * SAMPLE // width), 1e-8).tolist()
    assert below / reached == pytest.approx(1 / 4, abs=0.02) and reached == pytest.approx(SAMPLE / 2, rel=0.05)


def test_an_update_counts_what_the_optimizer_is_given():
    """The clipped gradient, update by update, where there is an eps at all; what is 0 or not finite is not counted."""
    found = []
    for optimizer, watched in ((torch.optim.AdamW, True), (torch.optim.AdamW, False), (torch.optim.SGD, True)):
        module = nn.Linear(4, 1, bias=False)
        learner = Learner(Network(module), optimizer(module.parameters(), lr=0.1), None, 1e-5, watched=watched)
        for gradient in ([0.0, 1e-9, 1e-2, 10.0], [0.0, 1e-9, 2e-9, 0.0], [float("inf"), 1.0, 1.0, 1.0]):
            learner.network.flat.gradients[:4] = torch.tensor(gradient)
            learner.update()
        found.append(learner.below_eps)
    assert found[0].tolist() == [3 + 2, 2 + 2] and found[1:] == [None, None]


def test_a_run_says_it(data, tmp_path):
    run, said = succeed_saying(data, tmp_path / "run", pilot_lr=1e-7, max_steps=4, log_steps=2)
    shares = [line["below_eps/bert"] for line in metrics(run) if line["phase"] == "metadistil" and "loss" in line]
    assert len(shares) == 2 and all(0.9 < share <= 1 for share in shares)
    (warning,) = (w for w in summary(run)["warnings"] if "eps" in w)
    assert f"{shares[0]:.1%} of teacher bert's meta-gradient, up to step 2," in warning and "--pilot-lr" in warning
    assert f"Teacher bert: {shares[1]:.1%} of its last meta-gradients below its optimizer's eps of 1e-08." in said
