"""Independent implementations to measure the engine against."""
