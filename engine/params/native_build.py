"""Compiles `csrc/` into one shared library that registers the operations, for setup.py and for `engine.params.native`.

One recipe for both, with the compiler alone: `torch.utils.cpp_extension.load` wants ninja and setuptools at run time,
and the lock file of a process that was killed in it stops every later one.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

CSRC = Path(__file__).parents[1] / "csrc"  # in a checkout a link to the folder at the top
FLAGS = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas"]
# Products are rounded before they are added, so that the bits are those of every other machine. Flags of errno and
# exceptions, which nobody reads, keep a compiler from vectorising square roots and choices.
LOOPS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
BINDINGS = ["-O1"]  # they are two thirds torch's headers: -O3 costs seconds and gains nothing
CUDA_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler", "-fPIC"]


class BuildError(Exception):
    """Why there is no library, in one line."""


def key(*more: str) -> str:
    """Names a library by all that it has to fit: torch's version, the processor, the sources, this recipe, `more`."""
    digest = hashlib.sha256("\0".join([torch.__version__, platform.machine(), *more]).encode())
    for file in [*sorted(p for p in CSRC.rglob("*") if p.is_file()), Path(__file__)]:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def library_name() -> str:
    """Of the library that setup.py builds; it does not load where torch or the sources are others."""
    return f"_native-{key()}.so"


class Toolchain:
    """The compilers of this machine. Raises BuildError where there is no C++ compiler, or no sources."""

    def __init__(self):
        names = [os.environ.get("CXX", ""), "g++", "c++", "clang++"]  # g++ first: torch's OpenMP is GNU's
        self.cxx = next((words for n in names if (words := shlex.split(n)) and shutil.which(words[0])), None)
        if self.cxx is None:
            raise BuildError("no C++ compiler was found (CXX, g++, c++, clang++)")
        if not (CSRC / "ops.cpp").exists():
            raise BuildError(f"there are no sources in {CSRC}")
        self.version = _run([*self.cxx, "--version"])
        self.nvcc, self.without_cuda = find_nvcc()
        self.architectures = cuda_architectures() if self.nvcc else []

    def key(self) -> str:
        return key(self.version, str(self.nvcc), *self.architectures)

    def build(self, library: Path) -> None:
        """Compile and link; `library` appears all at once, so that processes which build the same do no harm."""
        root = Path(torch.__path__[0])
        flags = [*FLAGS, f"-I{root / 'include'}"]
        if torch.backends.openmp.is_available() and "clang" not in self.version:
            flags += ["-fopenmp"]  # for at::parallel_for; the library links to no OpenMP, so torch's own serves it
        link = [f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu"]
        cxx = [*self.cxx, *flags]
        commands = {
            CSRC / "ops.cpp": [*cxx, *BINDINGS],
            CSRC / "checks.cpp": [*cxx, *BINDINGS],
            CSRC / "spans.cpp": [*cxx, *LOOPS],
            CSRC / "kd.cpp": [*cxx, *BINDINGS],
            CSRC / "kd_rows.cpp": [*cxx, *LOOPS],
            CSRC / "kd_few.cpp": [*cxx, *LOOPS],
        }
        if self.nvcc:
            home = self.nvcc.parents[1]
            link += ["-lc10_cuda", "-ltorch_cuda", f"-L{home / 'lib64'}", "-lcudart"]
            commands[CSRC / "cuda" / "bind.cpp"] = [*cxx, *BINDINGS, f"-I{home / 'include'}"]
            for source in sorted((CSRC / "cuda").glob("*.cu")):
                commands[source] = [str(self.nvcc), *CUDA_FLAGS, *self.architectures]
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent, prefix=".build-") as folder:
            objects = [Path(folder, f"{source.parent.name}-{source.stem}.o") for source in commands]
            steps = [
                [*command, "-c", str(source), "-o", str(target)]
                for (source, command), target in zip(commands.items(), objects, strict=True)
            ]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(partial(_run), steps))
            linked = Path(folder, library.name)
            _run([*self.cxx, "-shared", *map(str, objects), *link, "-o", str(linked)])
            os.replace(linked, library)


def cuda_home() -> Path | None:
    """Where a CUDA toolkit is whole: the compiler and the headers. What PATH names may be a script elsewhere."""
    on_path = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), on_path and Path(on_path).resolve().parents[1]]
    parts = ("bin/nvcc", "include/cuda_runtime_api.h")
    for home in map(Path, filter(None, [*homes, "/usr/local/cuda"])):
        if all((home / part).exists() for part in parts):
            return home
    return None


def find_nvcc() -> tuple[Path | None, str]:
    """The CUDA compiler that fits this torch, or None and why."""
    if torch.version.cuda is None:
        return None, "torch is a build without CUDA"
    home = cuda_home()
    if home is None:
        return None, "no CUDA toolkit was found (CUDA_HOME, PATH)"
    release = re.search(r"release (\d+)\.", _run([str(home / "bin" / "nvcc"), "--version"]))
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        theirs = release[1] if release else "unknown"
        return None, f"nvcc is of CUDA {theirs} and torch of CUDA {torch.version.cuda}"
    return home / "bin" / "nvcc", ""


def cuda_architectures() -> list[str]:
    """nvcc's flags for $TORCH_CUDA_ARCH_LIST, else the devices that are here, else 8.0 and everything from 9.0 on."""
    names = re.split(r"[;\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    names = [name for name in names if re.fullmatch(r"\d+\.\d+[a-z]?(\+PTX)?", name)]
    if not names and torch.cuda.is_available():
        devices = range(torch.cuda.device_count())
        names = sorted({"{}.{}".format(*torch.cuda.get_device_capability(d)) for d in devices})
    flags = []
    for name in names or ["8.0", "9.0+PTX"]:
        number = name.removesuffix("+PTX").replace(".", "")
        code = f"[sm_{number},compute_{number}]" if name.endswith("+PTX") else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code={code}")
    return flags


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"{command[0]} does not run: {error.strerror}") from error
    if done.returncode != 0:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        first = next((line for line in lines if "error" in line.lower()), (lines or ["no message"])[0])
        raise BuildError(f"{Path(command[0]).name} failed: {first.strip()}")
    return done.stdout
