"""The README tells the truth: its tree is the repository's, and CI runs the test command as it stands there.

Its other commands and examples are run by tests/test_docs.py.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from pages import blocks

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def command(name: str) -> str:
    """The one bash block that is marked as this command."""
    (found,) = (b for b in blocks(ROOT / "README.md") if b.marks.get("command") == name and b.language == "bash")
    return found.text


def test_tree_names_what_exists_and_all_that_stands_at_the_top():
    (tree,) = re.findall(r"^<!-- tree -->\n```\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    lines = [re.fullmatch(r"(\S+)  +(\S.*)", line) for line in tree.splitlines()]
    assert all(lines), "a line of the tree is a path, two spaces or more, and a comment"
    paths = [line[1] for line in lines]
    assert len(paths) == len(set(paths))
    for path in paths:
        assert (ROOT / path).exists(), path
        assert path.endswith("/") == (ROOT / path).is_dir(), path
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    top = {line.strip('"').split("/")[0] for line in listed.splitlines()} - {".gitignore"}
    assert top <= {path.split("/")[0] for path in paths}
    rooms = {f"engine/{file.parent.name}/" for file in (ROOT / "engine").glob("*/__init__.py")}
    assert rooms <= set(paths)


def test_it_is_read_in_two_minutes():
    assert len(README.splitlines()) <= 200


def test_commands_use_what_is_in_the_repository():
    (pin,) = re.findall("^torch==.*", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    for name in ("main", "test"):
        assert "-c constraints.txt" in command(name) and f" {pin} " in command(name)


# `.ci/run`, in a stand-in for the repository: its environment has commands that only write down how they were called


@pytest.fixture
def ci(tmp_path):
    """Runs .ci/run with a given README; returns its status, the script that it took from there, and the calls."""
    commands, calls, script = tmp_path / "commands", tmp_path / "calls", tmp_path / "script"
    record = f'#!/bin/sh\ncall=$(echo ${{0##*/}} "$@")\necho "$call" >> {calls}\n'
    bodies = {
        "bash": f'#!/bin/sh\nfor script; do :; done; printf "%s" "$script" > {script}\nexec /bin/bash "$@"\n',
        "python3": record + "mkdir -p .venv-test/bin && : > .venv-test/bin/activate\n",
        **dict.fromkeys(["pip", "pytest", "ruff"], record + 'test "$call" != "$FAILS"\n'),
    }
    for name, body in bodies.items():
        (commands / name).parent.mkdir(exist_ok=True)
        (commands / name).write_text(body)
        (commands / name).chmod(0o755)
    (tmp_path / ".ci").mkdir()
    shutil.copy2(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")

    def run(readme: str, fails: str = "") -> tuple[int, str, list[str]]:
        (tmp_path / "README.md").write_text(readme)
        for file in (calls, script):
            file.write_text("")
        environment = {"PATH": f"{commands}:/usr/bin:/bin", "FAILS": fails, "CI": "true"}
        status = subprocess.run(["/bin/bash", tmp_path / ".ci" / "run"], env=environment, stdin=subprocess.DEVNULL)
        return status.returncode, script.read_text(), calls.read_text().splitlines()

    return run


AFTER = ["ruff check .", "ruff format --check .", "pytest -m slow"]


def test_ci_runs_the_test_command_as_it_stands(ci):
    status, script, calls = ci(README)
    assert status == 0
    assert script == command("test").rstrip("\n")
    assert calls[0].startswith("python3 -m venv")
    assert calls[-4:] == ["pytest", *AFTER]


@pytest.mark.parametrize("fails", ["pip install torch==2.13.0", "pytest", *AFTER])
def test_ci_stops_at_the_first_failure(ci, fails):
    status, _, calls = ci(README, fails)
    assert status != 0
    assert calls[-1] == fails


def test_ci_refuses_a_readme_without_the_command(ci):
    status, script, calls = ci(README.replace("<!-- command: test -->", ""))
    assert status != 0
    assert not script
    assert not calls
