"""Gemma 4's text decoder in float64 NumPy: the readable specification of what gemloupe computes.

One concept a file; nothing here is fast, cached or shared with gemloupe. `load(folder).run(ids)`
gives the logits and the value at every hook point.
"""

from .model import Gemma4Text, load

__all__ = ["Gemma4Text", "load"]
