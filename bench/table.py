"""The tables of README.md and docs/, from results under `bench/results/`; no figure is written by hand.

python -m bench.table collect RUN_DIR... > bench/results/sst2.json    # summaries of runs to one file of results
python -m bench.table profile DIR > bench/results/profile-x.json      # one of engine.profiling, without its timelines
python -m bench.table merge DIR                                       # results of another machine into bench/results/
python -m bench.table                                                 # write every table into its page
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from bench.kernel_table import render_kernels
from bench.records import joined, read, write
from bench.step_table import render_steps, render_steps_short
from bench.telemetry_table import render_telemetry
from bench.time_machine_table import render_time_machine
from engine.profiling import tables

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def collect(directories: list[str]) -> dict[str, Any]:
    """What a table needs of each run's summary.json; nothing that names the machine's folders."""
    rows = []
    for directory in directories:
        summary = json.loads((Path(directory) / "summary.json").read_text())
        settings = summary["settings"]
        rows.append({
            "method": summary["method"],
            "seed": summary["seed"],
            "teachers": [{k: t[k] for k in ("sample", "origin", "parameters", "metrics", "prepared")} for t in summary["teachers"]],
            "student": {k: summary["student"][k] for k in ("parameters", "metrics", "best_step")},
            "times_smaller": summary["times_smaller"],
            "phases": summary["phases"],
            "seconds": summary["seconds"],
            "sizes": summary["sizes"],
            "padding_waste": summary["padding_waste"],
            "peak_memory": summary["peak_memory"],
            "git_commit": summary["git_commit"],
            "hardware": summary["device"],
            "versions": summary["versions"],
            "settings": {k: v for k, v in settings.items() if k not in ("teachers", "student", "data", "output", "cache_dir")},
        })  # fmt: skip
    return {"kind": "runs", "rows": rows}


def collect_profile(directory: str) -> dict[str, Any]:
    """What its tables need."""
    found = json.loads((Path(directory) / "profile.json").read_text())
    for row in found["rows"]:
        row.pop("timeline", None)
    return found


def render(results: dict[str, Any]) -> str:
    """The table of a file of results, by its kind."""
    return RENDER[results["kind"]](results)


def merge(folder: Path) -> list[str]:
    """Take the results in `folder`, as `make gpu-check` leaves them, into bench/results/; the subjects that were there.

    A part that was measured there replaces ours. Raises FileNotFoundError where there are none.
    """
    found = {file.stem: read(file) for file in sorted(folder.glob("*.json"))}
    found = {subject: results for subject, results in found.items() if results.get("kind") in MEASURED}
    if not found:
        raise FileNotFoundError(f"{folder} holds no results; name the folder that make gpu-check wrote.")
    for subject, results in found.items():
        ours = RESULTS / f"{subject}.json"
        write(ours, subject, joined(read(ours), results))
    return list(found)


def render_meta_step(results: dict[str, Any]) -> str:
    """Equal shapes, as shipped, lengths and pilot steps, each a table with the sentence that says what it shows."""
    rows = results["rows"]
    parts = [
        render(part)
        for name, render in (("equal", _equal), ("shipped", _shipped), ("lengths", _lengths), ("pilots", _pilots))
        if (part := [row for row in rows if row["part"] == name])
    ]
    timed = [row for row in rows if "slowest" in row]
    spread = max((row["slowest"] - row["fastest"]) / row["seconds"] for row in timed)
    parts.append(
        f"Medians of three steps, spread (slowest less fastest) at most {100 * spread:.0f} % of the median; memory is the "
        f"highest resident memory in a step over what was resident before it. {_machines(results)}"
    )
    return "\n\n".join(parts)


def _equal(rows: list[dict[str, Any]]) -> str:
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


def _shipped(rows: list[dict[str, Any]]) -> str:
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


def _ratios(rows: list[dict[str, Any]]) -> str:
    """What is claimed of the rows of one run; empty for files from before there were such rows."""
    speed = {(row["row"], row["precision"]): row["examples_per_second"] for row in rows}
    found = []
    for row, other, precision in (("kd, answers kept", "finetune", None), ("metadistil", "published loop", "fp32")):
        pairs = [(p, speed[row, p], speed.get((other, precision or p))) for p in ("fp32", "bf16") if (row, p) in speed]
        if parts := [f"{ours / theirs:.2f} ({p})" for p, ours, theirs in pairs if theirs]:
            found.append(f"{row} makes {' and '.join(parts)} times the examples/s of {other}")
    kept = {row["answers_seconds"] for row in rows if row.get("answers_seconds")}
    once = f" The kept answers took {min(kept):.0f} to {max(kept):.0f} s, once." if kept else ""
    return f"In this run {'; '.join(found)}.{once}" if found else ""


def _lengths(rows: list[dict[str, Any]]) -> str:
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


def _pilots(rows: list[dict[str, Any]]) -> str:
    shapes = [f"M {row['pilots']}" for row in rows]
    return "\n".join([
        "Pilot steps M, `exact`, float32, 32 x 64:",
        "",
        "| " + " | ".join(shapes) + " |",
        "|" + "---|" * len(shapes),
        "| " + " | ".join(map(_cost, rows)) + " |",
    ])  # fmt: skip


def _cost(row: dict[str, Any]) -> str:
    return f"{row['seconds']:.2f} s, {row['growth'] / 2**20:,.0f} MiB"


def _machines(results: dict[str, Any]) -> str:
    """Of its rows; files from before rows named theirs have the facts of one beside them."""
    return " ".join(_machine(m["hardware"], m["versions"]) for m in results.get("machines") or [results])


def _machine(hardware: dict[str, Any], versions: dict[str, str]) -> str:
    threads = hardware["threads"]
    return (
        f"{hardware['name']}, {threads} thread{'s' * (threads != 1)}, torch {versions['torch']}, transformers "
        f"{versions['transformers']}, Python {versions['python']}."
    )


def render_runs(results: dict[str, Any]) -> str:
    """One line a kind of run: mean and spread over seeds of the student's accuracy, size, time and memory."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in results["rows"]:
        groups.setdefault((row["method"], len(row["teachers"])), []).append(row)
    lines = [
        "| method | teachers | teachers after | validation accuracy | test accuracy | parameters | times smaller | examples/s | training time | peak memory |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (method, teachers), rows in groups.items():
        phases = [row["phases"][method] for row in rows]
        lines.append(" | ".join([
            f"| {method}", str(teachers), _teachers(rows), *(_accuracy(rows, split) for split in ("validation", "test")),
            f"{rows[0]['student']['parameters']:,}",
            f"{rows[0]['times_smaller']:.2f}" if rows[0]["times_smaller"] else "",
            _range([p["examples_per_second"] for p in phases]), f"{_range([p['seconds'] for p in phases])} s",
            f"{median(row['peak_memory']['host'] for row in rows) / 2**30:.1f} GiB |",
        ]))  # fmt: skip
    first = results["rows"][0]
    seeds = sorted({row["seed"] for row in results["rows"]})
    hardware, versions, sizes = first["hardware"], first["versions"], first["sizes"]
    over = (
        f"mean ± standard deviation over seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"seed {seeds[0]}"
    )
    commits = ", ".join(sorted({(row["git_commit"] or "unknown")[:7] for row in results["rows"]}))
    most = max(results["rows"], key=lambda row: len(row["teachers"]))
    prepared = [t["prepared"] for t in most["teachers"]]
    reached = " and ".join(f"{100 * p['validation']['accuracy']:.2f} %" for p in prepared)
    took = " and ".join(f"{p['seconds']:.0f} s" for p in prepared)
    lines += [
        "",
        f"Accuracy in %, {over}; training on {sizes['train']:,} examples, "
        f"quiz {sizes['quiz']}, validation {sizes['validation']}, test {sizes['test']:,}; the teachers were prepared "
        f"once, in {took}, and reach {reached} on validation. Speed and time are the student's training alone, median and extremes; the "
        f"machine was shared with other work. Commit {commits}. {_machine(hardware, versions)}",
    ]
    return "\n".join(lines)


def _accuracy(rows: list[dict[str, Any]], split: str) -> str:
    values = [100 * row["student"]["metrics"][split]["accuracy"] for row in rows]
    return f"{mean(values):.2f} ± {stdev(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"


def _teachers(rows: list[dict[str, Any]]) -> str:
    """Mean validation accuracy of the teachers as the run left them: lower than prepared where teaching cost them."""
    values = [100 * t["metrics"]["validation"]["accuracy"] for row in rows for t in row["teachers"]]
    return f"{mean(values):.2f}" if values else ""


def _range(values: list[float]) -> str:
    """Median, and the extremes where there are several."""
    return f"{median(values):.0f}" + (f" ({min(values):.0f}-{max(values):.0f})" if len(values) > 1 else "")


def update(text: str) -> str:
    """A page with the table behind each `<!-- table: NAME -->` ... `<!-- end -->` made anew from NAME.json."""

    def table(match: re.Match) -> str:
        subject, short = (match[1].removesuffix("-short"), match[1].endswith("-short"))
        file = RESULTS / f"{subject}.json"
        if not file.exists() and subject not in MEASURED:
            raise FileNotFoundError(f"{file} is missing, and a page asks for its table.")
        found = read(file)
        rendered = (SHORT[subject] if short else render)(found) if file.exists() else "Not yet measured."
        return f"<!-- table: {match[1]} -->\n{rendered}\n<!-- end -->"

    return re.sub(r"<!-- table: ([\w-]+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


RENDER = {
    "runs": render_runs, "meta-step": render_meta_step, "kernels": render_kernels, "steps": render_steps,
    "time-machine": render_time_machine, "telemetry": render_telemetry,
    "profile": lambda found: tables.page(found, largest=True),
}  # fmt: skip
SHORT = {"steps": render_steps_short}  # for a mark NAME-short: what a README has room for
MEASURED = {
    "kernels",
    "steps",
    "telemetry",
    "time-machine",
}  # whose rows name their device, and come from several machines

if __name__ == "__main__":
    if sys.argv[1:2] == ["collect"]:
        print(json.dumps(collect(sys.argv[2:]), indent=1))
    elif sys.argv[1:2] == ["profile"] and len(sys.argv) == 3:
        print(json.dumps(collect_profile(sys.argv[2]), indent=1))
    elif sys.argv[1:2] == ["merge"] and len(sys.argv) == 3:
        print("merged:", ", ".join(merge(Path(sys.argv[2]))))
    elif sys.argv[1:]:
        sys.exit("usage: python -m bench.table [collect RUN_DIR... | profile DIR | merge DIR]")
    else:
        for page in PAGES:
            page.write_text(update(page.read_text()))
