"""Logits of a split and the metrics of its kind of task, through torchmetrics."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional import (
    accuracy,
    f1_score,
    matthews_corrcoef,
    mean_squared_error,
    pearson_corrcoef,
    spearman_corrcoef,
)

from engine.data.batches import evaluation_batches
from engine.data.encoded import EncodedSplit
from engine.data.splits import Task
from engine.models.features import InnerStates
from engine.models.network import Network
from engine.models.precision import ieee
from engine.sections import section

EVALUATION_BATCH = 64


@section("evaluation")
@torch.no_grad()
def predict(network: Network, split: EncodedSplit, device: torch.device) -> Tensor:
    """Logits [n, C] on the CPU in the split's order, in float32 arithmetic whatever the training precision is.

    So validation, export and a user's own float32 evaluation see the same numbers.
    """
    split, logits = split.only({network.encoding}), None
    with network.in_mode(train=False), network.giving(InnerStates()), ieee():
        for rows, batch in evaluation_batches(split, EVALUATION_BATCH):
            out = network(batch.to(device), precision="fp32").logits
            logits = out.new_empty(len(split), out.shape[1]) if logits is None else logits
            logits[torch.tensor(rows, device=device)] = out
    return logits.cpu()  # sync: an evaluation's end


def score(logits: Tensor, labels: Tensor, task: Task) -> dict[str, float]:
    """Metrics by name, the task's primary metric first. F1 is of class 1 with two classes, macro with more."""
    if task.kind == "regression":
        values = logits.squeeze(-1)
        metrics = {
            "pearson": pearson_corrcoef(values, labels),
            "spearman": spearman_corrcoef(values, labels),
            "mse": mean_squared_error(values, labels),
        }
    else:
        kind = {"task": "binary"} if task.num_labels == 2 else {"task": "multiclass", "num_classes": task.num_labels}
        predictions = logits.argmax(-1)
        metrics = {
            "accuracy": accuracy(predictions, labels, average="micro", **kind),
            "f1": f1_score(predictions, labels, average="macro", **kind),  # `average` is ignored with two classes
            "matthews": _matthews(predictions, labels, kind),
        }
    metrics = {primary(task): metrics[primary(task)], **metrics}
    # float32 has no more than six digits; a correlation of constant predictions is undefined and counts as none
    return {name: round(float(value.nan_to_num(0.0)), 6) for name, value in metrics.items()}


def _matthews(predictions: Tensor, labels: Tensor, kind: dict) -> Tensor:
    """Matthews' correlation; 0 where one side is constant, of which torchmetrics 1.9 makes 0.03 on CoLA."""
    if len(predictions.unique()) == 1 or len(labels.unique()) == 1:
        return torch.zeros(())
    return matthews_corrcoef(predictions, labels, **kind)


def by_domain(logits: Tensor, split: EncodedSplit, task: Task) -> dict[str, dict[str, float]]:
    """`score` of the examples of each domain that `split` has any of."""
    domains = split.columns["domain"]
    rows = {name: domains == k for k, name in enumerate(task.domains)}
    return {name: score(logits[own], split.labels[own], task) for name, own in rows.items() if own.any()}


def primary(task: Task) -> str:
    """The metric a student is chosen by; higher is better."""
    return task.metric or ("pearson" if task.kind == "regression" else "accuracy")
