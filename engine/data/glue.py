"""The tasks of GLUE (Wang et al. 2019): their names, the metric that each is measured by, and metrics for other data."""

from __future__ import annotations

from pathlib import Path

from engine.errors import UserError

REPOSITORY = "nyu-mll/glue"

# The metric of the benchmark's table; of two, the one that the published tables of distillation put first.
METRICS = {
    "sst2": "accuracy", "cola": "matthews", "mrpc": "f1", "rte": "accuracy", "stsb": "pearson", "qqp": "f1",
    "mnli": "accuracy", "qnli": "accuracy", "wnli": "accuracy",
}  # fmt: skip
# F1 is of class 1, which must be the benchmark's also where a local file has words that the alphabet orders otherwise.
CLASSES = {"mrpc": ("not_equivalent", "equivalent"), "qqp": ("not_duplicate", "duplicate")}
OF_KIND = {"classification": ("accuracy", "f1", "matthews"), "regression": ("pearson", "spearman")}


def spelt(name: str) -> str:
    """A name as the table has it: SST-2 is sst2."""
    return name.lower().replace("-", "")


def task_of(data: str) -> str | None:
    """Which task `--data` is: by its name, the configuration of the benchmark on the hub, or a path's last part."""
    name = data.removeprefix(f"{REPOSITORY}:")
    if name == data and ("/" in data or "\\" in data):
        path = Path(data).expanduser()
        name = path.name if path.is_dir() else ""
    return spelt(name) if spelt(name) in METRICS else None


def choose_metric(given: str, kind: str, glue: str | None) -> str:
    """The metric of `--metric` for a task of this kind; raises UserError for one of the other kind.

    Auto is GLUE's own for one of its tasks, where that fits, else the kind's first.
    """
    allowed = OF_KIND[kind]
    if given == "auto":
        own = METRICS.get(glue)
        return own if own in allowed else allowed[0]
    if given not in allowed:
        other = next(k for k in OF_KIND if k != kind)
        raise UserError(
            f"--metric {given} is a metric of a {other}, and this is a {kind}; use {' or '.join(allowed)}, or --task {other}."
        )
    return given
