"""Where the memory and the operations of a step go, and whether a configuration will fit: `python -m engine.profiling`.

Imports run, report and what stands below them. Another figure is measured in measure.py and shown in tables.py; another setting
that a search tries is a field of `Setting` in estimate.py; an operation that asks for a tensor's values needs an answer in
pretend.py.
"""
