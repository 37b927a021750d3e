"""The direction of imports: low layers know nothing of high ones, leaves nothing of each other, and nothing goes round."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from itertools import permutations
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Low to high. A unit is a module of engine/ or a whole package in it; it imports only from its own layer and lower ones.
LAYERS = [
    {"errors", "random_state", "sections"},
    {
        "allocator",
        "batch",
        "config",
        "console",
        "hub",
        "interrupts",
        "live",
        "output",
        "checkpoint",
        "telemetry",
        "embedded",
    },
    {"native", "native_build", "native_reference", "flat", "encoder_layers", "precision", "compiling"}
    | {"tape", "checkpointing", "weights", "features", "domain_head"},
    {"kernels"},
    {"data"},
    {"network", "time_machine", "optim", "models", "teacher_params"},
    {"objectives", "pilot", "learner", "evaluation"},
    {"metagrad", "micro_batches", "layer_map"},
    {"reptile"},
    {"meta_step"},
    {"methods", "__init__"},  # the package itself names the public classes
    {"cuda_graph"},
    {"trainer"},
    {"prototypes", "domains", "matching"},
    {"teachers", "report", "answers"},
    {"choices"},
    {"setup"},
    {"stages"},
    {"job"},
    {"cli"},
    {"train"},
    {"compare"},
    {"profiling"},
]
LEAVES = {"models", "checkpoint", "telemetry", "console", "time_machine", "hub"}
LEAVES |= {"tape", "checkpointing", "encoder_layers", "weights", "features", "compiling"}
BETWEEN_LEAVES = {("models", "hub")}  # where named models come from is decided in one place


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


def at_import(tree: ast.Module):
    """The nodes that run when a module is imported: not those in functions, nor what is there for type checkers."""
    waiting = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        waiting.extend(ast.iter_child_nodes(node))


def unit(module: str) -> str | None:
    """engine.data.read -> data, engine -> __init__, torch -> None."""
    top, _, rest = module.partition(".")
    return (rest.split(".")[0] or "__init__") if top == "engine" else None


EVERYWHERE = {name: imported(name, ast.walk(tree)) for name, tree in TREES.items()}
UNITS: dict[str, set[str]] = {}
for module, modules in EVERYWHERE.items():
    UNITS.setdefault(unit(module), set()).update({unit(m) for m in modules} - {None, unit(module)})


def test_every_unit_has_a_layer():
    placed = [name for layer in LAYERS for name in layer]
    assert len(placed) == len(set(placed))
    assert set(placed) == set(UNITS), "a module that came or went: give it, or take it, its place in LAYERS"


@pytest.mark.parametrize("name", sorted(UNITS))
def test_direction(name):
    height = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    higher = {other for other in UNITS[name] if height[other] > height[name]}
    assert not higher, f"engine.{name} imports {higher}, which stand above it"


def test_no_cycles():
    TopologicalSorter(UNITS).prepare()  # raises CycleError with the cycle
    modules = {of(name): {of(m) for m in imported(name, at_import(tree))} for name, tree in TREES.items()}
    TopologicalSorter(modules).prepare()


def test_leaves_do_not_know_each_other():
    assert {(a, b) for a, b in permutations(LEAVES, 2) if b in UNITS[a]} == BETWEEN_LEAVES


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
