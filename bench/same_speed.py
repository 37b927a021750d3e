"""Does a step take as long in another checkout? For a change that says it makes nothing slower.

    python -m bench.same_speed BEFORE AFTER [--shapes 8x32 32x64] [--precision fp32] [--rounds 40] [--threads 2]

Two processes, one in each checkout, hold the same MetaDistil step (MiniLM's size, random weights, one teacher) and take one
step in turns, A B B A, so that both see the same neighbours. Prints the ratio of medians, after over before, and the quartiles
of the ratios of neighbours. Both checkouts need `engine_step` of bench.step_cases.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from statistics import median, quantiles

STEP = """
import sys, time, torch
from bench.step_cases import SIZES, Case, Setting, engine_step
batch, length, precision = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
setting = Setting(Case("metadistil", batch, length, 1, precision), SIZES["minilm"], torch.device("cpu"))
call = engine_step(setting)[1]
for _ in range(3):
    call()
print("ready", flush=True)
for _ in sys.stdin:
    started = time.perf_counter()
    call()
    print(time.perf_counter() - started, flush=True)
"""


class Side:
    """A process that takes a step when it is told to."""

    def __init__(self, checkout: Path, batch: str, length: str, precision: str, threads: int):
        environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            [sys.executable, "-c", STEP, batch, length, precision], cwd=checkout, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        if self._line() != "ready":
            raise SystemExit(f"{checkout}: the step could not be built; its error stands above.")

    def _line(self) -> str:
        return self._process.stdout.readline().strip()

    def step(self) -> float:
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return float(self._line())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.same_speed", description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--shapes", nargs="+", default=["8x32", "32x64"], help="batch x length")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--rounds", type=int, default=40, help="pairs of steps")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    given = parser.parse_args()
    for shape in given.shapes:
        where = [checkout.resolve() for checkout in (given.before, given.after)]
        sides = [Side(checkout, *shape.split("x"), given.precision, given.threads) for checkout in where]
        times: list[list[float]] = [[], []]
        for number in range(given.rounds):
            for i in (0, 1) if number % 2 == 0 else (1, 0):
                times[i].append(sides[i].step())
        for side in sides:
            side.close()
        before, after = map(median, times)
        low, _, high = quantiles([b / a for a, b in zip(*times, strict=True)])
        print(f"{shape} {given.precision}: before {1e3 * before:.1f} ms, after {1e3 * after:.1f} ms, ratio {after / before:.3f}, "
              f"quartiles of neighbours {low:.3f} to {high:.3f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
