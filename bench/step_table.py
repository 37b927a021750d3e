"""The table of `bench_steps.py`: for each device, a line a case."""

from __future__ import annotations

from statistics import median
from typing import Any

from bench.kernel_table import by_device, duration
from bench.records import describe

METHODS = ("finetune", "kd", "metadistil")
PLAIN = ("plain", "plain, fused")
MOST = 30  # lines of a device; of more, those that run without --full


def render_steps(results: dict[str, Any]) -> str:
    return by_device(results, _device)


def render_steps_short(results: dict[str, Any]) -> str:
    """A few columns of the cases that run without --full, on the biggest device there is."""
    gpu = [row for row in results["rows"] if row["device"] != "cpu"]
    groups = _cases(gpu or results["rows"])
    lines = [
        "| method | teachers | batch x length | precision | plain PyTorch | engine | faster | memory, of plain's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for group in (g for g in groups if g["engine"]["batch"] == 32 and plain(g)):
        engine, other = group["engine"], plain(group)
        lines.append(
            f"| {engine['method']} | {engine['teachers'] or ''} | {engine['batch']} x {engine['length']} | {engine['precision']} | "
            f"{duration(other['seconds'])} | {duration(engine['seconds'])} | {_times(other, engine)} | "
            f"{engine['peak'] / other['peak']:.2f} |"
        )
    machine = results["machines"][groups[0]["engine"]["machine"]]
    return "\n".join([*lines, "", f"Medians, implementations in turns in one run. {describe(**machine)}"])


def _device(title: str, rows: list[dict[str, Any]], machines: list[dict[str, Any]]) -> str:
    cases = _cases(rows)
    shown = cases if len(cases) <= MOST else [g for g in cases if not g["engine"]["full"]] or cases
    graphs = any("graph" in g for g in shown)
    head = ["method", "teachers", "batch x length", "precision", "plain PyTorch", "engine", "faster"]
    head += ["CUDA graph", "faster"] * graphs + ["examples/s", "MFU", "memory", "of plain's"]
    return "\n".join([
        f"{title}, {rows[0]['models']}:",
        "",
        f"| {' | '.join(head)} |",
        "|" + "---|" * len(head),
        *(_line(g, graphs) for g in shown),
        "",
        f"{_caption(cases, len(shown), graphs)} {' '.join(describe(**m) for m in machines)}",
    ])  # fmt: skip


def _cases(rows: list[dict[str, Any]]) -> list[dict[str, dict[str, Any]]]:
    """The rows of each case that the engine ran, by implementation."""
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["part"], {})[row["row"]] = row
    return sorted((g for g in groups.values() if "seconds" in g.get("engine", {})), key=_order)


def _order(group: dict[str, dict[str, Any]]) -> tuple:
    row = group["engine"]
    return (
        METHODS.index(row["method"]),
        row["teachers"],
        row["batch"] * row["length"],
        row["batch"],
        row["precision"] != "fp32",
    )


def plain(group: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The faster of the plain implementations; None where none ran."""
    found = [group[name] for name in PLAIN if "seconds" in group.get(name, {})]
    return min(found, key=lambda row: row["seconds"], default=None)


def _line(group: dict[str, dict[str, Any]], graphs: bool) -> str:
    engine, graph, other = group["engine"], group.get("graph", {}), plain(group)
    best = graph if "seconds" in graph else engine
    cells = [
        engine["method"], str(engine["teachers"] or ""), f"{engine['batch']} x {engine['length']}", engine["precision"],
        duration(other["seconds"]) if other else "", duration(engine["seconds"]), _times(other, engine),
    ]  # fmt: skip
    if graphs:
        cells += [duration(graph["seconds"]) if "seconds" in graph else "", _times(other, graph)]
    cells += [f"{best['examples_per_second']:,.0f}", f"{100 * best['mfu']:.0f} %", f"{engine['peak'] / 2**30:.2f} GiB"]
    return "| " + " | ".join([*cells, f"{engine['peak'] / other['peak']:.2f}" if other else ""]) + " |"


def _times(other: dict[str, Any] | None, row: dict[str, Any]) -> str:
    return f"{other['seconds'] / row['seconds']:.2f} x" if other and "seconds" in row else ""


def _caption(cases: list[dict[str, dict[str, Any]]], shown: int, graphs: bool) -> str:
    timed = [row for group in cases for row in group.values() if "seconds" in row]
    spread = [100 * (row["upper"] - row["lower"]) / row["seconds"] for row in timed]
    worst = {p: max(row["error"] for row in timed if row["precision"] == p) for p in ("fp32", "bf16")
             if any(row["precision"] == p for row in timed)}  # fmt: skip
    slower = sum(plain(g) is not None and plain(g)["seconds"] < g["engine"]["seconds"] for g in cases)
    left_out = dict.fromkeys((row["row"], row["left_out"]) for g in cases for row in g.values() if "left_out" in row)
    best = "the CUDA graph, where there is one" if graphs else "the engine"
    return (
        "Times are medians, implementations in turns in one run; quartiles lie "
        f"{median(spread):.0f} % of the median apart ({max(spread):.0f} % at most). Plain PyTorch is the faster of eager and "
        "fused attention, in bf16 under autocast; for metadistil it is the published loop. Examples/s and MFU are those of "
        f"{best}; MFU is the step's floating-point operations, what is computed again included, over the rate of a large "
        "matrix product of the same dtype in the same run. Memory is the peak of all that a step holds, weights and "
        f"optimizer included. The engine is the slower one in {slower} of {len(cases)} cases. Gradients were within "
        + " and ".join(f"{error:.0e} ({precision})" for precision, error in worst.items())
        + " of plain PyTorch in float32"
        + (", and graphs gave the bits of eager steps." if graphs else ".")
        + (f" {len(cases) - shown} more cases stand in `bench/results/steps.json`." if shown < len(cases) else "")
        + "".join(f" {name} is left out: {why.rstrip('.')}." for name, why in left_out)
    )
