"""How the native operations are found: compiled ahead of time or just in time, or else plain torch with the reason."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.errors import UserError
from engine.params import native, native_build, native_reference

ROOT = Path(__file__).parents[2]


@pytest.fixture
def compiler():
    """Somewhere on this machine; the tests that need it say so."""
    try:
        return native_build.Toolchain()
    except native_build.BuildError as error:
        pytest.skip(str(error))


# What is chosen


@pytest.fixture
def undecided(monkeypatch, tmp_path):
    """No decision yet, an empty cache, no library beside the package; the compiled one stays loaded in this process."""
    monkeypatch.setattr(native, "_chosen", None)
    monkeypatch.delenv("METADISTIL_NATIVE_CACHE")
    monkeypatch.setenv("METADISTIL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(native_build, "library_name", lambda: "_native-absent.so")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv(native.VARIABLE, raising=False)
    return monkeypatch


def test_torch_when_asked_for(undecided):
    undecided.setenv(native.VARIABLE, "torch")
    said = []
    assert native.prepare(said.append) is native.backend()
    assert said == ["Native operations: torch, because METADISTIL_NATIVE says so."]
    assert native._operations(torch.ones(1)) is native_reference


def test_torch_without_a_compiler(undecided):
    undecided.setenv("PATH", "")
    why = "because no C++ compiler was found (CXX, g++, c++, clang++)"
    assert native.backend() == native.Backend("torch", why, frozenset())


def test_torch_where_the_compiler_fails(undecided, tmp_path):
    broken = tmp_path / "compiler"
    broken.write_text("#!/bin/sh\n[ $1 = --version ] && exit\necho 'note: x' >&2; echo 'x.h:1: error: no' >&2; exit 1")
    broken.chmod(0o755)
    undecided.setenv("CXX", str(broken))
    assert native.backend().why == "because compiler failed: x.h:1: error: no"
    assert [p.name for p in (tmp_path / "cache" / "native").iterdir()] == ["lock"]


def test_torch_where_the_cache_cannot_be_written(undecided, tmp_path):
    (tmp_path / "cache").write_text("in the way")
    assert native.backend().name == "torch" and "cannot be written" in native.backend().why


@pytest.mark.parametrize(("choice", "message"), [
    ("fast", "METADISTIL_NATIVE is 'fast'; it must be auto, aot, jit or torch"),
    ("jit", "METADISTIL_NATIVE is 'jit', but no C\\+\\+ compiler was found"),
    ("aot", "METADISTIL_NATIVE is 'aot', but "),
])  # fmt: skip
def test_impossible_choices(choice, message, undecided):
    undecided.setenv("PATH", "")
    undecided.setenv(native.VARIABLE, choice)
    for _ in range(2):  # nothing is kept of a decision that failed
        with pytest.raises(UserError, match=message):
            native.backend()


USE = """
import torch
from engine.params import native
said = []
for native._chosen in (None, None):  # decided twice
    native.prepare(said.append)
w, s, b = torch.arange(5.0), torch.zeros(5), torch.zeros(5, dtype=torch.bfloat16)
native.pilot_update(w, torch.ones(5), s, torch.tensor(0.5), b)
assert w.tolist() == b.tolist() == [0.5, 1.5, 2.5, 3.5, 4.5] and s.tolist() == [0, 1, 2, 3, 4]
print(native.backend().name, said[-1], native.__file__, sep="\\n")
"""


def start(cwd=ROOT, arguments=("-c", USE), **environment):
    environment = {**os.environ, "PYTHONPATH": "", **{name: str(value) for name, value in environment.items()}}
    return started([sys.executable, *map(str, arguments)], cwd=cwd, env=environment)


def started(command, **settings):
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, **pipes, **settings)


def finish(process):
    out, err = process.communicate()
    assert process.returncode == 0, out + err
    return out.splitlines()


@pytest.mark.slow
def test_a_new_process_finds_what_was_compiled(compiler):
    """In the usual cache."""
    name, said, _ = finish(start(METADISTIL_NATIVE="jit"))
    assert name == "just in time"
    assert said.startswith("Native operations: just in time, compiled before into ")


def test_cuda_sources_are_built_where_torch_has_cuda(monkeypatch, tmp_path):
    """No CPU build of torch gets this far, so the commands are looked at instead."""
    commands = []
    monkeypatch.setattr(native_build, "_run", lambda command: commands.append(command) or "")
    monkeypatch.setattr(native_build, "find_nvcc", lambda: (Path("/cuda/bin/nvcc"), ""))
    monkeypatch.setattr(native_build.os, "replace", lambda *paths: None)
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6 9.0a;10.0+PTX")
    native_build.Toolchain().build(tmp_path / "library.so")
    sources = {Path(c[c.index("-c") + 1]).relative_to(native_build.CSRC).as_posix(): c for c in commands if "-c" in c}
    files = [p for p in native_build.CSRC.rglob("*") if p.suffix in (".cpp", ".cu")]
    assert set(sources) == {p.relative_to(native_build.CSRC).as_posix() for p in files}
    for name, command in sources.items():
        assert (command[0] == "/cuda/bin/nvcc") == name.endswith(".cu")
    architectures = [flag for flag in sources["cuda/flat.cu"] if flag.startswith("-gencode")]
    assert [flag.partition(",code=")[2] for flag in architectures] == ["sm_86", "sm_90a", "[sm_100,compute_100]"]
    assert {"-lc10_cuda", "-ltorch_cuda", "-lcudart"} <= set(commands[-1])


# Builds


@pytest.fixture
def source(tmp_path):
    """A copy of the project's files, so that no build of an earlier day has a part in it."""
    listing = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    target = tmp_path / "source"
    for name in subprocess.run(listing, check=True, capture_output=True, text=True).stdout.split("\0"):
        if name and (ROOT / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name, follow_symlinks=False)
    return target


@pytest.mark.slow
def test_ahead_of_time(source, compiler, tmp_path):
    finish(start(source, ["setup.py", "build_ext", "--inplace"]))
    (library,) = (source / "engine").glob("_native*.so")
    for choice in ("aot", "auto"):
        name, said, file = finish(start(source, METADISTIL_NATIVE=choice, METADISTIL_NATIVE_CACHE=tmp_path))
        assert name == "ahead of time"
        assert said == f"Native operations: ahead of time, in {library.name}."
        assert Path(file).parents[1] == library.parent
    with (source / "csrc" / "spans.cpp").open("a") as changed:
        changed.write("// another\n")
    process = start(source, METADISTIL_NATIVE="aot")
    assert "was built for another torch or from other sources" in process.communicate()[1]


@pytest.mark.slow
def test_wheel_of_an_isolated_build_compiles_at_first_use(source, compiler, tmp_path):
    """Isolated is: without torch. Two processes come first at once, and both get a whole library."""
    absent, wheels, target, cache = (tmp_path / name for name in ("absent", "wheels", "target", "cache"))
    absent.mkdir()
    (absent / "torch.py").write_text("raise ImportError('as if it were not there')")
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", wheels]
    finish(start(tmp_path, ["-m", "pip", "wheel", source, *options], PYTHONPATH=absent))
    (wheel,) = wheels.iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    finish(start(tmp_path, ["-m", "pip", "install", "--target", target, "--no-deps", "--no-index", wheel]))
    environment = {"METADISTIL_NATIVE": "jit", "METADISTIL_NATIVE_CACHE": cache, "PYTHONPATH": target}
    for process in [start(tmp_path, **environment) for _ in range(2)]:
        name, _, file = finish(process)
        assert name == "just in time" and Path(file).is_relative_to(target)
    assert len(list(cache.glob("*.so"))) == 1 and not list(cache.glob(".build-*"))


CUDA = native_build.cuda_home()
NO_CUDA = pytest.mark.skipif(CUDA is None, reason="no CUDA toolkit was found")


@pytest.mark.slow
@NO_CUDA
@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "csrc" / "cuda").glob("*.cu")))
def test_kernels_compile(name, tmp_path):
    flags = [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=[sm_90,compute_90]",
        "-Werror=all-warnings",
    ]
    command = [CUDA / "bin" / "nvcc", *native_build.CUDA_FLAGS, *flags, "-c", ROOT / "csrc" / "cuda" / name]
    finish(started([*command, "-o", tmp_path / "kernels.o"]))


@pytest.mark.slow
@NO_CUDA
def test_cuda_binding_is_correct_cpp(compiler):
    """A CPU build of torch lacks one generated header, with settings of its own build, and all CUDA libraries."""
    includes = [f"-I{Path(torch.__path__[0]) / 'include'}", f"-I{CUDA / 'include'}"]
    flags = [*native_build.FLAGS, "-Wall", "-fsyntax-only", "-DC10_USING_CUSTOM_GENERATED_MACROS", *includes]
    finish(started([*compiler.cxx, *flags, ROOT / "csrc" / "cuda" / "bind.cpp"]))
