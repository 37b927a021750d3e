"""The tables that close a run on the console."""

from __future__ import annotations

from typing import Any

PREPARED = {"finetune": "fine-tuned", "multitask": "multi-task", "meta": "meta-teacher"}


def closing_table(summary: dict[str, Any]) -> dict[str, Any]:
    """Title, columns and rows in the shape of Table 1 of "Improving MetaDistil Framework": teachers, then student."""
    metric, student = summary["metric"], summary["student"]

    def row(method: str, models: str, entry: dict[str, Any], smaller: float | None) -> list[str]:
        shown = [_shown(entry["metrics"][split][metric], metric) for split in ("validation", "test")]
        return [method, models, *shown, f"{entry['parameters']:,}", f"{smaller:.2f} x" if smaller else ""]

    prepared = PREPARED[summary["settings"]["prepare_method"]]
    rows = [row("as given" if t["origin"] == "as given" else prepared, t["name"], t, None) for t in summary["teachers"]]
    names = "+".join(t["name"] for t in summary["teachers"])
    arrow = f"{names} -> {student['name']}" if names else student["name"]
    rows.append(row(summary["method"], arrow, student, summary["times_smaller"]))
    columns = ["method", "teachers -> student", "validation", "test", "parameters", "smaller"]
    return {"title": _title(summary), "columns": columns, "rows": rows}


def domain_table(summary: dict[str, Any]) -> dict[str, Any] | None:
    """The same models' figures on the test set of each domain, and their mean; None with fewer than two domains."""
    metric, entries = summary["metric"], [*summary["teachers"], summary["student"]]
    names = list(summary["student"].get("by_domain", {}).get("test", {}))
    if len(names) < 2:
        return None
    rows = []
    for entry in entries:
        values = [entry["by_domain"]["test"][name][metric] for name in names]
        rows.append([entry["name"], "", *(_shown(v, metric) for v in [*values, sum(values) / len(values)])])
    rows[-1][1] = "student"
    title = f"{_title(summary)}, test set by domain"
    return {"title": title, "columns": ["model", "", *names, "mean"], "rows": rows}


def _title(summary: dict[str, Any]) -> str:
    metric = summary["metric"]
    return f"{metric}{' in %' if metric == 'accuracy' else ''}, {summary['settings']['data']}"


def _shown(value: float, metric: str) -> str:
    return f"{100 * value:.2f}" if metric == "accuracy" else f"{value:.4f}"
