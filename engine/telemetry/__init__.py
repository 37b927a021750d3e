"""What a step costs: time, memory and energy by section, the device's state, and where the figures go.

Imports the files directly in engine/. Another tracker is a class in `trackers.py` and its row there.
"""
