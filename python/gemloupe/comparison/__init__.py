"""A model against a reference: where they part, and whether noise explains it.

`compare.py` runs both sides (`sides.py`: gemloupe, transformers through `transformers_capture.py`;
`recording.py`: a file) and walks the hook points (`walk.py`). `operations.py` has each point as an
operation in float64, `bounded.py` what rounding may do to it, `engines.py` how each side rounds.
`weights_difference.py` tells rounded weights from other ones, `contributions.py` what rounding
costs, `report.py` shows what was found.
"""

from gemloupe.comparison.compare import compare
from gemloupe.comparison.recording import record_reference
from gemloupe.comparison.report import Contribution, Divergence, Report, Table
from gemloupe.comparison.walk import OtherChoice, PointError

__all__ = [
    "Contribution",
    "Divergence",
    "OtherChoice",
    "PointError",
    "Report",
    "Table",
    "compare",
    "record_reference",
]
