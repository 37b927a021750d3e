"""The command line: the fields of `engine.config` as flags, a YAML file through `--config`, flags win."""

from __future__ import annotations

import re
import sys
from argparse import ArgumentError
from dataclasses import MISSING, Field, fields
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser

from engine.config import Config
from engine.errors import UserError
from engine.plugins import METHODS

TYPES = {f.name: get_type_hints(section.default_factory)[f.name]
         for section in fields(Config) for f in fields(section.default_factory)}  # fmt: skip
NAMES = {f.name: f.metadata["names"] for section in fields(Config) for f in fields(section.default_factory)
         if f.metadata["names"] is not None}  # fmt: skip
KINDS = {int: "a whole number", float: "a number", bool: "true or false",
         str: "text (in a YAML file, put it in quotes)"}  # fmt: skip

# Settings that may differ between an interrupted run and its continuation: they do not change the result.
FREE_ON_RESUME = {"output", "resume", "cache_dir", "log_steps", "checkpoint_steps"}
FREE_ON_RESUME |= {"report_to", "metrics_port", "metrics_host"}


@cache  # making one takes 85 ms
def parser() -> ArgumentParser:
    """One group of flags a section of `Config`."""
    result = ArgumentParser(
        prog="python -m engine.train",
        description="Distil big classifiers into a small one, with teachers that learn to teach (MetaDistil).",
        usage="%(prog)s [--teachers NAMES] [--student NAME] [--data NAME] [--output DIR] [more flags, all listed below]",
        exit_on_error=False,
        allow_abbrev=False,  # so that a script keeps its meaning when a flag is added
    )
    result.add_argument("--config", action=ActionConfigFile, help="a YAML file of these settings; flags win over it")
    for section in fields(Config):
        cls = section.default_factory
        group = result.add_argument_group(cls.__doc__)
        types = get_type_hints(cls)
        for f in fields(cls):
            flag = "--" + f.name.replace("_", "-")
            assert f.default is not MISSING, f.name
            if types[f.name] is bool:
                group.add_argument(flag, action="store_true", help=help_text(f))
                continue
            names = f.metadata["names"]
            shown = {} if names is None else {"metavar": "{" + ",".join(names) + ",FILE.py}"}
            group.add_argument(flag, type=types[f.name], default=f.default, help=help_text(f), **shown)
    return result


def help_text(field: Field) -> str:
    """The field's text, with what the files of methods and the like add to it."""
    text, names, usual = field.metadata["help"], field.metadata["names"], field.metadata["otherwise"]
    if names is not None:
        text += ": " + "; ".join(f"{name}, {facts['help']}" for name, facts in names.every().items())
    if usual is not None:
        chosen = {name: facts.get("defaults", {}) for name, facts in METHODS.every().items()}
        others = [f"{name} {_shown(values[field.name])}" for name, values in chosen.items() if field.name in values]
        text += f" (default: {'; '.join([_shown(usual), *others])})"
    return text


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def parse(argv: list[str] | None = None, command: str = "engine.train") -> Config:
    """The configuration of a command line; raises UserError with one sentence for anything that does not fit.

    The sentence sends to the help of `command`, which may have flags of its own besides these.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    values = _values(argv, command)
    if values["resume"]:
        saved = _saved_config(values["output"])
        values = _values(["--config", str(saved), *argv], command)
        _refuse_changes(values, yaml.safe_load(saved.read_text()))
    return Config.from_flat(values)


def dump(config: Config) -> str:
    """YAML that `--config` reads; it does not name the output directory, so that it starts a new run."""
    return yaml.safe_dump(config.to_flat() | {"output": None, "resume": False}, sort_keys=False)


def _values(argv: list[str], command: str) -> dict[str, Any]:
    try:
        parsed = parser().parse_args(_files_first(argv)).as_dict()
    except ArgumentError as e:
        parser.cache_clear()  # it would still have to answer a --print_config that stands before the mistake
        raise UserError(_sentence(" ".join(e.message.split()).rstrip("."), argv, command)) from e
    parsed.pop("config", None)
    for name, value in parsed.items():  # a YAML file can hold what jsonargparse lets through
        kind, optional = _kind(name)
        if (value is None and not optional) or (kind is bool and not isinstance(value, bool)):
            raise UserError(_wrong_type(name, "null" if value is None else repr(value), argv))
    given = {name: names for name, names in NAMES.items() if parsed[name] is not None}
    return parsed | {name: names.settle(parsed[name], _where(name, argv)) for name, names in given.items()}


def _sentence(message: str, argv: list[str], command: str) -> str:
    """jsonargparse's message, which is written for programmers, as one sentence that names the flag or the file."""
    file, see_help = _config_file(argv), f"see python -m {command} --help"
    if match := re.match(r'Parser key "(\w+)":(.*)', message):
        key, rest = match.groups()
        if key not in TYPES:
            return f"--config cannot be read ({rest.strip()}); give an existing YAML file of settings."
        return _wrong_type(key, repr(re.split(r"(?:Got|Given) value:", rest)[-1].strip().strip("'")), argv)
    if message.startswith("Problems parsing config"):
        place = re.findall(r"line (\d+)", message)
        return f"--config {file}{f', line {place[-1]},' if place else ''} is not valid YAML; each line must be like 'epochs: 3'."
    if message.startswith("Unexpected config"):
        return f"--config {file!r} holds no settings; each line must be like 'epochs: 3'."
    if match := re.match(r"Option '(.+)' is not accepted", message):
        return f"--config {file} has {match[1]!r}, which is not a setting; {_alike(match[1], '')}{see_help}."
    if match := re.match(r"unrecognized arguments: (\S+)", message):
        given = match[1].split("=")[0]
        if given.startswith("-"):
            return f"{given} is not a flag; {_alike(given.lstrip('-'), '--')}{see_help}."
        return f"{given!r} belongs to no flag; put a value that has spaces in quotes, or {see_help}."
    if match := re.match(r"argument (--[\w-]+): expected one argument", message):
        return f"{match[1]} needs a value; {see_help}."
    if match := re.match(r"argument (--[\w-]+): ignored explicit argument (.*)", message):
        return f"{match[1]} takes no value; leave {match[2]} out."
    return f"{message}; {see_help}."


def _wrong_type(name: str, given: str, argv: list[str]) -> str:
    kind, _ = _kind(name)
    allowed = KINDS[kind] if kind in KINDS else "one of " + ", ".join(get_args(kind))
    return f"{_where(name, argv)} is {given}; it must be {allowed}."


def _where(name: str, argv: list[str]) -> str:
    """The flag, or the setting in the file that has it."""
    flag, file = "--" + name.replace("_", "-"), _config_file(argv)
    typed = any(word.split("=")[0] == flag for word in argv)
    return flag if typed or file is None else f"{name} in {file}"


def _kind(name: str) -> tuple[Any, bool]:
    """The type of a field without `| None`, and whether it had that."""
    members = get_args(TYPES[name])
    optional = NoneType in members
    return (next(m for m in members if m is not NoneType) if optional else TYPES[name]), optional


def _files_first(argv: list[str]) -> list[str]:
    """--config before everything else: jsonargparse lets the later of file and flag win, we let the flag win."""
    files, rest, words = [], [], iter(argv)
    for word in words:
        (files if word.split("=")[0] == "--config" else rest).append(word)
        if word == "--config":
            files += [value for value in [next(words, None)] if value is not None]
    return files + rest


def _config_file(argv: list[str]) -> str | None:
    """The last --config on the command line."""
    found = [word.split("=", 1)[1] if "=" in word else "".join(argv[i + 1 : i + 2])
             for i, word in enumerate(argv) if word.split("=")[0] == "--config"]  # fmt: skip
    return found[-1] if found else None


def _alike(given: str, prefix: str) -> str:
    near = get_close_matches(given.replace("-", "_"), TYPES, 1)
    if not near:
        return ""
    return f"did you mean {prefix}{near[0].replace('_', '-') if prefix else near[0]}, or "


def _saved_config(output: str | None) -> Path:
    if output is None:
        raise UserError("--resume needs --output with the directory of the interrupted run.")
    saved = Path(output).expanduser() / "config.yaml"
    if not saved.exists():
        raise UserError(f"--resume finds no run in {output}: there is no config.yaml; leave --resume out to start one.")
    return saved


def _refuse_changes(values: dict[str, Any], saved: dict[str, Any]) -> None:
    changed = [k for k, v in values.items() if k not in FREE_ON_RESUME and k in saved and saved[k] != v]
    if changed:
        listing = ", ".join(f"--{k.replace('_', '-')} {values[k]} (was {saved[k]})" for k in changed)
        raise UserError(f"--resume continues a run as it was started; start a new one to change {listing}.")
