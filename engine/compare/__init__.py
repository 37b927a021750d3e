"""`python -m engine.compare`: a grid of runs with several seeds each, and the table and the plot that compare them.

Imports run, report and what stands below them; a run is a process of its own. Another option is one of `options.py`, another
statistic one of `stats.py`.
"""
