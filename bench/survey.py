"""Which model families work: every one of bench/zoo.py through the command line, as teacher and as student.

    python -m bench.survey [--family NAME ...] [--cell NAME ...] [--write]

Each cell of the table is one run of `python -m engine.train` in this process, on a few texts, some longer than the models read. It

  works    if the exported student, loaded by plain transformers with its exported tokenizer, gives the engine's logits, on single
           and on padded texts; and if teachers learn, the strategy `exact` gives the meta-gradient of `double_backward`
  refused  where the command said so in one sentence before anything was trained
  FAULT    in every other case: then the exit status is 1

Without --family and --cell, --write leaves the table in docs/families.md.
"""

from __future__ import annotations

import argparse
import copy
import csv
import inspect
import io
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from bench.zoo import FAMILIES, LABELS, LETTERS, Family, save
from engine import MetaStep, cli
from engine import train as command
from engine.errors import UserError
from engine.models.network import Encoder
from engine.run import job
from engine.run.interrupts import Interrupts
from engine.run.setup import Setup
from engine.screen.console import Console

PAGE = Path(__file__).resolve().parents[1] / "docs" / "families.md"
TOLERANCE = 1e-5  # of logits, of which the largest is about 1
# Of a meta-gradient, relative to its norm. Some models compute parts in float32 whatever their weights are.
GRADIENT = {torch.float64: 1e-5, torch.float32: 1e-4}
BATCH = 4
COMMON = {"train-size": 2 * BATCH, "quiz-size": BATCH, "validation-size": BATCH, "test-size": BATCH, "batch-size": BATCH,
          "max-length": 24, "epochs": 1, "prepare-epochs": 1, "lr": 1e-3, "teacher-lr": 1e-3, "pilot-lr": 0.05, "temperature": 2,
          "telemetry": "off", "device": "cpu"}  # fmt: skip
LENGTHS = [3, 14, 30, 6, 9, 1, 12, 4]  # words of a text, some more than a model reads


@dataclass(frozen=True)
class Cell:
    """A column of the table: what stands above it, its flags, and which texts it reads."""

    title: str
    flags: tuple[str, ...] = ()
    data: str = "texts"


CELLS = {
    "M1": Cell("`metadistil`, M 1"),
    "M2": Cell("`metadistil`, M 2", ("--pilot-steps", "2")),
    "kd": Cell("`kd`", ("--method", "kd", "--retrain-teachers")),
    "layers": Cell("`--student-layers 0,2`", ("--student-layers", "0,2")),
    "checkpointing": Cell("`--checkpointing both`, M 2", ("--checkpointing", "both", "--pilot-steps", "2")),
    "pairs": Cell("pairs", (), "pairs"),
    "patient": Cell("`--feature-loss patient`", ("--feature-loss", "patient", "--beta", "1")),
}


@dataclass(frozen=True)
class Result:
    """Of one cell: "works", "refused" with the sentence, or "FAULT" with what is wrong."""

    kind: str
    text: str = ""
    gradient: float | None = None  # how far the meta-gradients are apart


class Wrong(Exception):
    """What the check found."""


def write_data(folder: Path) -> None:
    """texts.csv and pairs.csv; a label follows from the first word."""
    generator = torch.Generator().manual_seed(0)

    def text(length: int) -> str:
        return " ".join(LETTERS[i] for i in torch.randint(len(LETTERS), (length,), generator=generator))

    with open(folder / "texts.csv", "w", newline="") as one, open(folder / "pairs.csv", "w", newline="") as two:
        texts, pairs = csv.writer(one), csv.writer(two)
        texts.writerow(["sentence", "label"])
        pairs.writerow(["sentence1", "sentence2", "label"])
        for i in range(12 * BATCH):
            label = f"class {i % LABELS}"
            texts.writerow([LETTERS[i % LABELS] + " " + text(LENGTHS[i % 8]), label])
            pairs.writerow(
                [LETTERS[i % LABELS] + " " + text(LENGTHS[i % 8] // 2 + 1), text(LENGTHS[(i + 3) % 8] // 2 + 1), label]
            )


@dataclass
class Run:
    """What is known of a run while it goes on."""

    setup: Setup | None = None
    gradient: float | None = None


def words(models: Path, data: Path, cell: Cell, output: Path) -> list[str]:
    """The command line."""
    named = {"teachers": models / "teacher", "student": models / "student", "data": data / f"{cell.data}.csv",
             "output": output, "cache-dir": output.parent / "cache"}  # fmt: skip
    return [word for name, value in (COMMON | named).items() for word in (f"--{name}", str(value))] + list(cell.flags)


def judge(family: Family, models: Path, data: Path, cell: Cell, output: Path) -> Result:
    """Run a cell and look at what came of it."""
    run = Run()
    try:
        with redirect_stdout(io.StringIO()), looked_at(run):
            given = words(models, data, cell, output)
            with Interrupts(print) as interrupts:
                command.run(cli.parse(given), Console(), interrupts, time.monotonic(), " ".join(given))
            check_export(run.setup, output, family.invariant)
    except UserError as e:
        if run.setup is None:
            return Result("refused", str(e).replace(str(models), "models").replace("student[0,2]", "student"))
        return Result("FAULT", f"refused when training had begun: {e}")
    except Wrong as e:
        return Result("FAULT", str(e))
    except Exception as e:  # noqa: BLE001 - a traceback of any kind is what this looks for
        where = traceback.extract_tb(e.__traceback__)[-1]
        said = (str(e).strip().splitlines() or [""])[0][:200]
        return Result("FAULT", f"{type(e).__name__}: {said} ({Path(where.filename).name}:{where.lineno})")
    return Result("works", gradient=run.gradient)


@contextmanager
def looked_at(run: Run) -> Iterator[None]:
    """`run` learns of the job's set-up, and compares meta-gradients before training begins."""
    train = job.train

    def begin(setup: Setup, *rest):
        run.setup = setup
        if setup.config.method.method == "metadistil" and setup.config.method.meta_grad == "exact":
            with torch.random.fork_rng(devices=[]):
                run.gradient = compare_gradients(setup)
        return train(setup, *rest)

    with patch.object(job, "train", begin), patch("engine.run.results._write_page", lambda output, console: None):
        yield


def compare_gradients(setup: Setup) -> float:
    """How far `exact` is from `double_backward`, relative to its norm, in float64 where the model's code allows that.

    Raises Wrong where they differ, or are nothing.
    """
    try:
        right = meta_gradient(setup, "double_backward", torch.float64)
    except RuntimeError:  # a constant in float32 meets a float64
        right = torch.tensor(torch.nan)
    if right.isnan().any():  # the smallest float64, which a mask is made of, is infinite where scores become float32
        right = meta_gradient(setup, "double_backward", torch.float32)
    apart = ((meta_gradient(setup, "exact", right.dtype) - right).norm() / right.norm()).item()
    if not right.norm() > 1e-4:
        raise Wrong(f"the meta-gradient's norm is {right.norm():.1e}")
    if not apart <= GRADIENT[right.dtype]:
        raise Wrong(f"the meta-gradient is {apart:.1e} off")
    return apart


def meta_gradient(setup: Setup, strategy: str, dtype: torch.dtype) -> Tensor:
    """Of the teacher's weights, on the first batches of the run, by copies of its models."""
    config, encoded = setup.config.method, setup.examples.encoded
    student, teacher = (copied(network, dtype) for network in (setup.models.student.network, *setup.models.taught()))
    checkpointing = config.checkpointing if strategy == "exact" else "none"
    matching, objective = setup.losses.matching, setup.losses.objective
    with nullcontext() if matching is None else matching.between(student, [teacher]):
        student.module.to(dtype)  # with what it learns for the states' sake
        step = MetaStep(
            student, [teacher], objective, pilot_lr=config.pilot_lr, strategy=strategy, checkpointing=checkpointing
        )
        batches = [encoded.train[0].batch(list(range(BATCH * i, BATCH * (i + 1)))) for i in range(config.pilot_steps)]
        torch.manual_seed(0)
        step.meta_gradient(batches, [encoded.quiz.batch(list(range(BATCH)))])
    return torch.cat([p.grad.flatten() for p in teacher.module.parameters() if p.grad is not None])


def copied(network: Encoder, dtype: torch.dtype) -> Encoder:
    return Encoder(network.name, copy.deepcopy(network.module).to(dtype), network.encoding)


def check_export(setup: Setup, output: Path, invariant: bool) -> None:
    """Raises Wrong where the exported student, loaded by transformers alone, does not give the engine's logits."""
    skipped = [p["skipped"] for p in json.loads((output / "summary.json").read_text())["phases"].values()]
    if any(skipped):
        raise Wrong(f"{sum(skipped)} updates left out, for gradients that are not finite")
    exported = AutoModelForSequenceClassification.from_pretrained(output / "student").eval()
    tokenizer = AutoTokenizer.from_pretrained(output / "student")
    network, split = setup.models.student.network, setup.examples.encoded.validation
    longest = split.only({network.encoding}).tables[0].encoding.max_length
    read = inspect.signature(exported.forward).parameters

    @torch.no_grad()
    def plain(rows: list[dict], width: int | None = None) -> Tensor:
        """[B, C] of rows, padded to the longest or to `width`."""
        pair = [row["pair"] for row in rows] if "pair" in rows[0] else None
        padding = {"padding": "max_length", "max_length": width} if width else {"padding": True, "max_length": longest}
        inputs = tokenizer([row["text"] for row in rows], pair, truncation=True, return_tensors="pt", **padding)
        return exported(**{name: t for name, t in inputs.items() if name in read}).logits

    @torch.no_grad()
    def ours(rows: list[int], **kind) -> tuple[Tensor, int]:
        """[B, C] of the engine, and the width that it pads these rows to."""
        batch = split.batch(rows)
        with network.in_mode(train=False):
            return network(batch, **kind).logits, batch.inputs[network.encoding]["input_ids"].shape[1]

    lines = (output / "predictions" / "validation.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    written = torch.tensor([row["logits"] for row in rows])
    everything = list(range(len(rows)))
    alone = plain(rows, None if invariant else ours(everything)[1])
    same("padded texts", alone, written)
    for kind in ("repeated", "higher"):
        same(f"padded texts in a pass that is {kind}", alone, ours(everything, **{kind: True})[0])
    for i, row in enumerate(rows):
        single, width = ours([i])
        same(f"a single text of {len(row['text'].split())} words", plain([row], None if invariant else width), single)
    if written.std(0).max() < 1e-2:
        raise Wrong(f"logits are alike for all texts: {written.std(0).tolist()}")


def same(what: str, plain: Tensor, ours: Tensor) -> None:
    apart = (plain - ours).abs().max().item() / max(1.0, plain.abs().max().item())
    if not apart <= TOLERANCE:
        raise Wrong(f"logits of {what} are {apart:.1e} off those of the exported model alone")


def table(
    names: list[str], cells: list[str], folder: Path, told: Callable[[str, str, Result, float], None]
) -> dict[str, dict[str, Result]]:
    """All results, by family and cell. `told` is called after each with the seconds that it took."""
    write_data(folder)
    results: dict[str, dict[str, Result]] = {name: {} for name in names}
    with settled():
        for number, name in enumerate(names):
            family, models = FAMILIES[name], folder / str(number)
            for seed, role in enumerate(("student", "teacher")):
                save(family, seed, models / role)
            for cell in cells:
                started = time.monotonic()
                found = judge(family, models, folder, CELLS[cell], models / cell)
                results[name][cell] = found
                told(name, cell, found, time.monotonic() - started)
    return results


@contextmanager
def settled() -> Iterator[None]:
    """Nobody is asked on the network, transformers is quiet, and one thread computes."""
    threads, verbosity = torch.get_num_threads(), transformers.logging.get_verbosity()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with patch.dict(os.environ, {"HF_HUB_OFFLINE": "1"}):
            yield
    finally:
        torch.set_num_threads(threads)
        transformers.logging.set_verbosity(verbosity)


def _power(x: float) -> str:
    return f"{x:.0e}".replace("e-0", "e-")


HEAD = f"""# Model families
What `python -m engine.train` does with models of each family, written by `make families`. A cell is one run of the command with
tiny random models of the family, one as the teacher and one as the student; some of its texts are longer than the models read. M is
the number of pilot steps; a column that names no method is `metadistil`, at M 1 if it says nothing else.

- **works**: the exported student, loaded by plain transformers with its exported tokenizer, gives the engine's logits, on single and
  on padded texts, to {_power(TOLERANCE)} of the largest or of 1. Where the teacher learns, the strategy `exact` gives the meta-gradient of
  `double_backward` besides, to {_power(GRADIENT[torch.float64])} of its norm in float64, or {_power(GRADIENT[torch.float32])} in float32
  for families whose own code has no float64.
- **refused**: the command says in one sentence why not, before anything is trained. The sentences stand below the table.

Tokenizers have the special tokens, token types and padding of the family's published models; `bench/zoo.py` has all settings.
A model of a family that is not here runs as transformers made it, and is tried out in the same way before anything is trained.

"""


def page(results: dict[str, dict[str, Result]]) -> str:
    lines = ["| family | " + " | ".join(cell.title for cell in CELLS.values()) + " |", "|---" * (len(CELLS) + 1) + "|"]
    lines += [
        "| " + " | ".join([name, *(found[cell].kind for cell in CELLS)]) + " |" for name, found in results.items()
    ]
    said: dict[tuple[str, str], list[str]] = {}
    for name, found in results.items():
        for cell, result in found.items():
            if result.kind != "works":
                said.setdefault((name, result.text), []).append(CELLS[cell].title)
    lines += ["", "| family | where | what the command says |", "|---|---|---|"]
    lines += [f"| {name} | {'; '.join(where)} | {sentence} |" for (name, sentence), where in said.items()]
    made = f"Made with torch {torch.__version__.partition('+')[0]} and transformers {transformers.__version__}."
    return HEAD + "\n".join([*lines, "", made, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="NAME")
    parser.add_argument("--cell", nargs="+", choices=CELLS, default=list(CELLS), metavar="NAME")
    parser.add_argument("--write", action="store_true", help="leave the whole table in docs/families.md")
    options = parser.parse_args()
    whole = len(options.family) == len(FAMILIES) and len(options.cell) == len(CELLS)
    if options.write and not whole:
        parser.error("--write is for the whole table; leave --family and --cell out.")

    def tell(name: str, cell: str, result: Result, seconds: float) -> None:
        off = "" if result.gradient is None else f" (gradient {result.gradient:.0e})"
        print(f"{name:22} {cell:14} {seconds:5.2f} s  {result.kind}{off} {result.text}", flush=True)

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        results = table(options.family, options.cell, Path(folder), tell)
    if options.write:
        PAGE.write_text(page(results))
    kinds = [result.kind for found in results.values() for result in found.values()]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in ("works", "refused", "FAULT"))
    print(f"{counts}, in {time.monotonic() - started:.0f} s")
    return int("FAULT" in kinds)


if __name__ == "__main__":
    sys.exit(main())
