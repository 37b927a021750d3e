"""Benchmarks and the tables made from them; nothing in the engine imports this."""
