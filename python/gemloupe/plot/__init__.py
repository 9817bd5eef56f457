"""Plots of what a model did, with matplotlib (the extra `plot`); every function returns Axes."""

from gemloupe.plot.cache import cache

__all__ = ["cache"]
