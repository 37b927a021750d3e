"""A pytest plugin of run.py, imported where the tests run: which test enters which function, and how long each test takes.

Every function of the code is compiled with a call in front of its body. That costs next to nothing, where tracing lines makes
tests three times as long. What is entered while fixtures are made or taken down counts for all tests of the file.
"""

import ast
import builtins
import json
import os
from collections import Counter, defaultdict
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest
from places import FOLDERS, key

TREE, FILE = Path.cwd(), Path(os.environ["MUTANTS_MAP"])
seconds, failed, entered, found = Counter(), set(), set(), defaultdict(set)
builtins.entered_by_a_test = entered.add
compiled = SourceFileLoader.source_to_code


class Entries(ast.NodeTransformer):
    def __init__(self, path: Path):
        self.path, self.names = path, []

    def visit_ClassDef(self, node):
        self.names.append(node.name)
        self.generic_visit(node)
        self.names.pop()
        return node

    def visit_FunctionDef(self, node):
        self.visit_ClassDef(node)
        name = key(self.path, ".".join([*self.names, node.name]))
        call = ast.parse(f"entered_by_a_test({name!r})").body[0]
        at = 0 if ast.get_docstring(node) is None else 1
        node.body.insert(at, ast.copy_location(call, node.body[0]))
        return ast.fix_missing_locations(node)


def source_to_code(self, data, path, **options):
    file = Path(path).resolve()
    if file.is_relative_to(TREE) and file.relative_to(TREE).parts[0] in FOLDERS:
        data = Entries(file.relative_to(TREE)).visit(ast.parse(data))
    return compiled(self, data, path, **options)


SourceFileLoader.source_to_code = source_to_code


def recorded(by: str):
    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def hook(item):
        entered.clear()
        try:
            return (yield)
        finally:
            for function in list(entered):
                found[function].add(item.nodeid if by == "test" else item.nodeid.partition("::")[0])

    return hook


pytest_runtest_setup, pytest_runtest_call, pytest_runtest_teardown = (
    recorded("file"),
    recorded("test"),
    recorded("file"),
)


def pytest_runtest_logreport(report):
    seconds[report.nodeid] += report.duration
    if report.outcome != "passed":
        failed.add(report.nodeid)


def pytest_unconfigure():
    passed = {test: round(s, 3) for test, s in seconds.items() if test not in failed}
    FILE.write_text(json.dumps({"seconds": passed, "entered": {f: sorted(by) for f, by in sorted(found.items())}}))
