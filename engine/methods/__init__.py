"""The methods: one file each, a step function over state and batches that returns device scalars.

Imports losses, meta, models and what stands below them. Steps know nothing of epochs, schedules, logging, checkpoints or
graphs: the trainer wraps them. What methods share is in `common/`.

Another method is one file here that ends in

    METHOD = Method(step=step, help="...", teachers="frozen")

with what `common/method.py` describes. `--method`, its help, the defaults, comparisons and reports take it from there. A file
elsewhere does as well: by its path, `--method my_method.py`, or as an entry point of an installed package, in the group
`metadistil.methods`, as in `mine = "my_package.my_method"`.
"""

from __future__ import annotations

from engine.methods.common.method import Method, Step
from engine.methods.common.state import State
from engine.plugins import METHODS

__all__ = ["METHODS", "Method", "State", "Step"]
