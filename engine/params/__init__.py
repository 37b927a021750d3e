"""Weights as flat buffers: optimizers over them, the native operations that work on them, what a
pass begins from (random generators and buffers), and how other tensors stand in for a module's own.

Imports nothing of the engine but errors and sections. Another native operation is a function of `native.py`, its oracle in
`native_reference.py` and its loop in csrc/.
"""
