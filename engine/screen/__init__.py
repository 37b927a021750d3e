"""What a person at the terminal sees: lines, banners, warnings, the live display.

Imports nothing of the engine. Another kind of output is a method of `Console`.
"""
