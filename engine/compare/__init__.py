"""`python -m engine.compare`: a grid of runs with several seeds each, and the table and the plot that compare them."""
