"""The table of `bench_kernels.py`: for each device, what every pass over every case took."""

from __future__ import annotations

from bench.layout import Peers, Row, by_device, duration, left_out, machines, peers, spread, worst

PASSES = {
    "forward": "forward", "backward": "forward and backward", "double": "double backward", "cotangent": "meta cotangent",
    "fused": "last layers and loss", "fused_kl": "last layers and KL alone",
}  # fmt: skip
OTHERS = {"eager": "eager", "torch.compile": "torch.compile", "liger": "Liger"}
LAUNCH = 2**20  # bytes: below, a share of the copy bandwidth says nothing


def render_kernels(rows: list[Row]) -> str:
    return by_device(rows, _device)


def _device(title: str, rows: list[Row]) -> str:
    order = list(PASSES)
    lines = [
        f"{title}, `{rows[0]['backend']}` kernels:",
        "",
        "| pass | rows x classes | dtype | K | time | of the ceiling | faster than "
        + " | than ".join(OTHERS.values())
        + " | memory | eager's |",
        "|---|---|---|---|---|---|" + "---|" * len(OTHERS) + "---|---|",
        *(_line(g) for g in sorted(peers(rows), key=lambda g: order.index(g["ours"]["pass"]))),
        "",
        f"{_caption(rows)} {machines(rows)}",
    ]
    return "\n".join(lines)


def _caption(rows: list[Row]) -> str:
    return (
        f"Times are medians, implementations in turns in one run, caches flushed before each; {spread(rows)}. The ceiling is "
        "the bandwidth of a large copy in the same run, for each input read once and each gradient written once; with last "
        "layers it is the rate of a matrix product. Memory is its peak, inputs included, over what inputs and outputs take. "
        f"Results were within {worst(rows, by='dtype')} of float64."
        + "".join(f" {OTHERS.get(name, name)} is left out: {why}." for name, why in left_out(rows))
    )


def _line(group: Peers) -> str:
    ours = group["ours"]
    time = duration(ours["seconds"])
    if "graph" in group:
        time += f" ({duration(group['graph']['seconds'])} as a CUDA graph)"
    ratios = [group[name]["seconds"] / ours["seconds"] if name in group else None for name in OTHERS]
    speeds = ["" if r is None else f"{r:.1f} x" if r < 10 else f"{r:,.0f} x" for r in ratios]
    hidden = f", hidden {ours['hidden']:,}" if ours["hidden"] else ""
    return "| " + " | ".join([
        PASSES[ours["pass"]], f"{ours['rows']:,} x {ours['classes']:,}{hidden}", ours["dtype"], str(ours["teachers"]), time,
        _share(ours), *speeds, _memory(ours), _memory(group["eager"]),
    ]) + " |"  # fmt: skip


def _share(row: Row) -> str:
    if "product_rate" in row:
        return f"{100 * row['operations'] / row['seconds'] / row['product_rate']:.0f} % (products)"
    return f"{100 * row['bytes'] / row['seconds'] / row['copy_rate']:.0f} %" if row["bytes"] >= LAUNCH else ""


def _memory(row: Row) -> str:
    """As little as 1; nothing where it is less than what an allocator rounds up to."""
    if row["bytes"] < LAUNCH:
        return ""
    return f"{(row['inputs'] + row['peak']) / (row['inputs'] + row['outputs']):.2f}"
