"""The distillation kernels: `from engine.kernels import kd_loss, meta_cotangent`.

The ops stand in the repository's top-level `kernels/`, a plain folder without `__init__.py`: a package of that name in
the working directory would shadow the one that transformers imports. `ops` is that folder, linked in a checkout and
mapped by setup.py in an installation.
"""

from engine.kernels.ops.reference import kd_loss, mean_logits, meta_cotangent

__all__ = ["kd_loss", "mean_logits", "meta_cotangent"]
