"""Plots of what a model did, with matplotlib (the extra `plot`). Every function returns its Axes."""
