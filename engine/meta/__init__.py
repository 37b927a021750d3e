"""The meta-step: pilot, quiz, meta-gradient into every teacher, rewind, real step, for any modules.

Imports losses, kernels, models, params and what stands below them. Another way to get the meta-gradient is one file and
one row of `STRATEGIES`.
"""
