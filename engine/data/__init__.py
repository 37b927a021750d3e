"""From --data to checked, disjoint splits, and from those to batches of token ids."""
