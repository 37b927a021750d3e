"""Methods, divergences, strategies and pilots by name, without importing them. Each is a file that assigns one object, as in

    METHOD = Method(step, help="...", teachers="frozen")

A name is that of a file in a folder of the engine; or of an entry point of an installed package, such as `mine =
"package.module"` in the group `metadistil.methods`; or it is the path of a file that ends in .py. The engine's own names come
first. The call's keywords with literal values are read from the file's text, so that the command line and the reports know
them before torch is imported; the file is imported when its object is first asked for.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from engine.errors import UserError


class Plugins(Mapping[str, Any]):
    """Name to object, imported when it is first asked for; iterating gives the names, which imports nothing.

    flag       of the command line, for messages
    folder     below engine/, as in "losses.divergences"; its last part is also that of the entry points' group
    attribute  the name of the object in its file
    required   keywords of the object's call that have to be there as literal values
    """

    def __init__(self, flag: str, folder: str, attribute: str, required: tuple[str, ...]):
        self.flag, self.folder, self.attribute, self.required = flag, folder, attribute, required
        self.group = f"metadistil.{folder.split('.')[-1]}"
        self._home = Path(__file__).parent.joinpath(*folder.split("."))
        self._loaded: dict[str, Any] = {}

    def __iter__(self) -> Iterator[str]:
        own = sorted(file.stem for file in self._home.glob("*.py") if file.stem != "__init__")
        return iter(dict.fromkeys([*own, *sorted(point.name for point in _entry_points(self.group))]))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (
            name in self._loaded or _is_path(name) or self._is_own(name) or self._point(name) is not None
        )

    def __getitem__(self, name: str) -> Any:
        if name not in self._loaded:
            if name not in self:
                raise KeyError(name)
            self._loaded[name] = self._load(name)
        return self._loaded[name]

    def settle(self, given: str, flag: str | None = None) -> str:
        """The name as settings keep it: a path is made absolute, so that a run can be resumed from anywhere.

        Raises UserError for an unknown name, and for a file that lacks what `facts` needs.
        """
        if given not in self:
            raise UserError(
                f"{flag or self.flag} is {given!r}; it must be one of {', '.join(self)}, or the path of a .py file."
            )
        name = str(Path(given).expanduser().absolute()) if _is_path(given) else given
        self.facts(name)
        return name

    def facts(self, name: str) -> dict[str, Any]:
        """The literal keywords of the object's call. Raises UserError where the file cannot be read or lacks one."""
        file, kind = self._file(name), self.attribute.capitalize()
        given = f"{self.flag} {name}" if _is_path(name) else f"{self.flag} {name} ({file})"
        try:
            found = _literals(file, file.stat().st_mtime_ns, self.attribute)
        except OSError as e:
            raise UserError(f"{given} cannot be read ({e.strerror}); give the path of a Python file.") from e
        except (SyntaxError, ValueError) as e:
            raise UserError(f"{given} is not valid Python ({e}); correct it.") from e
        if found is None:
            raise UserError(f"{given} has no line '{self.attribute} = {kind}(...)'; give a file that has it.")
        for wanted in self.required:
            if wanted not in found:
                raise UserError(f"{given}: {kind}(...) has no {wanted}= with a literal value; add it.")
        return found

    def known(self, name: str) -> dict[str, Any]:
        """`facts`, or nothing for a name or a file that is not on this machine: a report may be of another one's run."""
        try:
            return self.facts(name) if name in self else {}
        except UserError:
            return {}

    def every(self) -> dict[str, dict[str, Any]]:
        """`facts` by name; for a file that cannot be read, `help` says why: it must not keep the others from being used."""
        return {name: self._facts_or_why(name) for name in self}

    def _facts_or_why(self, name: str) -> dict[str, Any]:
        try:
            return self.facts(name)
        except UserError as e:
            return {"help": str(e)}

    def _file(self, name: str) -> Path:
        if _is_path(name):
            return Path(name).expanduser()
        return self._home / f"{name}.py" if self._is_own(name) else _source(self._point(name))

    def _is_own(self, name: str) -> bool:
        return name.isidentifier() and name != "__init__" and (self._home / f"{name}.py").exists()

    def _point(self, name: str) -> EntryPoint | None:
        return next((point for point in _entry_points(self.group) if point.name == name), None)

    def _load(self, name: str) -> Any:
        if _is_path(name):
            spec = importlib.util.spec_from_file_location(f"{self.group}.{short_name(name)}", Path(name).expanduser())
            module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look for it there
            spec.loader.exec_module(module)
        elif self._is_own(name):
            module = import_module(f"engine.{self.folder}.{name}")
        else:
            module = import_module(self._point(name).module)
        return getattr(module, self.attribute)


METHODS = Plugins("--method", "methods", "METHOD", ("help", "teachers"))
DIVERGENCES = Plugins("--soft-loss", "losses.divergences", "DIVERGENCE", ("help",))
STRATEGIES = Plugins("--meta-grad", "meta.strategies", "STRATEGY", ("help",))
PILOTS = Plugins("--pilot-optimizer", "meta.pilots", "PILOT", ("help",))


def short_name(name: str) -> str:
    """What a run calls it: for a file, its name without folder and .py."""
    return Path(name).stem if _is_path(name) else name


@cache
def _literals(file: Path, changed: int, attribute: str) -> dict[str, Any] | None:
    """The keywords with literal values of the call that the file assigns to `attribute`; None where it assigns none."""
    for node in reversed(ast.parse(file.read_text()).body):
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Call)
            and ast.unparse(node.targets[0]) == attribute
        ):
            return {word.arg: ast.literal_eval(word.value) for word in node.value.keywords if _is_literal(word.value)}
    return None


def _is_literal(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except ValueError:  # a function, say, which is of no use without an import
        return False
    return True


def _is_path(name: str) -> bool:
    return name.endswith(".py")


def _entry_points(group: str) -> tuple[EntryPoint, ...]:
    return _entry_points_of(group, tuple(sys.path))


@cache
def _entry_points_of(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=group))


def _source(point: EntryPoint) -> Path:
    """The file of an entry point's module. `importlib.util.find_spec` would import the packages that it is in."""
    path, spec, parts = None, None, point.module.split(".")
    for i in range(len(parts)):
        name = ".".join(parts[: i + 1])
        spec = next((s for finder in sys.meta_path if (s := finder.find_spec(name, path)) is not None), None)
        path = None if spec is None else spec.submodule_search_locations
        if spec is None or (path is None and i + 1 < len(parts)):
            break
    if spec is None or spec.name != point.module or spec.origin is None:
        raise UserError(f"the entry point {point.name} of {point.group} names the module {point.module}, which is not there; "
                        f"install its package again.")  # fmt: skip
    return Path(spec.origin)
