"""The table of `bench_telemetry.py`: what telemetry adds to a step."""

from __future__ import annotations

from bench.layout import Row, duration, machines


def render_telemetry(rows: list[Row]) -> str:
    """A row a case, for each device."""
    lines = [
        "| step | device | time | marks | record | thread | all | in turns, processor | in turns, clock |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    plain = [row for row in rows if row["row"] == "without"]
    for row in sorted(plain, key=lambda row: row["seconds"]):
        shares = (row["marks_share"], row["record_share"], row["thread_share"], row["share"])
        lines.append(" | ".join([
            f"| {row['case']}, {row['size']}", row["device"], duration(row["seconds"]), *(_percent(share) for share in shares),
            _quartiles(row["turns"]["cpu"]), f"{_quartiles(row['turns']['clock'])} |",
        ]))  # fmt: skip
    most = max(plain, key=lambda row: row["marks"])
    lines += [
        "",
        f"Of a step's time, with a record every 20 steps. A step has up to {most['marks']} marks of "
        f"{1e6 * most['mark_seconds']:.2f} µs; a record takes {1e6 * most['record_seconds']:.0f} µs beyond what is written without "
        "telemetry; the thread samples memory 10 times a second, and its time counts as if it were the step's. \"In turns\" "
        "compares stretches of half a second or more with and without telemetry, median and quartiles: steps differ by more than telemetry "
        "takes. " + machines(plain),
    ]  # fmt: skip
    return "\n".join(lines)


def _quartiles(found: list[float]) -> str:
    low, middle, high = (_percent(value, signed=True) for value in found)
    return f"{middle} ({low} to {high})"


def _percent(share: float, signed: bool = False) -> str:
    return f"{100 * share:{'+' * signed}.2f} %"
