"""Flags, YAML and `engine.config` are one thing in three forms."""

import subprocess
import sys
from dataclasses import fields
from typing import get_args, get_type_hints

import pytest
import yaml
from run_helpers import ROOT

from engine import cli
from engine.config import Config
from engine.errors import UserError

OPTIONS = {f.name: (f, get_type_hints(section.default_factory)[f.name])
           for section in fields(Config) for f in fields(section.default_factory)}  # fmt: skip


def other_value(name: str):
    """A valid value of a setting that is not its default."""
    option, kind = OPTIONS[name]
    if kind is bool:
        return not option.default
    if type(None) in get_args(kind):
        kind = next(k for k in get_args(kind) if k is not type(None))
    if choices := get_args(kind):
        return next(choice for choice in choices if choice != option.default)
    if (names := option.metadata["names"]) is not None:
        return next(name for name in names if name != option.default)
    if kind is str:
        return "0,1" if name == "student_layers" else f"other {name}"
    low, high = option.metadata["minimum"], option.metadata["maximum"]
    value = (low or 0) + (7 if kind is int else 0.125)
    return kind(min(value, high) if high is not None else value)


VALUES = {name: other_value(name) for name in OPTIONS if name != "resume"}  # which needs a run: test_resume.py


def words_of(values) -> list[str]:
    flags = {f"--{name.replace('_', '-')}": value for name, value in values.items()}
    return [word for flag, value in flags.items() for word in ([flag] if value is True else [flag, str(value)])]


def test_every_setting_is_a_flag_with_help_and_default(capsys):
    with pytest.raises(SystemExit) as end:
        cli.parse(["--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, (option, _) in OPTIONS.items():
        assert f"--{name.replace('_', '-')}" in text
        # the terminal's width breaks lines, also at hyphens
        assert option.metadata["help"].replace(" ", "").replace("-", "") in text.replace(" ", "").replace("-", ""), name
        assert len(option.metadata["help"]) > 15


def test_flags_and_yaml_set_every_one(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(VALUES))
    for found in (cli.parse(words_of(VALUES)), cli.parse(["--config", str(file)])):
        assert found.to_flat() == VALUES | {"resume": False}
        assert all(type(found.to_flat()[name]) is type(value) for name, value in VALUES.items())


def test_a_flag_wins_over_the_file_wherever_it_stands(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("epochs: 7\nlr: 1e-3\n")
    for words in (["--config", str(file), "--epochs", "2"], ["--epochs", "2", f"--config={file}"]):
        config = cli.parse(words)
        assert (config.optim.epochs, config.optim.lr) == (2, 1e-3), words


def test_no_flags_are_the_defaults():
    """Whatever was read before: a file, other values, a mistake beside --print_config."""
    cli.parse(["--epochs", "7", "--retrain-teachers", "--label-column", "no"])
    with pytest.raises(UserError, match="--lr is 'abc'"):
        cli.parse(["--print_config", "--lr", "abc"])
    assert cli.parse([]) == Config()


def test_what_is_printed_and_what_is_kept_are_read_back(capsys, tmp_path):
    """A run's file names no output."""
    config = cli.parse(words := [*words_of(VALUES), "--lr", "6e-5", "--student-layers", "1", "--label-column", "no"])
    with pytest.raises(SystemExit) as end:
        cli.parse([*words, "--print_config"])
    assert not end.value.code
    file = tmp_path / "c.yaml"
    file.write_text(capsys.readouterr().out)
    assert cli.parse(["--config", str(file)]) == config
    file.write_text(cli.dump(config))
    again = cli.parse(["--config", str(file)])
    assert again.run.output is None
    again.run.output = config.run.output
    assert again == config


@pytest.mark.parametrize("word", ["1", "null", "yes", "1e3", "[a]", "~", "a: b", "2024-01-01"])
def test_text_is_taken_literally(word):
    """A column or a directory may have a name that YAML would read as something else."""
    assert cli.parse(["--data", word]).data.data == word
    # where there is a "not given", null and ~ are how one goes back to it
    assert cli.parse(["--label-column", word]).data.label_column == (None if word in ("null", "~") else word)


@pytest.mark.parametrize("name", [n for n, (o, _) in OPTIONS.items() if o.metadata["minimum"] is not None])
def test_the_range_is_closed_and_checked(name):
    option, _ = OPTIONS[name]
    low, high = option.metadata["minimum"], option.metadata["maximum"]
    Config.from_flat({name: low})
    for value in [low - 1, float("nan"), *([] if high is None else [high + 1])]:
        with pytest.raises(UserError, match=f"^--{name.replace('_', '-')} is .*; it must be "):
            Config.from_flat({name: value})


def test_parsing_imports_no_torch():
    script = "import sys; from engine import cli; cli.parse(['--lr', '1']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True)
    assert not {"torch", "transformers", "datasets", "numpy"} & set(done.stdout.split())


def test_the_module_answers_as_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "engine.train", "--alpha", "7"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
