"""--precision: what a device can do, and torch's process-wide switches for float32 products.

fp32    products of float32 matrices in IEEE float32, on every backend
tf32    the same weights, activations and losses, products in TensorFloat-32 (10 bits of mantissa, accumulated in float32):
        CUDA, compute capability 8.0 and newer
bf16    forward and backward on bfloat16 copies of the weights; weights, logits and losses are float32, whose products are IEEE
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import torch

from engine.errors import UserError

# torch.cpu.get_capabilities() -> the kernel's name of the same in /proc/cpuinfo
X86 = {"avx512_bf16": "avx512_bf16", "amx_bf16": "amx_bf16"}
ARM = {"bf16": "bf16", "sve_bf16": "svebf16"}


def choose(given: str, device: torch.device) -> tuple[str, str | None]:
    """The precision that a run given `given` computes in on `device`, and a sentence where that is another one.

    Raises UserError for what a GPU was asked and cannot do, and for tf32 elsewhere. bf16 on a processor without instructions
    for it would be emulated, and slower than fp32, which stands in for it.
    """
    if given == "tf32":
        _check_tf32(device)
    if given != "bf16":
        return given, None
    if device.type == "cuda":
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            raise UserError("--precision is bf16, which this CUDA device cannot do; use --precision fp32.")
        return given, None
    if bf16_instructions():
        return given, None
    return "fp32", (
        "Precision: fp32 instead of bf16, since this processor has no bf16 instructions (AVX512-BF16, AMX-BF16 or ARM's BF16) "
        "and would emulate them slowly."
    )


def _check_tf32(device: torch.device) -> None:
    if device.type != "cuda":
        raise UserError(
            f"--precision is tf32, which needs a CUDA device, and this run is on {device.type}; use --precision fp32."
        )
    if not torch.cuda.is_tf32_supported():
        found = ".".join(map(str, torch.cuda.get_device_capability(device)))
        raise UserError(
            f"--precision is tf32, which needs a CUDA device of compute capability 8.0 or newer, and this one has {found}; use "
            "--precision fp32.")  # fmt: skip


def apply(precision: str) -> None:
    """Set the switches, whatever they were, so that torch's older and newer ways to ask for them agree.

    The older calls keep the global precision and those of the operations together; but "off" means there that cuDNN takes
    what a user set globally, so its operations are set by the newer ones too. torch 2.11 to 2.13 warn of neither; to use
    the newer ones alone makes `torch.backends.cuda.matmul.allow_tf32`, which libraries read, raise.
    """
    tf32 = precision == "tf32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    for operation in (torch.backends.cudnn.conv, torch.backends.cudnn.rnn):
        operation.fp32_precision = "tf32" if tf32 else "ieee"


@contextmanager
def ieee():
    """IEEE products for the body also in a run in tf32: for what measures a model, or takes differences."""
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    if tf32:
        apply("fp32")
    try:
        yield
    finally:
        if tf32:
            apply("tf32")


def bf16_instructions() -> list[str]:
    """This processor's instructions for products of bfloat16, empty where it has none."""
    try:
        found = torch.cpu.get_capabilities()
    except (AttributeError, RuntimeError):  # torch before 2.11, or built without cpuinfo
        found = {}
    named = {name for name, value in found.items() if value is True}
    if not named:
        listed = _cpuinfo()
        named = {name for name, flag in (X86 | ARM).items() if flag in listed}
    return sorted(named & {*X86, *ARM})


def _cpuinfo(file: Path = Path("/proc/cpuinfo")) -> set[str]:
    """What Linux says the first processor can do; empty elsewhere."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith(("flags", "Features"))), set())
