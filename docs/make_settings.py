"""docs/settings.md: every flag of `python -m engine.train`, from the fields of `engine.config`.

python -m docs.make_settings    # write the page
"""

from __future__ import annotations

from dataclasses import Field, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from engine.cli import help_text
from engine.config import Config

PAGE = Path(__file__).with_name("settings.md")
HEAD = """# Settings
Every flag of `python -m engine.train`, written by `python -m docs.make_settings` from `engine/config.py` and the files of
methods and divergences. A YAML file of the same names (`teacher_lr: 1e-5` for `--teacher-lr 1e-5`) is given by `--config`; flags
win over it. `--print_config` prints what a command line comes to, and `config.yaml` of a run records it.

A default of "open" is settled when method, models and data are known; the meaning says to what. Other commands
(`engine.compare`, `engine.profiling`) take these flags too, and list their own with `--help`.
"""


def page() -> str:
    parts = [HEAD]
    for section in fields(Config):
        cls = section.default_factory
        types = get_type_hints(cls)
        title = cls.__doc__.strip()
        parts.append("\n".join([
            f"## {title[0].upper()}{title[1:]}",
            "| flag | values | default | meaning |",
            "|---|---|---|---|",
            *(_row(f, types[f.name]) for f in fields(cls)),
            "",
        ]))  # fmt: skip
    return "\n".join(parts)


def _row(f: Field, kind: Any) -> str:
    cells = [f"`--{f.name.replace('_', '-')}`", _values(f, kind), _default(f.default), help_text(f)]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(value: Any) -> str:
    if value is None:
        return "open"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{value}`"


def _values(f: Field, kind: Any) -> str:
    kinds = [k for k in get_args(kind) or (kind,) if k is not NoneType]
    if all(isinstance(k, str) for k in kinds):
        return ", ".join(f"`{k}`" for k in kinds)
    (kind,) = kinds if len(kinds) == 1 else (None,)
    if kind is None or get_args(kind):  # Literal[...] | None
        return ", ".join(f"`{name}`" for k in kinds or () for name in get_args(k))
    if kind is bool:
        return "a switch"
    if kind is str:
        names = f.metadata["names"]
        return "text" if names is None else ", ".join(f"`{name}`" for name in names) + ", or a `.py` file"
    low, high = f.metadata.get("minimum"), f.metadata.get("maximum")
    noun = {int: "whole number", float: "number"}[kind]
    return noun if low is None else f"{noun} from {low:g}" + (f" to {high:g}" if high is not None else "")


if __name__ == "__main__":
    PAGE.write_text(page())
