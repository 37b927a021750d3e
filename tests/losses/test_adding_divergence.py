"""A divergence from outside: one file, by its path or as an entry point of an installed distribution."""

import pytest
import torch
import torch.nn.functional as F
from outside import bring
from run_helpers import metrics, succeed
from torch import nn

from engine import MetaStep, Objective, cli
from engine.errors import UserError
from engine.losses.divergences import DIVERGENCES, Divergence
from engine.models.network import Outputs

SOURCE = '''
import torch.nn.functional as F

from engine.losses.divergences import Divergence


def soft(student, teacher, temperature):
    """Reverse KL: T^2 KL(student || teacher)."""
    p, q = (F.log_softmax(z / temperature, -1) for z in (student, teacher))
    return temperature**2 * F.kl_div(q, p, log_target=True, reduction="batchmean")


DIVERGENCE = Divergence(soft=soft, help="T^2 times the KL divergence the other way round")
'''
T, ALPHA = 3.0, 0.6


@pytest.fixture(params=[pytest.param("entry point", marks=pytest.mark.slow), "path"])
def backwards(request, tmp_path, monkeypatch):
    """The value of --soft-loss."""
    return bring(request.param, tmp_path, "divergences", "backwards", SOURCE, monkeypatch)


def test_the_loss_head_has_it(backwards):
    z, y, labels = torch.randn(4, 3).double(), torch.randn(4, 3).double(), torch.arange(4) % 3
    got = Objective(backwards, T, ALPHA).distil(Outputs(z), [Outputs(y)], labels)
    p, q = (z / T).softmax(-1), (y / T).softmax(-1)
    expected = ALPHA * T**2 * (p * (p / q).log()).sum() / 4 + (1 - ALPHA) * F.cross_entropy(z, labels)
    torch.testing.assert_close(got, expected)


def test_its_meta_gradient_is_exact(backwards):
    """By its second derivatives at the head, against a graph through the whole pilot step, in float64."""
    found, (x, labels) = [], (torch.randn(6, 5).double(), torch.arange(6) % 3)
    for strategy in ("exact", "double_backward"):
        torch.manual_seed(0)
        student, *teachers = (nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double() for _ in range(3))
        step = MetaStep(student, teachers, Objective(backwards, T, ALPHA), pilot_lr=0.3, strategy=strategy)
        step.meta_gradient([(x, labels)], [(x.flip(0), labels)])
        found.append(torch.cat([p.grad.flatten() for teacher in teachers for p in teacher.parameters()]))
    assert found[0].norm() > 1e-4
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-14)


SETTINGS = {"method": "metadistil", "log_steps": 1, "max_steps": 2}


@pytest.fixture(scope="module")
def usual(data, tmp_path_factory):
    return succeed(data, tmp_path_factory.mktemp("usual") / "run", **SETTINGS)


def test_a_run_by_it(backwards, usual, data, tmp_path):
    run = succeed(data, tmp_path / "run", soft_loss=backwards, **SETTINGS)
    losses = [
        [row["loss"] for row in metrics(r) if row["phase"] == "metadistil" and "loss" in row] for r in (run, usual)
    ]
    assert len(losses[0]) == 2 and losses[0] != losses[1]
    kept = cli.parse(["--config", str(run / "config.yaml")]).method.soft_loss
    assert kept in (backwards, str(tmp_path / backwards))  # a path is kept as one that can be read from anywhere


def test_what_is_none_is_refused(tmp_path):
    with pytest.raises(
        UserError, match="^--soft-loss is 'cosine'; it must be one of kl, mse_logits, mse_prob, or the path"
    ):
        cli.parse(["--soft-loss", "cosine"])
    (tmp_path / "silent.py").write_text("DIVERGENCE = Divergence(soft=print)")
    with pytest.raises(UserError, match="has no help= with a literal value"):
        cli.parse(["--soft-loss", str(tmp_path / "silent.py")])


@pytest.mark.parametrize("given", [
    {}, {"soft": print, "loss": print, "cotangents": print}, {"loss": print}, {"soft": print, "cotangents": print},
    {"loss": print, "cotangents": print, "regression": True},
])  # fmt: skip
def test_a_divergence_has_one_form(given):
    with pytest.raises(ValueError, match="divergence"):
        Divergence(help="none", **given)


def test_the_files_of_the_folder_are_the_divergences():
    assert set(DIVERGENCES) == {"kl", "mse_prob", "mse_logits"}
    assert {name for name, found in DIVERGENCES.items() if found.regression} == {"mse_logits"}
    assert DIVERGENCES["kl"].cotangents is not None
