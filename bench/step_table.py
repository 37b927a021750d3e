"""The table of `bench_steps.py`: for each device, a line a case."""

from __future__ import annotations

from bench.layout import Peers, Row, by_device, duration, left_out, machines, peers, spread, worst

METHODS = ("finetune", "kd", "metadistil")
PLAIN = ("plain", "plain, fused")
MOST = 30  # lines of a device; of more, those that run without --full


def render_steps(rows: list[Row]) -> str:
    return by_device(rows, _device)


def render_steps_short(rows: list[Row]) -> str:
    """A few columns of the cases of 32 examples, on the biggest device there is."""
    cases = _cases([row for row in rows if row["device"] != "cpu"] or rows)
    lines = [
        "| method | teachers | batch x length | precision | plain PyTorch | engine | faster | memory, of plain's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    shown = [group for group in cases if group["engine"]["batch"] == 32 and plain(group)]
    for group in shown:
        engine, other = group["engine"], plain(group)
        lines.append(
            f"| {engine['method']} | {engine['teachers'] or ''} | {engine['batch']} x {engine['length']} | {engine['precision']} | "
            f"{duration(other['seconds'])} | {duration(engine['seconds'])} | {_times(other, engine)} | "
            f"{engine['peak'] / other['peak']:.2f} |"
        )
    engines = [group["engine"] for group in shown]
    models = engines[0]["models"]
    models = models[0].upper() + models[1:]
    return "\n".join([*lines, "", f"{models}. Medians, implementations in turns in one run. {machines(engines)}"])


def _cases(rows: list[Row]) -> list[Peers]:
    """The groups that the engine is in, in order."""
    return sorted((group for group in peers(rows) if "engine" in group), key=_order)


def _device(title: str, rows: list[Row]) -> str:
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
        f"{_caption(cases, len(shown), graphs)} {machines(rows)}",
    ])  # fmt: skip


def _order(group: Peers) -> tuple:
    row = group["engine"]
    return (
        METHODS.index(row["method"]),
        row["teachers"],
        row["batch"] * row["length"],
        row["batch"],
        row["precision"] != "fp32",
    )


def plain(group: Peers) -> Row | None:
    """The faster of the plain implementations; None where none ran."""
    return min((group[name] for name in PLAIN if name in group), key=lambda row: row["seconds"], default=None)


def _line(group: Peers, graphs: bool) -> str:
    engine, graph, other = group["engine"], group.get("graph"), plain(group)
    best = graph or engine
    cells = [
        engine["method"], str(engine["teachers"] or ""), f"{engine['batch']} x {engine['length']}", engine["precision"],
        duration(other["seconds"]) if other else "", duration(engine["seconds"]), _times(other, engine),
    ]  # fmt: skip
    if graphs:
        cells += [duration(graph["seconds"]) if graph else "", _times(other, graph)]
    cells += [f"{best['examples_per_second']:,.0f}", f"{100 * best['mfu']:.0f} %", f"{engine['peak'] / 2**30:.2f} GiB"]
    return "| " + " | ".join([*cells, f"{engine['peak'] / other['peak']:.2f}" if other else ""]) + " |"


def _times(other: Row | None, row: Row | None) -> str:
    return f"{other['seconds'] / row['seconds']:.2f} x" if other and row else ""


def _caption(cases: list[Peers], shown: int, graphs: bool) -> str:
    rows = [row for group in cases for row in group.values()]
    slower = sum(plain(g) is not None and plain(g)["seconds"] < g["engine"]["seconds"] for g in cases)
    best = "the CUDA graph, where there is one" if graphs else "the engine"
    return (
        f"Times are medians, implementations in turns in one run; {spread(rows)}. Plain PyTorch is the faster of eager and "
        "fused attention, in bf16 under autocast; for metadistil it is the published loop. Examples/s and MFU are those of "
        f"{best}; MFU is the step's floating-point operations, what is computed again included, over the rate of a large "
        "matrix product of the same dtype in the same run. Memory is the peak of all that a step holds, weights and "
        f"optimizer included. The engine is the slower one in {slower} of {len(cases)} cases. Gradients were within "
        f"{worst(rows, by='precision')} of plain PyTorch in float32"
        + (", and graphs gave the bits of eager steps." if graphs else ".")
        + (f" {len(cases) - shown} more cases stand in `bench/results/steps.json`." if shown < len(cases) else "")
        + "".join(f" {name} is left out: {why.rstrip('.')}." for name, why in left_out(rows))
    )
