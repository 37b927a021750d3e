"""Settings that suit the miniatures; the names are those of `engine.config`, an explicit flag goes before them.

Measured on the embedded corpus: see the table in `engine/embedded/__init__.py`.
"""

from __future__ import annotations

DEFAULTS: dict[str, object] = {
    # ten to twenty times the 6e-5 of the published models, because these start from random weights
    "lr": 1e-3,
    "prepare_lr": 1e-3,
    # gentle: the meta-updates adjust finished teachers and must not unlearn them
    "teacher_lr": 1e-4,
    "epochs": 3,
    "prepare_epochs": 4,
}
