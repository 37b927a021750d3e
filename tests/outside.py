"""A small installed distribution that brings a method or a divergence: its package, and the entry point that names it."""

import os
import subprocess
import sys
from pathlib import Path

from run_helpers import ROOT


def install(folder: Path, kind: str, name: str, source: str) -> Path:
    """A folder for sys.path with the package `shelf_NAME` and its dist-info. Python imports a package only once in a process."""
    package, info = folder / f"shelf_{name}", folder / f"shelf_{name}-1.0.dist-info"
    for made in (package, info):
        made.mkdir(parents=True)
    (package / "__init__.py").write_text("import torch  # whoever imports the package, imports torch\n")
    (package / f"{name}.py").write_text(source)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: shelf_{name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[metadistil.{kind}]\n{name} = shelf_{name}.{name}\n")
    return folder


def bring(way: str, folder: Path, kind: str, name: str, source: str, monkeypatch) -> str:
    """How a flag names it: an "entry point" by its name, a file by its "path", relative to a new working directory."""
    if way == "entry point":
        monkeypatch.syspath_prepend(install(folder / "site", kind, name, source))
        return name
    (folder / f"{name}.py").write_text(source)
    monkeypatch.chdir(folder)
    return f"{name}.py"


def help_of(*folders: Path) -> tuple[str, set[str]]:
    """What `python -m engine.train --help` prints with these folders on the path, and the modules that it imported."""
    script = "import sys\nfrom engine.train import main\ntry: main(['--help'])\nexcept SystemExit: print(*sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders)), "COLUMNS": "400"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    )
    *lines, modules = done.stdout.splitlines()
    return " ".join(" ".join(lines).split()), set(modules.split())
