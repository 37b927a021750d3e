"""Which files of tests a GPU check can run: those with tests marked gpu whose imports are all there.

A lent machine has torch and little else, and pytest imports a file before it looks at marks.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
MARK = "pytest.mark." + "gpu"  # in two, or this module's own tests would seem to have it


def gpu_tests() -> tuple[list[str], dict[str, set[str]]]:
    """Files to run, and of the others what they lack: file -> packages."""
    lacking = {
        str(f.relative_to(ROOT)): missing(f)
        for f in sorted((ROOT / "tests").rglob("test_*.py"))
        if MARK in f.read_text()
    }
    return [f for f, packages in lacking.items() if not packages], {
        f: packages for f, packages in lacking.items() if packages
    }


def missing(file: Path) -> set[str]:
    """The packages that importing a file, and what it imports of the project, would ask for in vain."""
    seen, waiting, found = set(), [file, ROOT / "tests" / "conftest.py"], set()
    while waiting:
        file = waiting.pop()
        if file in seen:
            continue
        seen.add(file)
        for name in imported(file):
            ours = own(name)
            waiting += ours
            top = name.partition(".")[0]
            if not ours and top not in ("engine", "bench") and not _installed(top):
                found.add(top)
    return found


@cache
def imported(file: Path) -> tuple[str, ...]:
    """The dotted names that run when a file is imported; for `from a import b` both a and a.b."""
    names = []
    for node in at_import(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return tuple(names)


def at_import(tree: ast.Module) -> Iterator[ast.AST]:
    """The nodes that run at import; not what is tried, nor what is there for type checkers."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.Try):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        waiting.extend(ast.iter_child_nodes(node))


def own(name: str) -> list[Path]:
    """The project's files behind a dotted name: a module, packages on the way to it, a helper beside the tests."""
    top, *rest = name.split(".")
    if top in ("engine", "bench"):
        places = [ROOT.joinpath(top, *rest[:n]) for n in range(len(rest) + 1)]
    else:
        places = [ROOT / "tests" / top]
    files = [file for place in places for file in (place.with_suffix(".py"), place / "__init__.py")]
    return [file for file in files if file.exists()]


@cache
def _installed(package: str) -> bool:
    return find_spec(package) is not None
