"""Every check and benchmark that needs a GPU, in one command and a few minutes; what they find stays in one folder.

    python -m bench.gpu_check --out bench/results/gpu-check            # or: make gpu-check
    python -m bench.table merge bench/results/gpu-check                # its results into bench/results/
    python -m bench.gpu_check --out /tmp/check --device cpu            # every part in small, to see that they work

The parts run one after the other, also after one that failed; each has its share of the time, and what one leaves
of it goes to the next. The folder holds summary.txt, log.txt, junit.xml, tables.md and a .json a benchmark. Needs
torch, triton, transformers, pytest, pytest-benchmark and numpy, and no network: what the parts import keeps to that.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch

from bench import table
from bench.gpu_tests import gpu_tests
from bench.machine import describe, machine

ROOT = Path(__file__).parents[1]
OUT = ROOT / "bench" / "results" / "gpu-check"
SECONDS = 460  # in all
SHARES = {  # of the time
    "compile": 0.24, "tests": 0.16, "graphs": 0.12, "kernels": 0.16, "time-machine": 0.08, "telemetry": 0.06, "steps": 0.18,
}  # fmt: skip
GRAPHS = "tests/models/test_cuda_graph_gpu.py"
WRITTEN = (
    "summary.txt",
    "log.txt",
    "junit.xml",
    "tables.md",
    "kernels.json",
    "steps.json",
    "telemetry.json",
    "time-machine.json",
)
LAST = 25.0  # seconds of a part's time in which a benchmark starts no further row
STOP = 8.0  # seconds that a part has to write its results once it is interrupted
COMPILE = """
from engine.params import native
found = native.backend()
print(found)
assert found.devices >= {devices}, found.why
"""


@dataclass
class Part:
    """A command; `{seconds}` in it stands for the time that it has."""

    name: str
    title: str
    command: list[str]
    tests: bool = True  # run by pytest
    some: bool = False  # whether one test at least has to run
    status: str = "not run"
    took: float = 0.0
    counts: Counter = field(default_factory=Counter)  # tests by outcome
    skips: Counter = field(default_factory=Counter)  # reasons

    @property
    def failed(self) -> bool:
        return self.status != "passed"


def parts(device: str, out: Path) -> list[Part]:
    pytest, here = [sys.executable, "-m", "pytest", "-q"], device == "cuda"
    marked = [*pytest, "-m", "gpu", "--durations=5"]
    files = [f for f in gpu_tests()[0] if f != GRAPHS]

    def bench(subject: str, *more: str) -> list[str]:
        limits = ["--seconds", "{seconds}", *([] if here else ["--small"])]
        file = f"bench/bench_{subject.replace('-', '_')}.py"
        return [*pytest, file, "--benchmark-only", f"--benchmark-json={out / subject}.json", *limits, *more]

    usual = ["-k", "32x2 or 32768 or fused"] if here else []  # two classes, 32,768 classes, last layers
    compiled = COMPILE.format(devices={"cpu", "cuda"} if here else set())
    return [
        Part("compile", "operations in C++ and CUDA", [sys.executable, "-c", compiled], tests=False),
        Part("tests", "tests marked gpu", [*marked, *files], some=here),
        Part("graphs", "CUDA graphs against eager steps", [*marked, GRAPHS], some=here),
        Part("kernels", "benchmark of the kernels", bench("kernels", *usual), some=True),
        Part("time-machine", "benchmark of the time machine", bench("time-machine"), some=True),
        Part("telemetry", "benchmark of telemetry", bench("telemetry"), some=True),
        Part("steps", "benchmark of whole steps", bench("steps"), some=True),
    ]


def run(part: Part, seconds: float, environment: dict[str, str], log: Path, junit: Path) -> None:
    """Run a part for `seconds` at most: then it is interrupted, so that pytest writes what it has, then killed."""
    command = [word.replace("{seconds}", f"{max(1.0, seconds - LAST):.0f}") for word in part.command]
    if part.tests:
        command.append(f"--junitxml={junit}")
    started = time.monotonic()
    with log.open("a") as output:
        print(f"\n===== {part.name}: {' '.join(command)}", file=output, flush=True)
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        part.status = _wait(process, seconds)
    part.took = time.monotonic() - started
    if junit.exists():
        _count(part, junit)
    if part.some and part.status == "passed" and not part.counts["passed"]:
        part.status = "failed (no test ran)"


def _wait(process: subprocess.Popen, seconds: float) -> str:
    try:
        code = process.wait(seconds)
        return "passed" if code == 0 else f"failed ({code})"
    except subprocess.TimeoutExpired:
        pass
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    for which, patience in ((signal.SIGINT, STOP), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, which)
            process.wait(patience)
            break
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            break
    return f"out of time ({seconds:.0f} s)"


def _count(part: Part, junit: Path) -> None:
    try:
        cases = ET.parse(junit).getroot().iter("testcase")
    except ET.ParseError:
        part.status = "failed (its junit.xml is broken)"
        return
    for case in cases:
        outcome = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        part.counts[outcome] += 1
        if outcome == "skipped":
            part.skips[next(child for child in case if child.tag == "skipped").get("message", "")] += 1


def collect(parts: Sequence[Part], junits: Sequence[Path], out: Path) -> None:
    """One junit.xml of all."""
    together = ET.Element("testsuites")
    for part, junit in zip(parts, junits, strict=True):
        if not junit.exists() or "broken" in part.status:
            continue
        for suite in ET.parse(junit).getroot().iter("testsuite"):
            suite.set("name", part.name)
            together.append(suite)
    ET.ElementTree(together).write(out / "junit.xml", encoding="unicode", xml_declaration=True)


def tables(out: Path) -> tuple[str, str]:
    """The tables of the results in a folder, and what became of them."""
    found, status = [], "passed"
    for file in sorted(out.glob("*.json")):
        try:
            found.append(f"## {file.stem}\n\n{table.render(file)}\n")
        except Exception as error:  # noqa: BLE001  (the other tables are wanted all the same)
            found.append(f"## {file.stem}\n\n{type(error).__name__}: {error}\n")
            status = f"failed ({file.name}: {type(error).__name__})"
    return "\n".join(found), status


def summary(parts: Sequence[Part], tables: str, device: str, seconds: float) -> str:
    lines = [describe(**machine(torch.device(device))), ""]
    for part in parts:
        counts = ", ".join(f"{n} {outcome}" for outcome, n in sorted(part.counts.items()))
        lines.append(f"{part.name:<13} {part.status:<22} {part.took:5.0f} s  {counts or part.title}")
        lines += [f"{'':<13} skipped {n}: {reason}" for reason, n in part.skips.most_common(6)]
    lines += [
        f"{'left out':<13} {file}: {', '.join(sorted(packages))} missing" for file, packages in gpu_tests()[1].items()
    ]
    failed = sum(part.failed for part in parts) + (tables != "passed")
    lines += [
        f"{'tables':<13} {tables}",
        "",
        f"{failed} of {len(parts) + 1} failed, {seconds:.0f} s." if failed else f"All passed, {seconds:.0f} s.",
    ]
    return "\n".join(lines)


def machine_facts() -> str:
    """What nvidia-smi says, and the versions of all installed packages that matter."""
    try:
        found = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        found = f"nvidia-smi: {error}\n"
    return found + f"Python {sys.version.split()[0]}, torch {torch.__version__}, CUDA {torch.version.cuda}\n"


def check(out: Path, device: str, seconds: float, chosen: Sequence[Part]) -> int:
    """Run these parts; how many failed."""
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    for name in WRITTEN:
        (out / name).unlink(missing_ok=True)
    # what cuBLAS needs to repeat bit for bit; as much as torch gives it on Hopper anyway
    environment = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", **os.environ, "PYTHONUNBUFFERED": "1"}
    if device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"}  # nothing compiled is worth waiting for
    shares, end = sum(SHARES[part.name] for part in chosen), started
    facts = machine_facts()
    with tempfile.TemporaryDirectory() as kept:
        junits = [Path(kept) / f"{part.name}.xml" for part in chosen]
        for part, junit in zip(chosen, junits, strict=True):
            end += seconds * SHARES[part.name] / shares
            limit = max(1.0, end - time.monotonic() - (STOP if part is chosen[-1] else 0))
            print(f"{part.name}: {part.title}, {limit:.0f} s at most", flush=True)
            run(part, limit, environment, out / "log.txt", junit)
            print(f"  {part.status}, {part.took:.0f} s", flush=True)
            if part.failed:
                print("\n".join("  | " + line for line in _tail(out / "log.txt", 15)), flush=True)
        collect(chosen, junits, out)
    rendered, status = tables(out)
    (out / "tables.md").write_text(rendered)
    text = summary(chosen, status, device, time.monotonic() - started)
    (out / "summary.txt").write_text(text + "\n\n" + facts)
    print("\n" + text)
    return sum(part.failed for part in chosen) + (status != "passed")


def _tail(file: Path, lines: int) -> list[str]:
    return file.read_text(errors="replace").splitlines()[-lines:]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__.partition("\n")[0])
    names = list(SHARES)
    parser.add_argument(
        "--out", type=Path, default=OUT, help="folder for what is found (default: bench/results/gpu-check)"
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: every part in small, to see that it works"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all parts together (default: %(default)s)")
    parser.add_argument(
        "--parts", nargs="+", choices=names, default=names, metavar="PART", help=f"some of {', '.join(names)}"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run none")
    given = parser.parse_args(arguments)
    out = given.out.resolve()
    chosen = [part for part in parts(given.device, out) if part.name in given.parts]
    if given.dry_run:
        print(*(f"{part.name}: {' '.join(part.command)}" for part in chosen), sep="\n")
        return 0
    if given.device == "cuda" and not torch.cuda.is_available():
        print(
            "no CUDA device is here; run this on a machine with a GPU, or see that it works with --device cpu.",
            file=sys.stderr,
        )
        return 2
    timing = [part.name for part in chosen if "--benchmark-only" in part.command]
    if timing and find_spec("pytest_benchmark") is None:
        print(f"{', '.join(timing)} need pytest-benchmark; install it, or name other --parts.", file=sys.stderr)
        return 2
    return 1 if check(out, given.device, given.seconds, chosen) else 0


if __name__ == "__main__":
    sys.exit(main())
