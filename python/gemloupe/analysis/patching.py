"""Activation patching: which activation, where, carries what two inputs differ in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gemloupe import edits
from gemloupe.analysis import arguments
from gemloupe.analysis.metrics import make_metric
from gemloupe.capturing import at
from gemloupe.errors import quoted
from gemloupe.positions import Span
from gemloupe.progress import ProgressBar

if TYPE_CHECKING:
    from gemloupe.model import Model

# Points of a layer that its own keys and values are computed from.
_BEFORE_KEYS = frozenset(
    f"{name}{end}"
    for name in ("resid_pre", "attn.norm", "attn.k_proj", "attn.v_proj", "attn.k", "attn.v")
    for end in ("", ".scale")
) | {"attn.rot_k", "attn.keys", "attn.values"}


@dataclass(frozen=True, eq=False)
class PatchingGrid:
    """The metric with one activation of the corrupted input replaced by the clean one's."""

    point: str
    """The hook point without its layer: "resid_post"."""
    metric: str
    """What was measured."""
    values: np.ndarray
    """float32 [layers, positions]: the metric of each patched run."""
    computed: np.ndarray
    """bool [layers, positions]: False where the patch cannot reach the last position's logits;
    there `values` holds `corrupted`, and no run was made."""
    clean: float
    """The metric of the clean input."""
    corrupted: float
    """The metric of the corrupted input."""
    layers: np.ndarray
    """int64 [layers]."""
    positions: np.ndarray
    """int64 [positions]."""
    tokens: list[str]
    """[positions]: the clean input's tokens."""
    corrupted_tokens: list[str]
    """[positions]: the corrupted input's."""

    @property
    def restored(self) -> np.ndarray:
        """float32 [layers, positions]: 0 as the corrupted input, 1 as the clean one; NaN if the
        two inputs measure the same."""
        span = self.clean - self.corrupted
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(span != 0, (self.values - self.corrupted) / np.float32(span), np.nan)

    def plot(self, **arguments: Any) -> Any:
        """`gl.plot.patching(self)`."""
        from gemloupe import plot

        return plot.patching(self, **arguments)

    def __repr__(self) -> str:
        layer, column = np.unravel_index(
            np.argmax(np.abs(self.values - self.corrupted)), self.values.shape
        )
        return (
            f"PatchingGrid({self.point}, {len(self.layers)} layers, {len(self.positions)} "
            f"positions, {int(self.computed.sum())} of {self.computed.size} cells computed)\n"
            f"  {self.metric}: clean {self.clean:.4g}, corrupted {self.corrupted:.4g}\n"
            f"  most moved: {self.values[layer, column]:.4g} at layer {self.layers[layer]}, "
            f"position {self.positions[column]} {quoted(self.tokens[column])}"
        )


def patching_grid(
    model: Model,
    clean: Any,
    corrupted: Any,
    metric: Any,
    points: str | Sequence[str] = "resid_post",
    *,
    layers: Any = None,
    positions: Any = None,
    skip_dead: bool = True,
) -> PatchingGrid | list[PatchingGrid]:
    """Runs `corrupted` once for each (layer, position), with the clean activation put in there.

    `clean`, `corrupted`: inputs as `model.run` takes them, of the same number of tokens.
    `metric`, of the last position's logits [V]: a pair of tokens (difference of their logits), a
    token (its probability), "kl" (KL(clean ‖ patched), in nats), or a function of logits [V]. A
    token is an id, or a text of one token. `points`: a hook point without its layer, such as
    "resid_post", "attn.out", "ffn.post", with one row a position; a list gives a list of grids.
    `layers`, `positions`: which; None for all.

    A cell whose point no later keys or values are computed from cannot change the last position's
    logits unless it stands there: with "resid_post", the layers from the last one that has keys
    and values of its own (all layers after it read those of earlier ones). Such cells are not
    computed; `skip_dead=False` computes them all the same.

    Layers below a patch and positions before it are not computed again (`model.run(x, keep=True)`).
    Shows a progress bar on a terminal. Ctrl-C ends it at once, and the model stays usable. (Meng et
    al., "Locating and editing factual associations in GPT", 2022; Zhang and Nanda, "Towards best
    practices of activation patching in language models", 2024.)

    ValueError where the inputs differ in length, and for layers, positions or tokens that the model
    or the input does not have; KeyError for such points.
    """
    names = [points] if isinstance(points, str) else list(points)
    chosen = arguments.layer_numbers(layers, model.config.text.num_hidden_layers)
    wanted = [f"layers.{layer}.{name}" for name in names for layer in chosen]
    for point in wanted:
        arguments.row_shape(point, model)
    prompts = [arguments.one_prompt(x, model) for x in (clean, corrupted)]
    _check_lengths(*map(len, prompts))
    span = Span(prompts[0], 0)
    rows = arguments.choose_rows(positions, np.arange(span.end), span)
    clean_run = model.run(prompts[0], capture=dict.fromkeys(wanted, at(rows)), routing=False)
    base = model.run(prompts[1], keep=True, routing=False)
    measure, label = make_metric(metric, model, clean_run.logits[0])
    tokens = [
        [arguments.token_text(int(prompt.ids[row]), model) for row in rows] for prompt in prompts
    ]
    grids = [
        PatchingGrid(
            point=name, metric=label,
            values=np.full((len(chosen), len(rows)), measure(base.logits[0]), np.float32),
            computed=_alive(name, chosen, rows == span.end - 1, model) | (not skip_dead),
            clean=measure(clean_run.logits[0]), corrupted=measure(base.logits[0]),
            layers=chosen, positions=rows, tokens=tokens[0], corrupted_tokens=tokens[1],
        )
        for name in names
    ]  # fmt: skip
    cells = [(grid, i, j) for grid in grids for i, j in np.argwhere(grid.computed)]
    with ProgressBar("patching") as bar:
        for done, (grid, i, j) in enumerate(cells):
            point = f"layers.{chosen[i]}.{grid.point}"
            patch = edits.patch(clean_run, positions=int(rows[j]))
            patched = model.run(base, edit={point: patch}, routing=False)
            grid.values[i, j] = measure(patched.logits[0])
            bar.show((done + 1) / len(cells))
    return grids[0] if isinstance(points, str) else grids


def _check_lengths(clean: int, corrupted: int) -> None:
    if clean != corrupted:
        raise ValueError(
            f"clean has {clean} tokens and corrupted {corrupted}; expected the same number: "
            "patching puts activations at equal positions"
        )


def _alive(name: str, layers: np.ndarray, is_last: np.ndarray, model: Model) -> np.ndarray:
    """Returns bool [layers, positions]: which cells can change the last position's logits."""
    specs = model.config.text.layers
    last_owner = max(i for i, spec in enumerate(specs) if spec.kv_source == i)
    reaches_keys = layers <= last_owner if name in _BEFORE_KEYS else layers < last_owner
    return reaches_keys[:, None] | is_last[None, :]
