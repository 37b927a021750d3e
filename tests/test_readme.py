"""The README tells the truth: its tree is the repository's, and CI runs the test command as it stands there."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def block(mark: str, language: str = "") -> str:
    """The one fenced block that follows the comment `mark`."""
    (found,) = re.findall(rf"^<!-- {mark} -->\n```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    return found


def test_tree_names_what_exists_and_all_that_stands_at_the_top():
    lines = [re.fullmatch(r"(\S+)  +(\S.*)", line) for line in block("tree").splitlines()]
    assert all(lines), "a line of the tree is a path, two spaces or more, and a comment"
    paths = [line[1] for line in lines]
    assert len(paths) == len(set(paths))
    for path in paths:
        assert (ROOT / path).exists(), path
        assert path.endswith("/") == (ROOT / path).is_dir(), path
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    top = {line.strip('"').split("/")[0] for line in listed.splitlines()} - {".gitignore"}
    assert top <= {path.split("/")[0] for path in paths}


def test_commands_use_what_is_in_the_repository():
    for mark in ("command: main", "command: test"):
        command = block(mark, "bash")
        assert "-c constraints.txt" in command
        assert f"torch=={dict(pins())['torch']}" in command


def test_the_example_of_the_kernels(capsys):
    names = {}
    exec(compile(block("example: kernels", "python"), "README.md", "exec"), names)
    teacher = names["teachers"][1]
    assert names["gradient"].shape == names["student"].shape and names["second"].shape == teacher.shape
    assert names["second"].norm() > 0 and names["hidden"].grad.norm() > 0 and names["head"].grad.norm() > 0
    assert re.fullmatch(r"loss \d+\.\d\d, to the second teacher \d\.\de-\d+, cotangents 2\n", capsys.readouterr().out)


def pins() -> list[tuple[str, str]]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [tuple(line.split("==")) for line in lines if not line.startswith("#")]


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
    command = block("command: test", "bash")
    status, script, calls = ci(README)
    assert status == 0
    assert script == command.rstrip("\n")
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
