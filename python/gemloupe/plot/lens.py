"""The logit lens as a table: each layer's prediction at each position."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gemloupe.errors import one_of, quoted
from gemloupe.plot.heat_map import grid_size, heat_map, label_layers, write_cells
from gemloupe.plot.style import colour_bar, label_tokens, token_labels

if TYPE_CHECKING:
    from gemloupe.analysis.logit_lens import LogitLens

_LABELS = {
    "probability": "probability of the top token",
    "target": "probability of the target",
    "rank": "log₁₀(rank of the target + 1)",
    "kl": "KL(last layer ‖ layer) in nats",
    "entropy": "entropy in nats",
}


def lens(lens: LogitLens, colour: str = "probability", *, ax: Any = None) -> Any:
    """Shows the most probable token of each layer and position, and returns the axes.

    `colour`: what colours a cell: "probability" of the token in it, of the "target", its "rank",
    the "kl" to the last layer, or the "entropy". The last layer is on top.
    """
    if colour not in _LABELS:
        raise ValueError(f"colour is {quoted(colour)}; expected {one_of(list(_LABELS))}")
    values = {
        "probability": lens.top_probs[..., 0],
        "target": lens.probs,
        "rank": np.log10(np.where(lens.ranks >= 0, lens.ranks + 1.0, np.nan)),
        "kl": lens.kl,
        "entropy": lens.entropy,
    }[colour][::-1]
    size = grid_size(values.shape[1], values.shape[0], (0.72, 0.26))
    spans = {"probability": (0.0, 1.0), "target": (0.0, 1.0)}
    colours = "viridis" if colour in spans else "viridis_r"
    ax, image = heat_map(values, ax, size, colours, spans.get(colour))
    texts = np.array(
        [token_labels(row) for row in lens.top_tokens[::-1, :, 0].tolist()], dtype=object
    )
    write_cells(ax, image, texts)
    label_layers(ax, lens.layers[::-1].tolist())
    label_tokens(ax.xaxis, lens.tokens)
    ax.set_xlabel("token read")
    colour_bar(image, ax, _LABELS[colour])
    return ax
