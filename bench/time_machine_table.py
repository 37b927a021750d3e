"""The table of `bench_time_machine.py`: for each device, what keeping and bringing back all weights takes."""

from __future__ import annotations

from bench.layout import NOT_YET, Peers, Row, duration, machines, peers, spread

TITLES = {
    "time machine": "time machine", "time machine, rows": "time machine, embeddings by rows",
    "time machine, pinned": "time machine, pinned host memory", "one buffer": "one flat buffer, copied",
    "foreach": "`torch._foreach_copy_`", "deepcopy": "`deepcopy(state_dict())`, `load_state_dict`",
}  # fmt: skip
PASSES = ("snapshot", "pilot")


def render_time_machine(rows: list[Row]) -> str:
    """A table for each kind of device, and a sentence where none is a GPU."""
    parts = []
    for device, title in (("cuda", "On a GPU"), ("cpu", "On a CPU")):
        found = [row for row in rows if row["device"] == device]
        if here := [row for row in found if row["pass"] in PASSES]:
            parts.append(_copies(title, here))
        elif device == "cuda":
            parts.append(NOT_YET)
        parts += _steps([row for row in found if row["pass"] == "meta-step"])
    return "\n\n".join(parts)


def _copies(title: str, rows: list[Row]) -> str:
    by_name = {(row["row"], row["pass"]): row for row in rows}
    return "\n".join([
        f"{title}, {rows[0]['weights']:,} weights:",
        "",
        "| | snapshot and rewind | GB/s | of a large copy | pilot step and rewind | GB/s | of a large copy |",
        "|---|---|---|---|---|---|---|",
        *(
            "| " + " | ".join([shown, *(cell for p in PASSES for cell in _cells(by_name.get((name, p))))]) + " |"
            for name, shown in TITLES.items() if any((name, p) in by_name for p in PASSES)
        ),
        "",
        "Every way was compared bit for bit first. Medians, in turns in one run, caches flushed before each; "
        f"{spread(rows)}. Counted are 16 bytes a weight for a "
        "snapshot and a rewind, 24 with a pilot step between them, whatever passes a way takes; a large copy moved "
        f"{rows[0]['copy_rate'] / 1e9:,.0f} GB/s, read and written both counted. " + machines(rows),
    ])  # fmt: skip


def _cells(row: Row | None) -> list[str]:
    if row is None:
        return ["", "", ""]
    rate = row["bytes"] / row["seconds"]
    return [duration(row["seconds"]), f"{rate / 1e9:,.0f}", f"{100 * rate / row['copy_rate']:.0f} %"]


def _steps(rows: list[Row]) -> list[str]:
    """What snapshots in pinned memory add to a meta-step, in a sentence a precision."""
    found = []
    for timed in peers(rows):
        parts = [
            f"{_more(timed, suffix):+.1f} % to {what} of {duration(timed['device' + suffix]['seconds'])}"
            for suffix, what in (("", "an eager step"), (", graph", "a CUDA graph's"))
            if {"device" + suffix, "pinned" + suffix} <= timed.keys()
        ]
        if parts:
            row = next(iter(timed.values()))
            found.append(
                f"Snapshots in pinned host memory add {' and '.join(parts)} ({row['models']}, {row['batch']} x "
                f"{row['length']}, {row['precision']})."
            )
    return found


def _more(timed: Peers, suffix: str) -> float:
    return 100 * (timed["pinned" + suffix]["seconds"] / timed["device" + suffix]["seconds"] - 1)
