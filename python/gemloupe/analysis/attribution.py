"""Direct logit attribution: how much each component's output raises a token's logit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gemloupe.analysis import arguments
from gemloupe.analysis.contributions import contribution_points, contributions, rms
from gemloupe.arrays import as_float32
from gemloupe.errors import quoted

if TYPE_CHECKING:
    from gemloupe.model import Model
    from gemloupe.run import Run


@dataclass(frozen=True, eq=False)
class Attribution:
    """A logit (before the soft-cap) as a sum over m components, at n positions."""

    target: str
    """What is explained: "Paris", "Paris − Rome" or "direction"."""
    names: list[str]
    """[m]: see `Contribution`; so kinds, layers and indices."""
    kinds: list[str]
    layers: np.ndarray
    """int64 [m]: −1 for the embedding."""
    indices: np.ndarray
    """int64 [m]: head or expert, −1 for a whole component."""
    values: np.ndarray
    """float32 [m, n]: what each component adds to the logit."""
    logit: np.ndarray
    """float32 [n]: the logit, or difference of logits, before the soft-cap."""
    unexplained: np.ndarray
    """float32 [n]: logit − values.sum(0): rounding; more where the residual stream was edited."""
    positions: np.ndarray
    """int64 [n]: absolute positions."""
    tokens: list[str]
    """[n]: what was read there."""

    def by_layer(self, kind: str | None = None) -> np.ndarray:
        """Returns float32 [L + 1, n]: sums over each layer (of one kind), the embedding first."""
        kept = np.array([kind is None or kind == own for own in self.kinds])
        if not kept.any():
            kinds = sorted(set(self.kinds))
            raise ValueError(f"kind {quoted(kind)} has no component; expected one of {kinds}")
        sums = np.zeros((self.layers.max() + 2, self.values.shape[1]), np.float32)
        np.add.at(sums, self.layers[kept] + 1, self.values[kept])
        return sums

    def top(self, count: int = 10, column: int = -1) -> list[tuple[str, float]]:
        """Returns the components of largest size at one of the positions: (name, value)."""
        values = self.values[:, column]
        order = np.argsort(-np.abs(values), kind="stable")[:count]
        return [(self.names[i], float(values[i])) for i in order]

    def plot(self, **arguments: Any) -> Any:
        """`gl.plot.attribution(self)`."""
        from gemloupe import plot

        return plot.attribution(self, **arguments)

    def __repr__(self) -> str:
        lines = [
            f"Attribution of {quoted(self.target)} after {quoted(self.tokens[-1])}: logit "
            f"{self.logit[-1]:.3f} of {len(self.names)} components"
        ]
        width = max(len(name) for name in self.names)
        lines += [f"  {name:<{width}}  {value:+8.3f}" for name, value in self.top()]
        return "\n".join(lines)


def attribution(
    x: Run | Any,
    target: Any,
    *,
    model: Model | None = None,
    positions: Any = -1,
    split: str | Iterable[str] = (),
) -> Attribution:
    """Splits a logit into what each component of the model adds to it.

    The last residual stream is a sum of contributions (see `contributions`); with the divisor that
    the final norm had, norm and unembedding are linear: value = ⟨contribution, w ⊙ u⟩ / divisor,
    where w is the final norm's weight and u the target's direction. Values sum to the logit before
    the soft-cap. (Elhage et al., "A mathematical framework for transformer circuits", 2021.)

    `x`: a run that captured `gl.analysis.contribution_points(model, split)`, or an input for
    `model.run`. `model` may be left out where the run knows it. `target`: a token (id, or text of
    one token), a pair of tokens (the difference of their logits), or a direction [D] in the space
    of the final norm's output. `positions`: which, the last by default; None for all.
    `split`: "head", "expert", or both.

    Effects through later layers are not counted: this is the direct path only. KeyError naming
    what to capture; ValueError for a target that is no token and no [D].
    """
    model = arguments.model_of(x, model, "attribution")
    points = contribution_points(model, split)
    direction, label = _direction(target, model)
    run = arguments.recorded(x, model, points, positions)
    last = f"layers.{model.config.text.num_hidden_layers - 1}.resid_post"
    stream = arguments.captured(run, last, points, "attribution")
    rows = arguments.rows_of(run, last, positions)
    absolute, stream = run.positions_of(last)[rows], stream[rows]
    divisor = rms(stream, model.config.text.rms_norm_eps)
    weighted = (model.weights["norm.weight"] * direction).astype(np.float64)

    def projected(vectors: np.ndarray) -> np.ndarray:
        return (vectors.astype(np.float64) @ weighted) / divisor

    parts, terms = [], []
    for part in contributions(run, model=model, positions=absolute, split=split):
        parts.append(dataclasses.replace(part, vector=np.empty(0)))  # One [n, D] is held at a time.
        terms.append(projected(part.vector))
    values = np.array(terms)
    logit = projected(stream)
    return Attribution(
        target=label,
        names=[part.name for part in parts],
        kinds=[part.kind for part in parts],
        layers=np.array([part.layer for part in parts]),
        indices=np.array([part.index for part in parts]),
        values=values.astype(np.float32),
        logit=logit.astype(np.float32),
        unexplained=(logit - values.sum(axis=0)).astype(np.float32),
        positions=absolute,
        tokens=arguments.tokens_at(run, absolute, model),
    )


def _direction(target: Any, model: Model) -> tuple[np.ndarray, str]:
    """Returns the direction [D] before the norm's weight, and its label."""
    size = model.config.text.hidden_size
    if isinstance(target, str) or np.ndim(target) == 0:
        ids = [arguments.token_id(target, model)]
    elif isinstance(target, tuple):
        if len(target) != 2:
            raise ValueError(f"target has {len(target)} tokens; expected one, or a pair")
        ids = [arguments.token_id(token, model) for token in target]
    else:
        return as_float32(target, "target", (size,)), "direction"
    vectors = model.weights.rows("embed_tokens.weight", ids)
    label = " − ".join(arguments.token_text(index, model) for index in ids)
    return vectors[0] - vectors[1] if len(ids) == 2 else vectors[0], label
