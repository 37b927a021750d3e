"""The direction of imports: low layers know nothing of high ones, leaves nothing of each other, and nothing goes round."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Low to high; a folder imports only from its own floor's files and from lower floors. "files" are those directly in engine/
# that are no command; "engine" is the package itself, which names the public classes.
FLOORS = [
    {"files"},
    {"screen", "embedded"},
    {"data", "telemetry"},
    {"params"},
    {"models"},
    {"kernels"},
    {"losses"},
    {"meta"},
    {"engine"},
    {"methods"},
    {"report"},
    {"run"},
    {"train", "compare", "profiling"},
]
COMMANDS = {"train"}  # the one that is a file


def source_files() -> dict[str, Path]:
    """Dotted name of every module to its file; `kernels/` counts under the name that it is imported by."""
    files = {}
    for folder, name in {"engine": "engine", "kernels": "engine.kernels.ops"}.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if parts[:2] != ("kernels", "ops"):  # the link, where it is followed
                files[".".join([name, *parts])] = path
    return files


FILES = source_files()
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}


def imported(name: str, nodes) -> set[str]:
    """The dotted modules that these nodes of module `name` import; relative imports are refused."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import in line {node.lineno}; write engine.<module>."
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & {of(module) for module in FILES}
            found |= submodules or {node.module}
    return found


def of(module: str) -> str:
    return module.removesuffix(".__init__")


def room(module: str) -> str | None:
    """engine.data.read -> data, engine.errors -> files, engine -> engine, torch -> None."""
    top, _, rest = module.partition(".")
    if top != "engine":
        return None
    first = rest.split(".")[0]
    if first in ("", "__init__"):
        return "engine"
    return first if first in COMMANDS or (ROOT / "engine" / first).is_dir() else "files"


EVERYWHERE = {name: imported(name, ast.walk(tree)) for name, tree in TREES.items()}
ROOMS: dict[str, set[str]] = {}
for module, modules in EVERYWHERE.items():
    ROOMS.setdefault(room(module), set()).update({room(m) for m in modules} - {None, room(module)})


def test_every_room_has_a_floor():
    placed = [name for floor in FLOORS for name in floor]
    assert len(placed) == len(set(placed))
    assert set(placed) == set(ROOMS), "a room that came or went: give it, or take it, its floor"


@pytest.mark.parametrize("name", sorted(ROOMS))
def test_direction(name):
    height = {name: i for i, floor in enumerate(FLOORS) for name in floor}
    higher = {other for other in ROOMS[name] if height[other] >= height[name]}
    assert not higher, f"engine/{name} imports {higher}, which do not stand below it"


def test_nothing_goes_round():
    """Not even by imports that wait in functions, nor by those for type checkers."""
    modules = {of(name): {of(m) for m in found} - {of(name), "engine"} for name, found in EVERYWHERE.items()}
    TopologicalSorter(modules).prepare()  # raises CycleError with the cycle


def test_few_files_at_the_door():
    assert len(list((ROOT / "engine").glob("*.py"))) <= 9


@pytest.mark.parametrize("name", sorted(set(ROOMS) - {"files", "engine", *COMMANDS}))
def test_each_room_says_what_it_is(name):
    """What lives there, what it may import, what adding one more takes."""
    said = ast.get_docstring(TREES[f"engine.{name}.__init__"])
    assert said and "Imports" in said and "nother" in said, name


def test_no_file_is_long():
    long = {name: n for name, path in FILES.items() if (n := len(path.read_text().splitlines())) > 400}
    assert not long


def test_kernels_stand_alone():
    ops = {name: modules for name, modules in EVERYWHERE.items() if name.startswith("engine.kernels.ops.")}
    assert ops
    for name, modules in ops.items():
        outside = {m for m in modules if m.split(".")[0] == "engine" and not m.startswith("engine.kernels.ops")}
        assert not outside, f"{name} imports {outside}"


def test_nothing_imports_bench_tests_or_the_plain_folder():
    for name, modules in EVERYWHERE.items():
        assert not {m.split(".")[0] for m in modules} & {"bench", "tests", "conftest", "kernels"}, name


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), (["--alpha", "7"], 2)])
def test_help_and_bad_input_import_nothing_heavy(arguments, status):
    """They answer at once: torch and transformers wait until the settings are known to be good."""
    script = f"""
import sys
from engine import train
try:
    status = train.main({arguments})
except SystemExit as end:
    status = end.code or 0
print(status, *sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True)
    answered, *modules = done.stdout.splitlines()[-1].split()
    assert int(answered) == status
    assert "engine.cli" in modules
    heavy = {"torch", "transformers", "datasets", "huggingface_hub", "numpy"} & set(modules)
    assert not heavy


def test_no_address_of_one_machine_or_registry():
    """No file holds a path of the machine that it was written on, or the host of a package registry."""
    hosts = [f"{name}[.](?:{ends})" for name, ends in (
        ("pypi", "org|python"), ("pythonhosted", "org"), ("download[.]pytorch", "org"), ("npmjs", "org|com"),
        ("deb[.]debian", "org"))]  # fmt: skip
    paths = [rf"(?<![\w./-])/{folder}/" for folder in ("work", "root", "opt/pypi", "opt/wheels")]
    pattern = re.compile("|".join(hosts + paths))
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    files = [ROOT / name for name in names if name and (ROOT / name).is_file()]
    assert files
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in files
        for number, line in enumerate(file.read_text(errors="ignore").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, found
