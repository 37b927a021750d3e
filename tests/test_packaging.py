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
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
import setuptools
from run_helpers import flags
from transformers.utils.import_utils import KERNELS_MIN_VERSION

ROOT = Path(__file__).parents[1]


def python(*arguments: object, cwd: Path = ROOT, path: Path | None = None) -> str:
    """What a new interpreter prints; `path` is all that PYTHONPATH holds."""
    environment = {**os.environ, "PYTHONPATH": str(path or "")}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


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


@pytest.fixture
def stub(tmp_path):
    """A folder for sys.path with that package, in a version that transformers takes."""
    version = KERNELS_MIN_VERSION  # 0.18.2 to below 0.19 for transformers 5.23; another release takes others
    metadata = f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n"
    files = {"kernels/__init__.py": STUB, f"kernels-{version}.dist-info/METADATA": metadata}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(content)
    return tmp_path


def test_python_finds_the_other_package_of_the_name_kernels(stub):
    found = PathFinder.find_spec("kernels", [str(ROOT), str(stub)])  # the checkout comes first, as for `python -m`
    assert Path(found.origin) == stub / "kernels" / "__init__.py"


@pytest.mark.slow
def test_transformers_finds_it_too(stub):
    theirs, ours = map(Path, python("-c", BESIDE_THE_STUB, path=stub).split())
    assert theirs == stub / "kernels" / "__init__.py"
    assert ours.resolve() == ROOT / "kernels" / "kd_loss" / "naive.py"


@pytest.mark.parametrize(("folder", "place", "target"), [
    ("kernels", "engine/kernels/ops", "../../kernels"), ("csrc", "engine/csrc", "../csrc"),
])  # fmt: skip
def test_folder_is_plain_and_linked(folder, place, target):
    assert not (ROOT / folder / "__init__.py").exists()
    assert os.readlink(ROOT / place) == target  # relative, so that it holds in every clone
    assert (ROOT / place).resolve() == ROOT / folder


# What is installed


def test_setup_names_every_package(monkeypatch):
    given = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    folders = {file.parent for top in ("engine", "kernels") for file in (ROOT / top).rglob("*.py")}
    folders |= {file.parent for file in (ROOT / "csrc").rglob("*") if file.is_file()}
    paths = {folder.relative_to(ROOT).as_posix() for folder in folders}
    mapped, listed = given["package_dir"], given["packages"]
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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """By way of an sdist, from a copy of the project's files: no `build/` of an earlier day has a part in it."""
    source, wheels = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheels")
    for name in project_files():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    build = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    python("-c", build, cwd=source)
    (sdist,) = (source / "dist").iterdir()
    python("-m", "pip", "wheel", sdist, "--no-deps", "--no-build-isolation", "--wheel-dir", wheels)
    (built,) = wheels.iterdir()
    return built


def project_files() -> list[str]:
    listing = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, check=True, capture_output=True, text=True).stdout.split("\0")
    return [name for name in names if name and (ROOT / name).exists()]


@pytest.mark.slow
def test_wheel_holds_every_file_of_the_package(wheel):
    """Modules, templates, kernels and the sources of the native operations, each under its installed name."""
    homes = {"engine/": "engine/", "kernels/": "engine/kernels/ops/", "csrc/": "engine/csrc/"}
    links = {"engine/kernels/ops", "engine/csrc"}
    expected = {home + name.removeprefix(top) for name in project_files() for top, home in homes.items()
                if name.startswith(top) and name not in links}  # fmt: skip
    names = zipfile.ZipFile(wheel).namelist()
    held = {name for name in names if not re.match(r"engine/_native-[^/]*\.so$|[^/]*\.dist-info/", name)}
    assert held == expected and len(names) == len(set(names))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A new environment with nothing in it but the wheel; its dependencies are those that the tests run with."""
    folder = tmp_path_factory.mktemp("environment")
    python("-m", "venv", "--without-pip", folder)
    (site,) = folder.glob("lib/python*/site-packages")
    ours = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "dependencies.pth").write_text("\n".join(ours) + "\n")  # behind the environment's own packages
    quietly = ["install", "--no-deps", "--no-index", "--ignore-installed"]
    python("-m", "pip", "--python", folder / "bin" / "python", *quietly, wheel)
    return folder / "bin"


@pytest.mark.slow
def test_wheel_is_tried_in_an_empty_environment(installed, tmp_path):
    """Far from the checkout: help, the kernels, and a run of the demonstration."""

    def call(*command: object) -> str:
        variables = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "TRITON_INTERPRET")}
        variables |= {"METADISTIL_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
        words = [str(installed / command[0]), *map(str, command[1:])]
        settings = {"cwd": tmp_path, "env": variables, "stdin": subprocess.DEVNULL}
        done = subprocess.run(words, **settings, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "usage: python -m engine.train" in call("python", "-m", "engine.train", "--help")
    assert "usage: python -m engine.train" in call("metadistil-train", "--help")
    place = call("python", "-c", "import engine.kernels as k; print(k.__file__, k.backend('cpu').name)").split()
    assert Path(place[0]).is_relative_to(installed.parent) and place[1] in ("cpp", "reference")
    call("python", "-m", "engine.train", *flags(None, "run", student="tinybert"))
    left = {file.name for file in (tmp_path / "run").iterdir()}
    assert {"student", "teachers", "report.html", "summary.json"} <= left
