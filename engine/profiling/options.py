"""The command line: its own flags, and those of engine.train for what is profiled."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, get_args

from engine import cli
from engine.config import Checkpointing, Config
from engine.errors import UserError
from engine.plugins import STRATEGIES

UNITS = {"": 1, "B": 1} | {
    f"{prefix}{i}{b}": (1024 if i else 1000) ** power
    for power, prefix in enumerate("KMGT", 1) for i in ("", "i") for b in ("", "B")
}  # fmt: skip
CHECKPOINTING = list(get_args(Checkpointing))


@dataclass(frozen=True)
class Options:
    config: Config
    words: list[str]  # of engine.train
    estimate: bool
    budget: int | None  # bytes
    classes: int
    output: str | None
    steps: int  # that are timed
    choices: dict[str, list[Any]]  # values of engine.profiling.estimate.Setting that were listed


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see python -m engine.profiling --help.")


def parser() -> argparse.ArgumentParser:
    result = _Parser(
        prog="python -m engine.profiling", allow_abbrev=False,
        usage="%(prog)s [--estimate [--gpu-memory 24GB]] [--teachers A,B --student S] [--strategies all] [--lengths 64,128] "
        "[--batch-sizes 8,32] [any flag of engine.train]",
        description="Show where time and memory of a step go, from a few steps of every setting on random weights. With "
        "--estimate: predict how much memory a run needs and for what, and which settings fit a GPU. The prediction comes from "
        "the engine's own steps on fake tensors, which have a size and no content; no weights are read and no GPU is needed.",
        epilog="Any other flag is one of engine.train (python -m engine.train --help). Lists are comma-separated; every "
        "combination is a row of the table.",
    )  # fmt: skip
    result.add_argument("--estimate", action="store_true", help="predict the peak memory instead of measuring steps")
    result.add_argument("--gpu-memory", metavar="SIZE", help="the memory of the GPU, as 24GB, 24GiB or bytes: says which "
                        "settings fit, and searches for some that do where none fits; implies --device cuda unless that is given")  # fmt: skip
    result.add_argument("--strategies", help=f"one or more of {', '.join(STRATEGIES)}; or all (default: --meta-grad)")
    result.add_argument(
        "--checkpointing-choices", help=f"one or more of {', '.join(CHECKPOINTING)}; or all (default: --checkpointing)"
    )
    result.add_argument("--batch-sizes", help="examples per batch (default: --batch-size)")
    result.add_argument(
        "--micro-batch-sizes", help="examples that go through the models at once (default: --micro-batch-size)"
    )
    result.add_argument("--lengths", "--length", help="tokens per example (default: --max-length)")
    result.add_argument("--classes", type=int, default=2, help="classes that the models tell apart (default: %(default)s); 1 is "
                        "a regression")  # fmt: skip
    result.add_argument("--steps", type=int, default=5, help="timed steps per setting (default: %(default)s)")
    result.add_argument(
        "--output", help="directory of the results (default: runs/<time>-profile; of an estimate, none)"
    )
    return result


def parse(words: Sequence[str]) -> Options:
    """Raises UserError with one sentence for anything that does not fit."""
    given, rest = parser().parse_known_args(list(words))
    if "--resume" in rest:
        raise UserError("--resume is not for profiling, which trains nothing; leave it out.")
    config = cli.parse(rest, "engine.profiling")
    budget = None if given.gpu_memory is None else size(given.gpu_memory, "--gpu-memory")
    if budget is not None and config.run.device == "auto":
        config.run.device = "cuda"
    if given.classes < 1:
        raise UserError(f"--classes is {given.classes}; it must be at least 1.")
    if given.steps < 1:
        raise UserError(f"--steps is {given.steps}; it must be at least 1.")
    strategies = sorted(STRATEGIES, key=lambda name: name != "exact")  # first what the others are compared with
    found = {
        "meta_grad": _named(given.strategies, "--strategies", strategies),
        "checkpointing": _named(given.checkpointing_choices, "--checkpointing-choices", CHECKPOINTING),
        "batch_size": _numbers(given.batch_sizes, "--batch-sizes", 1),
        "micro_batch_size": _numbers(given.micro_batch_sizes, "--micro-batch-sizes", 1),
        "max_length": _numbers(given.lengths, "--lengths", 4),
    }
    listed = {name: values for name, values in found.items() if values is not None}
    return Options(config, rest, given.estimate, budget, given.classes, given.output, given.steps, listed)


def size(given: str, flag: str) -> int:
    """Bytes of "24GB" (10^9), "24GiB" (2^30), "80G" (as GB) or "24000000000".

    Ours stays: humanfriendly and pint, which read sizes, are no dependencies, and datasets' own reads no "0.5TiB".
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", given.strip())
    units = {name.lower(): factor for name, factor in UNITS.items()}
    if not match or match[2].lower() not in units or not float(match[1]) > 0:
        raise UserError(f"{flag} is {given!r}; give a size above 0 such as 24GB, 24GiB, 80G or bytes.")
    return int(float(match[1]) * units[match[2].lower()])


def command(words: Sequence[str], changes: dict[str, Any]) -> str:
    """The run of engine.train with these flags, and with others in the place of those that change."""
    kept, skip = [], False
    flags = {f"--{name.replace('_', '-')}" for name in changes}
    for word in words:
        if skip or word.split("=")[0] in flags:
            skip = not skip and "=" not in word
            continue
        kept.append(word)
    added = [[f"--{name.replace('_', '-')}", str(value)] for name, value in changes.items() if value is not None]
    return shlex.join(["python", "-m", "engine.train", *kept, *(word for pair in added for word in pair)])


def _named(given: str | None, flag: str, known: list[str]) -> list[str] | None:
    if given is None:
        return None
    wanted = known if given == "all" else [part.strip() for part in given.split(",")]
    for name in wanted:
        if name not in known:
            raise UserError(f"{flag} has {name!r}; it can be {', '.join(known)}, several of them, or all.")
    return [name for name in known if name in wanted]


def _numbers(given: str | None, flag: str, minimum: int) -> list[int] | None:
    if given is None:
        return None
    try:
        found = [int(part) for part in given.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < minimum:
        raise UserError(f"{flag} is {given!r}; give whole numbers of at least {minimum}, comma-separated.")
    return list(dict.fromkeys(found))
