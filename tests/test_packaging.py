"""The package under every way to have it: from the checkout, installed, and beside Hugging Face's package `kernels`."""

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import setuptools
from transformers.utils.import_utils import KERNELS_MIN_VERSION

ROOT = Path(__file__).parents[1]


def python(*arguments: object, cwd: Path = ROOT, path: Path | None = None) -> str:
    """What a new interpreter prints; `path` is all that PYTHONPATH holds."""
    environment = {**os.environ, "PYTHONPATH": str(path or "")}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def arguments_of_setup(monkeypatch):
    given = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    return given


# Hugging Face's package `kernels`

STUB = '''
"""Every name that transformers imports from the real package, as something harmless."""
def _decorator(*arguments, **settings):
    return lambda decorated: decorated
use_kernel_forward_from_hub = use_kernelized_func = _decorator
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})
'''

BESIDE_THE_STUB = """
import kernels, transformers
from transformers import AutoModelForSequenceClassification
from transformers.models.bert.modeling_bert import BertForSequenceClassification
from transformers.integrations import hub_kernels
from transformers.utils import is_kernels_available
import torch, engine.kernels
assert is_kernels_available()
assert hub_kernels.LayerRepository.__name__ == "LayerRepository"
loss = engine.kernels.kd_loss(torch.zeros(2, 3), [torch.zeros(2, 3)], temperature=2.0, alpha=0.5)
assert loss.shape == () and loss == 0
print(kernels.__file__, engine.kernels.ops.kd_loss.naive.__file__, sep="\\n")
"""


def test_transformers_finds_the_other_package_of_the_name_kernels(tmp_path):
    version = KERNELS_MIN_VERSION  # 0.18.2 to below 0.19 for transformers 5.23; another release takes others
    package, metadata = tmp_path / "kernels" / "__init__.py", tmp_path / f"kernels-{version}.dist-info" / "METADATA"
    for file, content in {
        package: STUB,
        metadata: f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n",
    }.items():
        file.parent.mkdir()
        file.write_text(content)
    theirs, ours = map(Path, python("-c", BESIDE_THE_STUB, path=tmp_path).split())
    assert theirs == package
    assert ours.resolve() == ROOT / "kernels" / "kd_loss" / "naive.py"


@pytest.mark.parametrize(("folder", "place", "target"), [
    ("kernels", "engine/kernels/ops", "../../kernels"), ("csrc", "engine/csrc", "../csrc"),
])  # fmt: skip
def test_folder_is_plain_and_linked(folder, place, target):
    assert not (ROOT / folder / "__init__.py").exists()
    assert os.readlink(ROOT / place) == target  # relative, so that it holds in every clone
    assert (ROOT / place).resolve() == ROOT / folder


# What is installed


def test_setup_names_every_package(arguments_of_setup):
    folders = {file.parent for top in ("engine", "kernels") for file in (ROOT / top).rglob("*.py")}
    folders |= {file.parent for file in (ROOT / "csrc").rglob("*") if file.is_file()}
    paths = {folder.relative_to(ROOT).as_posix() for folder in folders}
    mapped, listed = arguments_of_setup["package_dir"], arguments_of_setup["packages"]
    assert {mapped.get(package, package.replace(".", "/")) for package in listed} == paths
    assert len(listed) == len(set(listed))


def test_dependencies_are_what_is_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [re.split(r"[<>=!~\[; ]", line)[0] for line in project["dependencies"]]
    imported = set()
    for file in [*(ROOT / "engine").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported |= {"tensorboard" if "tensorboard" in name else name.split(".")[0] for name in modules}
    as_distribution = {"yaml": "PyYAML", "pynvml": "nvidia-ml-py", "jinja2": "Jinja2"}
    imported = {as_distribution.get(name, name) for name in imported - set(sys.stdlib_module_names) - {"engine"}}
    assert imported == {*names, "triton"}  # which torch's CUDA builds bring along, and others do without


def test_constraints_pin_the_direct_dependencies():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    direct = [*project["dependencies"], *extras["test"], *extras["bench"]]
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w-]+==[\w.]+", pin) for pin in pins)
    assert [pin.split("==")[0] for pin in pins] == [re.split(r"[<>=!~\[; ]", line)[0] for line in direct]


@pytest.mark.slow
def test_wheel(tmp_path):
    """Built from a copy of the project's files, so that no `build/` of an earlier day has a part in it."""
    source, wheels, target = tmp_path / "source", tmp_path / "wheels", tmp_path / "target"
    listing = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listing, check=True, capture_output=True, text=True).stdout.split("\0"):
        if name and (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    python("-m", "pip", "wheel", source, "--no-deps", "--no-build-isolation", "--wheel-dir", wheels)
    (wheel,) = wheels.iterdir()
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0].split("-")[0] for name in names} == {"engine", "metadistil_engine"}
    ops = {f"engine/kernels/ops/{file.relative_to(ROOT / 'kernels')}" for file in (ROOT / "kernels").rglob("*.py")}
    modules = {file.relative_to(ROOT).as_posix() for file in (ROOT / "engine").rglob("*.py")}
    assert "engine/kernels/ops/kd_loss/naive.py" in ops
    templates = {file.relative_to(ROOT).as_posix() for file in (ROOT / "engine" / "report" / "templates").iterdir()}
    assert {name for name in names if "/templates/" in name} == templates and templates
    assert {name for name in names if name.endswith(".py")} == {n for n in modules if "/ops/" not in n} | ops

    python("-m", "pip", "install", "--target", target, "--no-deps", "--no-index", wheel)
    shown = python("-c", "import engine.kernels.ops.kd_loss.naive as r; print(r.__file__)", cwd=tmp_path, path=target)
    assert Path(shown.strip()) == target / "engine" / "kernels" / "ops" / "kd_loss" / "naive.py"
    assert "usage: python -m engine.train" in python("-m", "engine.train", "--help", cwd=tmp_path, path=target)
    assert (target / "bin" / "metadistil-train").exists()
