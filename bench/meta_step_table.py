"""The tables of `bench_meta_step.py`: what a meta-step takes beside the published loop and plain KD."""

from __future__ import annotations

from bench.layout import Row, machines


def render_meta_step(rows: list[Row]) -> str:
    """Equal shapes, as shipped, lengths and pilot steps, each a table with the sentence that says what it shows."""
    parts = [
        render(part)
        for name, render in (("equal", _equal), ("shipped", _shipped), ("lengths", _lengths), ("pilots", _pilots))
        if (part := [row for row in rows if row["part"] == name])
    ]
    steps = [row for row in rows if row["part"] != "shipped"]
    spread = max((row["slowest"] - row["fastest"]) / row["seconds"] for row in steps)
    parts.append(
        f"Medians of three steps, spread (slowest less fastest) at most {100 * spread:.0f} % of the median; memory is the "
        f"highest resident memory in a step over what was resident before it. {machines(rows)}"
    )
    return "\n\n".join(parts)


def _equal(rows: list[Row]) -> str:
    first = rows[0]
    lines = [
        "Equal shapes, float32, batch and quiz batch of 32 at 128 tokens:",
        "",
        f"| step | time | of the {first['row']} | memory growth | of the {first['row']} | GFLOP |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        time, memory = row["seconds"] / first["seconds"], row["growth"] / first["growth"]
        lines.append(
            f"| {row['row']} | {row['seconds']:.2f} s | {time:.2f} | {row['growth'] / 2**20:,.0f} MiB | {memory:.2f} | "
            f"{row['flops'] / 1e9:,.0f} |"
        )
    by_name = {row["row"]: row for row in rows}
    if {"exact", "kd"} <= by_name.keys():
        exact, kd = by_name["exact"], by_name["kd"]
        lines += [
            "",
            f"`exact` takes {exact['seconds'] / kd['seconds']:.2f} times the time of the engine's own KD step, and "
            f"{exact['flops'] / kd['flops']:.2f} times its FLOPs.",
        ]
    return "\n".join(lines)


def _shipped(rows: list[Row]) -> str:
    lines = [
        "As shipped: `python -m engine.train` on 4,000 rows of SST-2, data loading included:",
        "",
        "| method | precision | examples/s | padding | peak memory |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['row']} | {row['precision']} | {_speed(row['examples_per_second'])} | {100 * row['padding_waste']:.0f} % | "
            f"{row['peak'] / 2**30:.1f} GiB |"
        )
    if ratios := _ratios(rows):
        lines += ["", ratios]
    return "\n".join(lines)


def _speed(examples: float) -> str:
    return f"{examples:.1f}" if examples < 10 else f"{examples:.0f}"


def _ratios(rows: list[Row]) -> str:
    """What is claimed of rows of one run, where they are there."""
    speed = {(row["row"], row["precision"]): row["examples_per_second"] for row in rows}
    found = []
    for row, other, precision in (("kd, answers kept", "finetune", None), ("metadistil", "published loop", "fp32")):
        pairs = [(p, speed[row, p], speed.get((other, precision or p))) for p in ("fp32", "bf16") if (row, p) in speed]
        if parts := [f"{ours / theirs:.2f} ({p})" for p, ours, theirs in pairs if theirs]:
            found.append(f"{row} makes {' and '.join(parts)} times the examples/s of {other}")
    kept = {row["answers_seconds"] for row in rows if row.get("answers_seconds")}
    once = f" The kept answers took {min(kept):.0f} to {max(kept):.0f} s, once." if kept else ""
    return f"In this run {'; '.join(found)}.{once}" if found else ""


def _lengths(rows: list[Row]) -> str:
    shapes = {row["length"]: row["batch"] for row in rows}
    lines = [
        "Strategies, checkpointing and length, float32:",
        "",
        "| strategy | checkpointing | " + " | ".join(f"{n} x {length}" for length, n in shapes.items()) + " |",
        "|---|---|" + "---|" * len(shapes),
    ]
    cells = {(row["row"], row["checkpointing"], row["length"]): row for row in rows}
    for name, checkpointing in dict.fromkeys((row["row"], row["checkpointing"]) for row in rows):
        found = [cells[name, checkpointing, length] for length in shapes]
        lines.append(f"| {name} | {checkpointing} | " + " | ".join(_cost(row) for row in found) + " |")
    return "\n".join(lines)


def _pilots(rows: list[Row]) -> str:
    shapes = [f"M {row['pilots']}" for row in rows]
    return "\n".join([
        "Pilot steps M, `exact`, float32, 32 x 64:",
        "",
        "| " + " | ".join(shapes) + " |",
        "|" + "---|" * len(shapes),
        "| " + " | ".join(map(_cost, rows)) + " |",
    ])  # fmt: skip


def _cost(row: Row) -> str:
    return f"{row['seconds']:.2f} s, {row['growth'] / 2**20:,.0f} MiB"
