"""Plots of what a model did, with matplotlib (the extra `plot`); every function returns Axes."""

from gemloupe.plot.attention import attention
from gemloupe.plot.attribution import attribution
from gemloupe.plot.budgets import budgets
from gemloupe.plot.cache import cache
from gemloupe.plot.compare import errors as comparison
from gemloupe.plot.compare import kl as comparison_kl
from gemloupe.plot.images import boxes, image_attention
from gemloupe.plot.induction import induction
from gemloupe.plot.lens import lens
from gemloupe.plot.patching import patching
from gemloupe.plot.routing import coactivation, routing, routing_drift, token_classes
from gemloupe.plot.sounds import audio_attention

__all__ = [
    "attention",
    "attribution",
    "audio_attention",
    "boxes",
    "budgets",
    "cache",
    "coactivation",
    "comparison",
    "comparison_kl",
    "image_attention",
    "induction",
    "lens",
    "patching",
    "routing",
    "routing_drift",
    "token_classes",
]
