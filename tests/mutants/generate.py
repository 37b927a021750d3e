"""Draws mutants on the syntax tree, the same ones for the same seed and code:

    python tests/mutants/generate.py --count 50 --seed 15 > tests/mutants/random.json

One of each function at the most, in turn from each room: a comparison, a constant or a sign is another one, or a statement
is left out. What nobody could notice is not drawn: messages, annotations, defaults, what only a GPU runs. One that changes
nothing after all gets `"equivalent": "why"` in the file by hand, and the next one of a greater count stands in for it.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import re
import sys
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from places import Source, code, sources

ROOMS = ("meta", "models", "params", "kernels", "losses", "data", "run")
OTHER = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "+": "-", "-": "+", "*": "/",
         "is": "is not", "is not": "is", "in": "not in", "not in": "in", "and": "or", "or": "and"}  # fmt: skip
# Lines and functions that say something or that a CPU does not come to
UNSEEN = re.compile(
    r"cuda|stream|pin|device|nvcc|raise |assert |say|warn|print|note|message|fsync|section\(|describe|shown", re.I
)
FILES = re.compile(r"native_build|tuning|cuda_graph|compiling|precision|__init__|choices|bad_input")
NOTHING = {"super().__init__()", "strict=True", "strict=False"}  # no fault, or one that no test could overlook
SILENT = (ast.Raise, ast.Assert, ast.JoinedStr, ast.arguments, ast.AnnAssign, ast.Import, ast.ImportFrom)


def visible(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function's body; not those of functions in it, of messages, annotations and decorators."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (*SILENT, ast.FunctionDef, ast.ClassDef)) or child is getattr(node, "returns", None):
            continue
        if child in getattr(node, "decorator_list", ()) or (
            isinstance(child, ast.If) and UNSEEN.search(ast.unparse(child.test))
        ):
            continue  # fmt: skip
        if isinstance(child, ast.Expr | ast.keyword) and ast.unparse(child) in NOTHING:
            continue
        yield child
        yield from visible(child)


def changes(node: ast.AST, line: str) -> Iterator[tuple[str, str]]:
    """What kind of fault a node can have, and the line with it."""

    def between(left: ast.AST, right: ast.AST) -> tuple[str, str]:
        start, end = left.end_col_offset, right.col_offset
        sign = line[start:end].strip(" ()")
        return sign, line[:start] + line[start:end].replace(sign, OTHER.get(sign, sign), 1) + line[end:]

    def without(at: int, length: int, put: str = "") -> str:
        return line[:at] + put + line[at + length :]

    match node:
        case ast.Compare(left=left, comparators=[right]) | ast.BinOp(left=left, right=right):
            sign, text = between(left, right)
            yield f"{sign} is {OTHER.get(sign)}", text
        case ast.BoolOp(values=[left, right]):
            sign, text = between(left, right)
            yield f"{sign} is {OTHER[sign]}", text
        case ast.UnaryOp(op=ast.USub() | ast.Not(), operand=operand):
            yield "no sign", without(node.col_offset, operand.col_offset - node.col_offset)
        case ast.Constant(value=bool(value)):
            yield f"{value} is {not value}", without(node.col_offset, len(str(value)), str(not value))
        case ast.Constant(value=int(value) | float(value)):
            other = value + 1 if isinstance(value, int) else 2 * value
            yield f"{value} is {other}", without(node.col_offset, node.end_col_offset - node.col_offset, repr(other))
        case ast.Expr(value=ast.Call()) | ast.AugAssign():
            yield "left out", without(node.col_offset, node.end_col_offset - node.col_offset, "pass")
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield "left out", without(node.col_offset, node.end_col_offset - node.col_offset, "pass")


def candidates(source: Source) -> Iterator[list[dict]]:
    """Of every function of a file its mutants, each on a line that the function has once."""
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.FunctionDef) or UNSEEN.search(node.name):
            continue
        function, found = source.function(node.body[0].lineno - 1), []
        own = [code(line) for line in source.lines[node.lineno - 1 : node.end_lineno]]
        for inner in visible(node):
            if not hasattr(inner, "lineno") or inner.lineno != inner.end_lineno:
                continue
            line = source.lines[inner.lineno - 1]
            if UNSEEN.search(line) or own.count(code(line)) > 1 or not line.isascii():
                continue
            for kind, text in changes(inner, line):
                if text != line:
                    found.append(
                        {"name": f"{function}: {kind}", "function": function, "old": code(line), "new": code(text)}
                    )
        if found:
            yield found


def draw(tree: Path, count: int, seed: int) -> list[dict]:
    """`count` mutants; a greater count begins with those of a smaller one."""
    chance, rooms = random.Random(seed), []
    for room in ROOMS:
        folder = "kernels" if room == "kernels" else f"engine/{room}"
        here = [
            s
            for s in sources(tree)
            if s.tree and str(s.path).startswith(folder + "/") and not FILES.search(str(s.path))
        ]
        functions = [each for source in here for each in candidates(source)]
        chance.shuffle(functions)
        rooms.append([{"room": room} | chance.choice(each) for each in functions])
    turns = [mutant for turn in zip_longest(*rooms) for mutant in turn if mutant is not None]
    names = [mutant["name"] for mutant in turns]
    return [m for i, m in enumerate(turns) if m["name"] not in names[:i]][:count]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--seed", type=int, default=15)
    parser.add_argument("--tree", type=Path, default=Path(__file__).parents[2])
    given = parser.parse_args()
    json.dump(draw(given.tree.resolve(), given.count, given.seed), sys.stdout, indent=1)
    print()
