"""The table of `bench_kernels.py`: for each device, what every pass over every case took."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

from bench.records import describe

PASSES = {
    "forward": "forward", "backward": "forward and backward", "double": "double backward", "cotangent": "meta cotangent",
    "fused": "last layers and loss", "fused_kl": "last layers and KL alone",
}  # fmt: skip
OTHERS = {"eager": "eager", "torch.compile": "torch.compile", "liger": "Liger"}
LAUNCH = 2**20  # bytes: below, a share of the copy bandwidth says nothing
NOT_YET = "Not yet measured on a GPU."


def render_kernels(results: dict[str, Any]) -> str:
    return by_device(results, _device)


def by_device(results: dict[str, Any], render: Callable[[str, list[dict], list[dict]], str]) -> str:
    """A table for each kind of device, by `render(title, rows, machines)`, and a sentence where none is a GPU."""
    rows, parts = results["rows"], []
    for device, title in (("cuda", "On a GPU"), ("cpu", "On a CPU")):
        if here := [row for row in rows if row["device"] == device]:
            machines = dict.fromkeys(row["machine"] for row in here)
            parts.append(render(title, here, [results["machines"][i] for i in machines]))
        elif device == "cuda":
            parts.append(NOT_YET)
    return "\n\n".join(parts)


def _device(title: str, rows: list[dict[str, Any]], machines: list[dict[str, Any]]) -> str:
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["part"], {})[row["row"]] = row
    order = list(PASSES)
    lines = [
        f"{title}, `{rows[0]['backend']}` kernels:",
        "",
        "| pass | rows x classes | dtype | K | time | of the ceiling | faster than "
        + " | than ".join(OTHERS.values())
        + " | memory | eager's |",
        "|---|---|---|---|---|---|" + "---|" * len(OTHERS) + "---|---|",
        *(_line(g) for g in sorted(groups.values(), key=lambda g: order.index(g["ours"]["pass"]))),
        "",
        f"{_caption(rows)} {' '.join(describe(**m) for m in machines)}",
    ]
    return "\n".join(lines)


def _caption(rows: list[dict[str, Any]]) -> str:
    timed = [row for row in rows if "seconds" in row]
    spread = [100 * (row["upper"] - row["lower"]) / row["seconds"] for row in timed]
    worst = {
        d: max(row["error"] for row in timed if row["dtype"] == d) for d in dict.fromkeys(r["dtype"] for r in timed)
    }
    left_out = dict.fromkeys((OTHERS.get(row["row"], row["row"]), row["left_out"]) for row in rows if "left_out" in row)
    return (
        "Times are medians, implementations in turns in one run, caches flushed before each; quartiles lie "
        f"{median(spread):.0f} % of the median apart ({max(spread):.0f} % at most). The ceiling is the bandwidth of a large "
        "copy in the same run, for each input read once and each gradient written once; with last layers it is the rate "
        "of a matrix product. Memory is its peak, inputs included, over what inputs and outputs take. Results were within "
        + " and ".join(f"{error:.0e} ({dtype})" for dtype, error in worst.items())
        + " of float64."
        + "".join(f" {name} is left out: {why}." for name, why in left_out)
    )


def _line(group: dict[str, dict[str, Any]]) -> str:
    ours = group["ours"]
    time = duration(ours["seconds"])
    if "graph" in group:
        time += f" ({duration(group['graph']['seconds'])} as a CUDA graph)"
    others = [group.get(name, {}) for name in OTHERS]
    ratios = [row["seconds"] / ours["seconds"] if "seconds" in row else None for row in others]
    speeds = ["" if r is None else f"{r:.1f} x" if r < 10 else f"{r:,.0f} x" for r in ratios]
    hidden = f", hidden {ours['hidden']:,}" if ours["hidden"] else ""
    return "| " + " | ".join([
        PASSES[ours["pass"]], f"{ours['rows']:,} x {ours['classes']:,}{hidden}", ours["dtype"], str(ours["teachers"]), time,
        _share(ours), *speeds, _memory(ours), _memory(group["eager"]),
    ]) + " |"  # fmt: skip


def _share(row: dict[str, Any]) -> str:
    if "product_rate" in row:
        return f"{100 * row['operations'] / row['seconds'] / row['product_rate']:.0f} % (products)"
    return f"{100 * row['bytes'] / row['seconds'] / row['copy_rate']:.0f} %" if row["bytes"] >= LAUNCH else ""


def _memory(row: dict[str, Any]) -> str:
    """As little as 1; nothing where it is less than what an allocator rounds up to."""
    if "peak" not in row or row["bytes"] < LAUNCH:
        return ""
    return f"{(row['inputs'] + row['peak']) / (row['inputs'] + row['outputs']):.2f}"


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"
