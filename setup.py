"""Which folders are installed, and under which names; everything else about the distribution is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    # kernels/ has no __init__.py, so that the folder never shadows Hugging Face's package of that name, and it is
    # installed under our own name only. In a checkout the link engine/kernels/ops leads to the same folder.
    packages=[*find_packages(include=["engine", "engine.*"]), "engine.kernels.ops"],
    package_dir={"engine.kernels.ops": "kernels"},
)
