"""Weights as flat buffers: optimizers over them, the native operations that work on them, the random state.

Imports nothing of the engine but errors and sections. Another native operation is a function of `native.py`, its oracle in
`native_reference.py` and its loop in csrc/.
"""
