"""What a run leaves for people: summary.json, model cards, closing tables, and report.html.

summary, cards, tables               written when a run ends; the first two need torch
load                                 reads directories of runs and comparisons, which may be damaged
words, units, markdown               how models, numbers and tables are written
costs, settings, curves              what is shown of a run: time and energy by section, settings and commands, charts
comparison_tables, comparison_plot   what is shown of a comparison
charts, svg, style                   how it is drawn
run_page, several_page               the content of each kind of page
layout, templates/, pages            how a page is put together and written

Imports data, telemetry and what stands below them, never run. Another chart is a function of curves.py that run_page.py calls;
another kind of page is a file beside run_page.py and a branch of `pages.write`.
"""
