"""The distillation kernels: `from engine.kernels import kd_loss, meta_cotangent, fused_linear_kd`.

Their code stands in the repository's top-level kernels/, one folder an op, and is imported as `engine.kernels.ops` (a link in
a checkout, a mapping of setup.py in an installation): a package named kernels would hide the one that transformers uses.
Imports params, whose native library holds the C++ kernels; kernels/ itself imports nothing of the engine but itself.
Another op is a folder there with its function in `__init__`, the formula in naive.py, triton_kernels.py and cpp.py under
one signature, and a line here.
"""

from engine.kernels.ops.common import backends
from engine.kernels.ops.common.backends import backend
from engine.kernels.ops.common.teachers import mean_logits
from engine.kernels.ops.fused_linear_kd import fused_linear_kd
from engine.kernels.ops.kd_loss import kd_loss
from engine.kernels.ops.meta_cotangent import meta_cotangent
from engine.params import native


def _native() -> tuple[frozenset[str], str]:
    found = native.backend()
    return found.devices, f"there are no native operations, {found.why}"


backends.native = _native

__all__ = ["backend", "fused_linear_kd", "kd_loss", "mean_logits", "meta_cotangent"]
