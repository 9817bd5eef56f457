"""Plots of what a model did, with matplotlib (the extra `plot`); every function returns Axes."""
