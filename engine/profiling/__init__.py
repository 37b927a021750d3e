"""Where the memory and the operations of a step go, and whether a configuration will fit: `python -m engine.profiling`."""
