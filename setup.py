"""Which folders are installed, and under which names, and the native operations; the rest is in pyproject.toml."""

import runpy
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

try:
    BUILD = runpy.run_path("engine/params/native_build.py")  # which imports nothing of the engine
except ImportError:  # an isolated build has no torch to build for: the operations are compiled at their first use
    BUILD = None


class BuildNative(build_ext):
    """One shared library beside the package, named after the torch that it fits; it is no Python module."""

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split(".")[:-1], BUILD["library_name"]()))

    def build_extension(self, ext):
        try:
            BUILD["Toolchain"]().build(Path(self.get_ext_fullpath(ext.name)).absolute())
        except BUILD["BuildError"] as error:
            raise CompileError(str(error)) from error


# Folders that stand beside engine/ and are installed as a part of it; in a checkout, links in engine/ lead to them.
# kernels/ itself is no package, since it must not hide Hugging Face's package of that name; its folders, one for each op,
# are. csrc/ is what is compiled at a first use.
FOLDERS = {f"engine.kernels.ops.{name}": f"kernels/{name}" for name in find_packages("kernels")}
FOLDERS |= {"engine.csrc": "csrc", "engine.csrc.cuda": "csrc/cuda"}

setup(
    packages=[*find_packages(include=["engine", "engine.*"]), *FOLDERS],
    package_dir=FOLDERS,
    package_data={"engine.report": ["templates/*"], "engine.csrc": ["*"], "engine.csrc.cuda": ["*"]},
    # optional: without a compiler the package is installed all the same
    ext_modules=[Extension("engine._native", sources=[], optional=True)] if BUILD else [],
    cmdclass={"build_ext": BuildNative},
)
