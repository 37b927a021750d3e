"""The command line: the fields of `engine.config` as flags, a YAML file through `--config`, flags win."""

from __future__ import annotations

import sys
from argparse import ArgumentError
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser

from engine.config import Config
from engine.errors import UserError

# Settings that may differ between an interrupted run and its continuation: they do not change the result.
FREE_ON_RESUME = {"output", "resume", "cache_dir", "log_steps", "checkpoint_steps"}


def parser() -> ArgumentParser:
    """One group of flags a section of `Config`."""
    result = ArgumentParser(
        prog="python -m engine.train",
        description="Distil big classifiers into a small one, with teachers that learn to teach (MetaDistil).",
        exit_on_error=False,
    )
    result.add_argument("--config", action=ActionConfigFile, help="a YAML file of these settings; flags win over it")
    for section in fields(Config):
        cls = section.default_factory
        group = result.add_argument_group(cls.__doc__)
        types = get_type_hints(cls)
        for f in fields(cls):
            flag, help, default = "--" + f.name.replace("_", "-"), f.metadata["help"], f.default
            assert default is not MISSING, f.name
            if types[f.name] is bool:
                group.add_argument(flag, action="store_true", help=help)
            else:
                group.add_argument(flag, type=types[f.name], default=default, help=help)
    return result


def parse(argv: list[str] | None = None) -> Config:
    """The configuration of a command line; raises UserError with one sentence for anything that does not fit."""
    argv = list(sys.argv[1:] if argv is None else argv)
    values = _values(argv)
    if values["resume"]:
        saved = _saved_config(values["output"])
        values = _values(["--config", str(saved), *argv])
        _refuse_changes(values, yaml.safe_load(saved.read_text()))
    return Config.from_flat(values)


def dump(config: Config) -> str:
    """YAML that `--config` reads; it does not name the output directory, so that it starts a new run."""
    return yaml.safe_dump(config.to_flat() | {"output": None, "resume": False}, sort_keys=False)


def _values(argv: list[str]) -> dict[str, Any]:
    try:
        parsed = parser().parse_args(argv).as_dict()
    except ArgumentError as e:
        raise UserError(_sentence(e)) from e
    parsed.pop("config", None)
    return parsed


def _sentence(error: ArgumentError) -> str:
    """jsonargparse's message, which runs over several lines, as one sentence that names the flag."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines).rstrip(".")
    if text.startswith("Parser key "):
        key, _, rest = text.removeprefix("Parser key ").partition(":")
        given = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("Given value:")), None)
        if given is None and "Got value:" in rest:
            given = rest.split("Got value:")[1].split()[0]
        expected = [line.split("Expected a", 1)[1].strip(" n") for line in lines if "Expected a" in line]
        kinds = " or ".join(
            dict.fromkeys(k.split(". Got")[0].replace("typing.Literal", "one of ").replace("<class '", "").replace("'>", "")
                          for k in expected if "NoneType" not in k))  # fmt: skip
        flag = "--" + key.strip('"').replace("_", "-")
        if given is not None and kinds:
            return f"{flag} is {given!r}; it must be {kinds}."
        return f"{flag}: {rest.strip()}."
    return f"{text}; see python -m engine.train --help."


def _saved_config(output: str | None) -> Path:
    if output is None:
        raise UserError("--resume needs --output with the directory of the interrupted run.")
    saved = Path(output) / "config.yaml"
    if not saved.exists():
        raise UserError(f"--resume finds no run in {output}: there is no config.yaml; leave --resume out to start one.")
    return saved


def _refuse_changes(values: dict[str, Any], saved: dict[str, Any]) -> None:
    changed = [k for k, v in values.items() if k not in FREE_ON_RESUME and k in saved and saved[k] != v]
    if changed:
        listing = ", ".join(f"--{k.replace('_', '-')} {values[k]} (was {saved[k]})" for k in changed)
        raise UserError(f"--resume continues a run as it was started; start a new one to change {listing}.")
