"""`python -m engine.compare`: a grid of runs with several seeds each, and the table and the plot that compare them.

Imports run, report and what stands below them; a run is a process of its own. Another option is a flag in options.py; another
key of a grid's file is read in grid_file.py; another statistic is a function of stats.py that result.py writes into
comparison.json and engine/report/comparison_tables.py shows.
"""
