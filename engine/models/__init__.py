"""Models and how their passes run: loading, batches in, outputs out, checkpointed, compiled, captured, in low precision.

Imports params, data, embedded and the files directly in engine/. Another model family is one record in
`families.py`; one that has none runs as transformers has it.
"""
