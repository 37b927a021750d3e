"""From --data to checked, disjoint splits, and from those to batches of token ids."""

from engine.data.splits import Splits, Task, content_hash, load_splits

__all__ = ["Splits", "Task", "content_hash", "load_splits"]
