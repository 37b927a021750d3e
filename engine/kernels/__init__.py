"""The distillation kernels: `from engine.kernels import kd_loss, meta_cotangent, fused_linear_kd`.

The ops stand in the repository's top-level `kernels/`, a plain folder without `__init__.py`: a package of that name in
the working directory would shadow the one that transformers imports. `ops` is that folder, linked in a checkout and
mapped by setup.py in an installation. The ops know nothing of the engine; that the C++ ones are in its native library,
which may be compiled at the first use, they are told here.
"""

from engine.kernels.ops.common import backends
from engine.kernels.ops.common.backends import backend
from engine.kernels.ops.fused_linear_kd import fused_linear_kd
from engine.kernels.ops.kd_loss import kd_loss
from engine.kernels.ops.kd_loss.naive import mean_logits
from engine.kernels.ops.meta_cotangent import meta_cotangent
from engine.params import native


def _native() -> tuple[frozenset[str], str]:
    found = native.backend()
    return found.devices, f"there are no native operations, {found.why}"


backends.native = _native

__all__ = ["backend", "fused_linear_kd", "kd_loss", "mean_logits", "meta_cotangent"]
