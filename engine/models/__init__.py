"""Models and how their passes run: loading, encodings in, outputs out, checkpointed, compiled, captured, in low precision.

Imports params, data, embedded and the files directly in engine/. What is known of a model family is in `encoder_layers.py`.
"""
