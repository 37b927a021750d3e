"""Metrics against numbers worked out by hand, and predictions in the order of the split."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from engine.batch import Batch
from engine.data.splits import Task
from engine.models.network import Encoder
from engine.run.evaluation import predict, primary, score

BINARY = SimpleNamespace(kind="classification", num_labels=2, metric=None)
THREE = SimpleNamespace(kind="classification", num_labels=3, metric=None)
RANKS = 2e-6  # torchmetrics adds 1e-6 to the denominator of Spearman's correlation, which few rows do not outweigh
REGRESSION = SimpleNamespace(kind="regression", num_labels=1, metric=None)


def votes(classes, num_labels):
    """Logits whose largest entry is at `classes`."""
    return torch.nn.functional.one_hot(torch.tensor(classes), num_labels) * 2.0 - 0.5


SCORES = {
    # class 1: 3 hits, 1 false alarm, 2 misses; class 0: 4 right. MCC (12 - 2) / sqrt(4 * 5 * 5 * 6)
    "two classes": ([1, 1, 1, 0, 0, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0, 0, 0], BINARY, (7 / 10, 6 / 9, 10 / 600**0.5)),
    # confusion (rows are labels) [[2, 1, 0], [0, 1, 1], [1, 0, 3]]: per class F1 4/6, 2/4, 6/8. MCC for several classes
    # (Gorodkin 2004): (c s - sum p t) / sqrt((s^2 - sum p^2)(s^2 - sum t^2)) with c = 6 right of s = 9, predicted
    # p = 3, 2, 4 and true t = 3, 2, 4 times: (54 - 29) / (81 - 29)
    "three classes": ([0, 0, 1, 1, 2, 0, 2, 2, 2], [0, 0, 0, 1, 1, 2, 2, 2, 2], THREE,
                      (6 / 9, (4 / 6 + 2 / 4 + 6 / 8) / 3, 25 / 52)),
    # CoLA's development set, and a model that accepts everything
    "lopsided": ([1] * 1043, [1] * 721 + [0] * 322, BINARY, (721 / 1043, 1442 / 1764, 0)),
}  # fmt: skip


@pytest.mark.parametrize("name", SCORES)
def test_classes(name):
    predicted, labels, task, expected = SCORES[name]
    got = score(votes(predicted, task.num_labels), torch.tensor(labels), task)
    assert got == pytest.approx(dict(zip(("accuracy", "f1", "matthews"), expected, strict=True)), abs=1e-6)
    assert next(iter(got)) == primary(task) == "accuracy"


@pytest.mark.parametrize("metric", ["accuracy", "f1", "matthews"])
def test_the_metric_of_a_task_is_the_first(metric):
    task = Task("classification", ("no", "yes"), False, metric=metric)
    got = score(votes([0, 0, 1], 2), torch.tensor([0, 1, 1]), task)
    assert next(iter(got)) == primary(task) == metric
    assert got == score(votes([0, 0, 1], 2), torch.tensor([0, 1, 1]), BINARY)


REGRESSIONS = {
    # deviations from the means (2.5) -1.5 -.5 .5 1.5 and -1.5 .5 -.5 1.5: 4 / 5. Errors 0 1 1 0
    "ranks and values": ([1, 2, 3, 4], [1, 3, 2, 4], (0.8, 0.8, 0.5)),
    # ranks agree (1, 2, 3.5, 3.5: ties share one), values do not: deviations -5.25 -4.25 4.75 4.75 and -1.25 -0.25 0.75 0.75
    "ranks alone": ([0, 1, 10, 10], [1, 2, 3, 3], (14.75 / (90.75 * 2.75) ** 0.5, 1, 25)),
    "a constant": ([0.5] * 5, [0, 1, 2, 3, 4], (0, 0, 4.25)),
}


@pytest.mark.parametrize("name", REGRESSIONS)
def test_regression(name):
    predicted, labels, expected = REGRESSIONS[name]
    got = score(torch.tensor(predicted).float()[:, None], torch.tensor(labels).float(), REGRESSION)
    assert got == pytest.approx(dict(zip(("pearson", "spearman", "mse"), expected, strict=True)), abs=RANKS)
    assert next(iter(got)) == primary(REGRESSION) == "pearson"


class Sums(nn.Module):
    """Logits [sum of the ids, number of ids]: exact in float32, not in bf16. Dropout would show, and so would autocast."""

    def __init__(self):
        super().__init__()
        self.dropout, self.out, self.cast = nn.Dropout(0.9), nn.Linear(2, 2, bias=False), []
        nn.init.eye_(self.out.weight)

    def forward(self, input_ids, attention_mask):
        self.cast.append(torch.is_autocast_enabled("cpu"))
        facts = torch.stack([(input_ids * attention_mask).sum(1), attention_mask.sum(1)], 1).float()
        return SimpleNamespace(logits=self.out(self.dropout(facts)))


class Rows:
    """What `predict` asks of a split: rows of different length, padded with an id that must not count."""

    def __init__(self, n, break_at=None):
        self.lengths = np.random.default_rng(0).integers(1, 9, n)
        self.ids = [torch.arange(k) + 1001 * (i + 1) for i, k in enumerate(self.lengths)]
        self.labels, self.break_at, self.asked = torch.zeros(n, dtype=torch.int64), break_at, []

    def __len__(self):
        return len(self.ids)

    def only(self, keys):
        assert keys == {"words"}
        return self

    def batch(self, rows):
        if self.break_at in rows:
            raise RuntimeError("broken")
        self.asked += rows
        ids = nn.utils.rnn.pad_sequence([self.ids[r] for r in rows], batch_first=True, padding_value=777)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(self.ids[r]) for r in rows], batch_first=True)
        return Batch(self.labels[rows], {"words": {"input_ids": ids, "attention_mask": mask}})


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_predict(precision, train):
    split, network = Rows(150), Encoder("student", Sums().train(train), "words", precision)
    state = torch.get_rng_state()
    got = predict(network, split, torch.device("cpu"))
    assert torch.equal(got, torch.tensor([[ids.sum(), len(ids)] for ids in split.ids], dtype=torch.float32))
    assert not got.requires_grad
    assert sorted(split.asked) == list(range(150)) and split.asked != sorted(split.asked)
    assert not any(network.module.cast), "float32 arithmetic, whatever the training precision is"
    assert network.precision == precision
    assert all(m.training == train for m in network.module.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_predict_restores_after_an_error():
    network = Encoder("student", Sums().train(), "words", "bf16")
    with pytest.raises(RuntimeError, match="broken"):
        predict(network, Rows(150, break_at=149), torch.device("cpu"))
    assert network.precision == "bf16" and network.module.training
