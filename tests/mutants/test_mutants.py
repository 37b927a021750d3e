"""The tool on a toy tree: a fault is found by its text, put in, noticed by the test that executes it, and taken out again."""

import subprocess

import pytest
from generate import draw
from places import find, sources
from run import HERE, Map, attempt, copy, mutants

CODE = "class Sum:\n    def add(self, a, b):\n        return a + b  # the sum\n\n    def sub(self, a, b):\n        return a - b\n"
TEST = "from kernels.sums import Sum\n\ndef test_sum():\n    assert Sum().add(1, 2) == 3\n\ndef test_none():\n    Sum().sub(1, 2)\n"
SIGN = {"name": "sign", "room": "kernels", "function": "Sum.add", "old": "return a + b", "new": "return a - b"}
UNSEEN = {"name": "unseen", "room": "kernels", "function": "Sum.sub", "old": "return a - b", "new": "return b - a"}


@pytest.fixture
def tree(tmp_path):
    for name, text in {
        "kernels/sums.py": CODE,
        "tests/kernels/test_sums.py": TEST,
        "pytest.ini": "[pytest]\npythonpath = .",
    }.items():
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_text(text)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path / "tree", check=True)
    return tmp_path / "tree"


@pytest.mark.slow
def test_dead_alive_stale(tree, tmp_path):
    known = Map(tmp_path / "map", there := copy(tree, tmp_path / "copy"), ["kernels"])
    gone = SIGN | {"old": "return a * b"}
    found = [attempt(mutant, there, known, everything=False) for mutant in (SIGN, UNSEEN, gone)]
    assert [(r["status"], r["killer"]) for r in found] == [
        ("dead", "tests/kernels/test_sums.py::test_sum"), ("alive", ""), ("stale", "sign: not found")]  # fmt: skip
    assert found[0]["place"] == "kernels/sums.py:3" and found[0]["tests"] == 1
    assert (there / "kernels/sums.py").read_text() == CODE


def test_a_line_that_moved_is_found_and_one_that_stands_twice_is_stale(tree):
    (tree / "kernels/sums.py").rename(tree / "kernels/adding.py")
    assert find(SIGN | {"function": "plus"}, sources(tree))[1] == 2
    (tree / "kernels/sums.py").write_text(CODE)
    with pytest.raises(LookupError, match="found 2 times"):
        find(SIGN, sources(tree))


def test_every_mutant_is_found():
    """Where this fails, a line has changed: give the mutant its new text in hand.yaml or random.json."""
    code = sources(HERE.parents[1])
    for mutant in mutants():
        find(mutant, code)


def test_the_same_seed_draws_the_same_mutants(tree):
    assert [m["name"] for m in draw(tree, 9, seed=1)] == [m["name"] for m in draw(tree, 9, seed=1)]
    assert {"Sum.add: + is -", "Sum.sub: - is +"} == {m["name"] for m in draw(tree, 9, seed=1)}
