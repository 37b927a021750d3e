"""From --data to checked, disjoint splits, and from those to batches of token ids.

Imports embedded and the files directly in engine/. Another file format is a row of `READERS` in `read.py`, another kind of
source a function of `sources.py`.
"""
