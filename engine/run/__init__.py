"""One run from settings to exported student: what it is made of, its stages, its one training loop, what it writes.

Imports every room but the commands' (compare, profiling, engine.train). Another stage is a step of `stages.py`.
"""
