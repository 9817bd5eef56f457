"""Plots of what a model did, with matplotlib (the extra `plot`); every function returns Axes."""

from gemloupe.plot.cache import cache

__all__ = ["cache"]
from gemloupe.plot.routing import coactivation, routing, routing_drift, token_classes

__all__ = ["coactivation", "routing", "routing_drift", "token_classes"]
