"""What a model computes and why: small functions over `run`, `capture` and `edit`.

Each takes a model or a run, and returns a small object with arrays, `repr` and `plot()`.
"""

from gemloupe.analysis.attribution import Attribution, attribution
from gemloupe.analysis.budget_sweep import BudgetSweep, budget_sweep
from gemloupe.analysis.contributions import Contribution, contribution_points, contributions
from gemloupe.analysis.directional import Directional, directional
from gemloupe.analysis.induction import InductionScores, induction_scores
from gemloupe.analysis.logit_lens import LogitLens, logit_lens
from gemloupe.analysis.patching import PatchingGrid, patching_grid
from gemloupe.analysis.steering import SteeringVector, steering_vector

__all__ = [
    "Attribution",
    "BudgetSweep",
    "Contribution",
    "Directional",
    "InductionScores",
    "LogitLens",
    "PatchingGrid",
    "SteeringVector",
    "attribution",
    "budget_sweep",
    "contribution_points",
    "contributions",
    "directional",
    "induction_scores",
    "logit_lens",
    "patching_grid",
    "steering_vector",
]
