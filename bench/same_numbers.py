"""Do two checkouts train the same weights? For a change that says it changes no number.

    python -m bench.same_numbers BEFORE AFTER --out DIR [--model DIR --data DIR] [--only NAME ...] [-- FLAG ...]

Runs each case below in both checkouts, each with a cache of its own, and compares every tensor of the exported student and
teachers by `torch.equal`. With --model and --data (an encoder of 6 layers, a folder of SST-2) also MetaDistil in bf16 on real
models. What stands behind `--` goes to every run. Ends with status 1 where a tensor differs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

TWO = ["--source", "embedded", "--teachers", "bert,bert2", "--student", "distilbert"]
ONE = ["--source", "embedded", "--teachers", "bert", "--student", "distilbert"]
CASES = {
    "finetune": [*ONE, "--method", "finetune"],
    "kd": [*TWO, "--method", "kd"],
    "metadistil": TWO,
    "metadistil, 2 pilot steps": [*TWO, "--pilot-steps", "2"],
    "metadistil, adamw pilot": [*TWO, "--pilot-optimizer", "adamw"],
    "metadistil, learned weights": [*TWO, "--teacher-weights", "learned"],
    "lgtm": [*TWO, "--method", "lgtm"],
    "reptile": [*TWO, "--method", "reptile"],
    "metakd": [*ONE, "--method", "metakd", "--domain-column", "domain"],
}
REAL = "metadistil in bf16 on real models"


def real(model: Path, data: Path) -> list[str]:
    names = ["--teachers", str(model), "--student", str(model), "--student-layers", "1,3,5", "--data", str(data)]
    return [*names, "--precision", "bf16", "--train-size", "1000", "--prepare-epochs", "1", "--epochs", "1"]


def train(checkout: Path, flags: list[str], output: Path, cache: Path) -> None:
    """Raises SystemExit with the run's last words where it fails; a finished run is left alone."""
    if (output / "summary.json").exists():
        return
    command = [sys.executable, "-m", "engine.train", *flags, "--seed", "1", "--output", str(output)]
    environment = {**os.environ, "METADISTIL_CACHE": str(cache), "PYTHONPATH": str(checkout)}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{checkout}: {' '.join(flags)} ended with status {done.returncode}:\n{done.stderr[-2000:]}")


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every exported model, by `<model>/<name>`."""
    files = sorted(run.glob("student/*.safetensors")) + sorted(run.glob("teachers/*/*.safetensors"))
    return {f"{file.parent.name}/{name}": t for file in files for name, t in load_file(file).items()}


def differences(before: Path, after: Path) -> tuple[int, list[str]]:
    """How many tensors there are, and the names of those that are not equal bit for bit."""
    one, two = weights(before), weights(after)
    apart = sorted(one.keys() ^ two.keys())
    apart += [name for name in one.keys() & two.keys() if not torch.equal(one[name], two[name])]
    return len(one), apart


def main() -> int:
    words = sys.argv[1:]
    more = words[words.index("--") + 1 :] if "--" in words else []
    parser = argparse.ArgumentParser(prog="python -m bench.same_numbers", description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the runs; finished ones are taken as they are"
    )
    parser.add_argument("--model", type=Path, help="a 6-layer encoder")
    parser.add_argument("--data", type=Path, help="a folder of SST-2")
    parser.add_argument("--only", nargs="+", choices=[*CASES, REAL], help="these cases")
    given = parser.parse_args(words[: words.index("--")] if "--" in words else words)
    cases = dict(CASES)
    if given.model and given.data:
        cases[REAL] = real(given.model.resolve(), given.data.resolve())
    failed = False
    for name, flags in cases.items():
        if given.only and name not in given.only:
            continue
        runs = []
        for side, checkout in (("before", given.before), ("after", given.after)):
            folder = given.out.resolve() / side
            runs.append(folder / name.replace(", ", "-").replace(" ", "-"))
            train(checkout.resolve(), [*flags, *more], runs[-1], folder / "cache")
        count, apart = differences(*runs)
        failed |= bool(apart) or not count
        said = f"{len(apart)} differ: {', '.join(apart[:3])}" if apart else "all equal"
        print(f"{name:36} {count:4} tensors, {said}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
