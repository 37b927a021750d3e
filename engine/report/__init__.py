"""What a run leaves for people: summary.json, model cards, closing tables, and report.html.

summary, cards, tables           written when a run ends; need torch
load                             reads directories of runs and comparisons
words, units, costs, settings    what is said of them
charts, style, svg               how it is drawn
comparison_tables, comparison_plot
pages                            puts pages together and writes them

Imports data, telemetry and what stands below them, never run. Another chart is a function of curves.py, another kind of page a
file beside run_page.py and its row in pages.py.
"""
