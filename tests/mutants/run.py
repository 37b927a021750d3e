"""Mutants of the core: which tests notice that a line is wrong?

    python tests/mutants/run.py --map DIR [--room meta] [--name NAME] [--save FILE] [--before FILE] [--all] [--tree CHECKOUT]

hand.yaml holds faults written by hand, random.json those that generate.py drew. Each is tried in a copy of the tree, by the
quick tests that enter its function, those of its room first, quick files before long ones. Which these are is measured once,
by the quick suite (with --room by that room's tests alone), into the folder --map; measure again, into a new one, when tests
or code have changed. Where no test enters the function, as with C++ and Triton's kernels, all of its room run. A
survivor could still die by a test that starts the program in a process of its own, for these are not measured: --all gives
every survivor all quick tests.

A mutant is dead (a test failed), late (the tests hung), alive, or stale: its line is not found, or found twice, and wants a
new anchor. With --before, the saved results of another run, the exit status is 1 where one died there that is not dead here;
baseline.json has those of the suite of 5,510 quick tests that today's was thinned from, thinned.json those of today's.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml
from places import Source, changed, find, key, sources

HERE = Path(__file__).resolve().parent
PATIENCE = 300  # seconds that tests may take beyond three times what they took when they were measured
DEAD = ("dead", "late")


def mutants() -> list[dict]:
    """All of them, but those that are known to change nothing that can be observed."""
    every = yaml.safe_load((HERE / "hand.yaml").read_text()) + json.loads((HERE / "random.json").read_text())
    return [mutant for mutant in every if "equivalent" not in mutant]


def copy(tree: Path, to: Path) -> Path:
    """Git's files, with what is not committed yet; links stay links."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in filter(None, subprocess.check_output(listing, cwd=tree, text=True).split("\0")):
        if os.path.lexists(tree / name):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(tree / name, to / name, follow_symlinks=False)
    return to


def run(tree: Path, arguments: list[str], limit: float | None = None, **environment: str) -> tuple[int | None, str]:
    """pytest's exit status, None after `limit` seconds, and its output.

    In a fork of this process, which has imported what takes long. What a mutant writes into a cache is gone with it.
    """
    shutil.rmtree(tree / ".cache", ignore_errors=True)
    with tempfile.TemporaryFile("w+") as output:
        call = (tree, arguments, output.fileno(), {"METADISTIL_CACHE": str(tree / ".cache")} | environment)
        process = multiprocessing.get_context("fork").Process(target=_child, args=call)
        process.start()
        process.join(limit)
        late = process.is_alive()
        if late:
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
        output.seek(0)
        return None if late else process.exitcode, output.read()


def _child(tree: Path, arguments: list[str], output: int, environment: dict[str, str]) -> None:
    os.setsid()
    os.chdir(tree)
    os.environ |= environment
    os.dup2(output, 1), os.dup2(output, 2)
    sys.stdout = sys.stderr = os.fdopen(output, "w")
    sys.dont_write_bytecode = True  # a mutant of one size and second with another would be taken for it
    plugins = [importlib.import_module("recorder")] if "MUTANTS_MAP" in environment else []
    sys.path[:] = [str(tree), *(path for path in sys.path if Path(path).resolve() != HERE)]
    status = pytest.main(["-q", "-p", "no:cacheprovider", "-m", "not slow", *arguments], plugins)
    sys.stdout.flush()
    os._exit(status)


def folders(tree: Path) -> list[str]:
    """Of tests, but those that are about mutants."""
    return sorted({file.parent.name for file in (tree / "tests").glob("*/test_*.py")} - {HERE.name})


class Map:
    """Which tests enter which function: JSON of each folder of tests, made by recorder.py."""

    def __init__(self, folder: Path, tree: Path, rooms: list[str]):
        """Measures the tests of `rooms` that are not there yet, in `tree`."""
        folder.mkdir(parents=True, exist_ok=True)
        for room in rooms:
            file = folder.resolve() / f"{room}.json"
            if not file.exists():
                print(f"measuring tests/{room}", file=sys.stderr)
                status, output = run(tree, [f"tests/{room}"], MUTANTS_MAP=str(file))
                if status not in (0, 1):  # a test that fails without a mutant will be left out
                    raise RuntimeError(f"pytest ended with {status}:\n{output[-3000:]}")
        self.measured = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
        self.seconds = {test: s for each in self.measured for test, s in each["seconds"].items()}

    def tests(self, mutant: dict, source: Source, number: int) -> list[str]:
        """The tests that are to notice the mutant."""
        room, function = f"tests/{mutant['room']}/", key(source.path, source.function(number))
        found = {name for each in self.measured for name in each["entered"].get(function, [])}
        shared = {test for test in self.seconds if test.partition("::")[0] in found} - found
        chosen = self.in_order(found & self.seconds.keys(), room) + self.in_order(shared, room)
        rooms = (room, "tests/params/") if source.tree is None else (room,)
        return chosen or self.in_order({test for test in self.seconds if test.startswith(rooms)}, room)

    def in_order(self, tests: set[str], room: str = "") -> list[str]:
        """Those of the room first, quick files before long ones; a file's together, for they share what they set up."""
        total: Counter[str] = Counter()
        for test in tests:
            total[test.partition("::")[0]] += self.seconds[test]

        def place(test: str) -> tuple:
            file = test.partition("::")[0]
            return not test.startswith(room), total[file], file, self.seconds[test]

        return sorted(tests, key=place)


def attempt(mutant: dict, tree: Path, known: Map, everything: bool) -> dict:
    """Put the mutant into the copy `tree`, run the tests, take it out again."""
    result, started = {key: mutant[key] for key in ("name", "room", "function")}, time.monotonic()
    try:
        source, number = find(mutant, sources(tree))
    except LookupError as error:
        return result | {"place": "", "status": "stale", "killer": str(error), "seconds": 0.0, "tests": 0}
    file, tests = tree / source.path, known.tests(mutant, source, number)
    build = {} if source.tree else {"METADISTIL_NATIVE_CACHE": str(tree / ".cache" / "native")}
    before = file.read_text()
    file.write_text(changed(mutant, source, number))
    try:
        for chosen in [tests, known.in_order(known.seconds.keys() - set(tests))] if everything else [tests]:
            (tree / ".tests").write_text("\n".join(chosen))
            limit = PATIENCE + 3 * sum(known.seconds[test] for test in chosen)
            state, killer = (
                verdict(*run(tree, ["-x", "--tb=no", "@.tests"], limit, **build)) if chosen else ("alive", "")
            )
            if state != "alive":
                break
    finally:
        file.write_text(before)
    result |= {"place": f"{source.path}:{number + 1}", "status": state, "killer": killer}
    return result | {"seconds": round(time.monotonic() - started, 1), "tests": len(tests)}


def verdict(status: int | None, output: str) -> tuple[str, str]:
    """Status of a mutant, and the test that it died of."""
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
    if status == 0:
        return "alive", ""
    if status is None:
        return "late", "a timeout"
    if status < 0:
        return "dead", f"signal {-status}"
    if status in (1, 2) and failed:
        return "dead", failed[1]
    if status == 4 and "found no collectors for" in output:  # its module cannot be imported
        return "dead", "an import"
    raise RuntimeError(f"pytest ended with {status}:\n{output[-3000:]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--map", type=Path, required=True, help="folder of what tests enter; made where it is missing")
    parser.add_argument("--room", help="only mutants of this room")
    parser.add_argument("--name", default="", help="only mutants with this in their name")
    parser.add_argument("--save", type=Path, help="JSON of the results; what it has already is not run again")
    parser.add_argument("--before", type=Path, help="JSON of an earlier run to compare with")
    parser.add_argument("--all", action="store_true", help="survivors meet all quick tests")
    parser.add_argument("--tree", type=Path, default=HERE.parents[1], help="another checkout to try them in")
    given = parser.parse_args()
    os.environ.setdefault("TRITON_INTERPRET", "1")  # as tests/conftest.py, but before the imports
    for slow in ("torch", "transformers", "datasets", "torchmetrics", "hypothesis"):
        importlib.import_module(slow)
    results = json.loads(given.save.read_text()) if given.save and given.save.exists() else []
    chosen = [m for m in mutants() if given.room in (None, m["room"]) and given.name in m["name"]]
    with tempfile.TemporaryDirectory() as folder:
        tree = copy(given.tree.resolve(), Path(folder))
        known = Map(given.map, tree, [given.room] if given.room and not given.all else folders(tree))
        print("| mutant | place | status | killed by | s |\n|---|---|---|---|---|")
        for mutant in chosen:
            if mutant["name"] in {result["name"] for result in results}:
                continue
            results.append(attempt(mutant, tree, known, given.all))
            print("| {name} | {place} | {status} | {killer} | {seconds} |".format_map(results[-1]), flush=True)
            if given.save:
                given.save.write_text(json.dumps(results, indent=1) + "\n")
    earlier = json.loads(given.before.read_text()) if given.before else []
    died = {result["name"] for result in earlier if result["status"] in DEAD}
    worse = [result for result in results if result["name"] in died and result["status"] not in DEAD]
    for result in worse:
        print(f"died before and is {result['status']} now: {result['name']}")
    return int(bool(worse))


if __name__ == "__main__":
    sys.exit(main())
