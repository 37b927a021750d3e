"""Models and how their passes run: loading, batches in, outputs out, checkpointed, compiled, captured, in low precision.

Imports params, data, embedded and the files directly in engine/. Another model family is what `encoder_layers.py` knows of its
layers and `network.py` of its attention; one that neither knows runs as transformers has it.
"""
