"""Directional derivatives by central differences: what gradients would be asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gemloupe import edits
from gemloupe.analysis import arguments
from gemloupe.analysis.metrics import make_metric
from gemloupe.arrays import as_float32
from gemloupe.capturing import at
from gemloupe.errors import quoted
from gemloupe.positions import Span
from gemloupe.run import Run

if TYPE_CHECKING:
    from gemloupe.model import Model

# Relative step where activations are float32, and where products round them to int8.
_STEP = 0.002
_ROUNDED_STEP = 0.1


@dataclass(frozen=True, eq=False)
class Directional:
    """A derivative along a direction."""

    value: np.ndarray
    """float32 [V], of a metric []: (f(x + h v) − f(x − h v)) / 2h."""
    error: np.ndarray
    """float32, as `value`: |D(h) − D(2h)|. It is three times the truncation error where the step
    is small enough, and shows the noise of rounding where it is too small."""
    step: float
    """h, in units of v."""

    def __repr__(self) -> str:
        if self.value.ndim == 0:
            return f"Directional({self.value:.5g} ± {self.error:.2g}, step {self.step:.3g})"
        return (
            f"Directional({self.value.size} logits, largest {np.abs(self.value).max():.5g}, "
            f"largest error {self.error.max():.2g}, step {self.step:.3g})"
        )


def directional(
    x: Run | Any,
    name: str,
    v: Any,
    *,
    model: Model | None = None,
    metric: Any = None,
    positions: Any = None,
    step: float | None = None,
) -> Directional:
    """The derivative of the last position's logits along `v` at a hook point.

    `x`: a run (its prompt is run again), or an input for `model.run`. `name`: an editable hook
    point with one row a position. `v`: the direction, of the shape of one row there, [D]; it is
    added at `positions`, None for all. `metric`: None for the logits [V], a pair of tokens, a
    token's probability, or a function of logits [V] (see `patching_grid`).

    Central differences have an error of h² f‴/6 from the step and of about ε|f|/h from rounding; h
    balances them. The default makes the change h|v| 0.002 of the mean norm of the rows that are
    changed: on random models of every variant, values are then within 0.001 of the largest logit's
    derivative. With int8 and int4 weights, whose products round activations, it is 0.1, and values
    are within about a quarter only: load with activations="float32", and pass the smaller step.
    Read `error` before trusting `value`: a mixture of experts jumps where the set of experts
    changes within 2h (then a smaller step helps). Five passes, the last four from the point on.

    ValueError with both shapes for a wrong `v`, for v = 0, for a step that is not above 0 and for a
    run that continued a cache.
    """
    model = arguments.model_of(x, model, "directional")
    direction = as_float32(v, "v", arguments.row_shape(name, model))
    length = float(np.linalg.norm(direction))
    if not np.isfinite(length) or length == 0:
        raise ValueError(f"v has norm {length:g}; expected a finite one above 0")
    if isinstance(x, Run) and x.positions[0] != 0:
        raise ValueError(
            f"the run begins at position {x.positions[0]}, after a cache; expected one from 0: "
            "pass the whole input"
        )
    prompt = x.prompt if isinstance(x, Run) else arguments.one_prompt(x, model)
    rows = arguments.choose_rows(positions, np.arange(len(prompt)), Span(prompt, 0))
    base = model.run(prompt, capture={name: at(rows)}, keep=True, routing=False)
    if step is None:
        changed = base[name].reshape(len(rows), -1)
        relative = _ROUNDED_STEP if model.dtype in ("int8", "int4") else _STEP
        step = (
            relative * float(np.linalg.norm(changed, axis=1).mean()) / length or relative / length
        )
    if isinstance(step, bool) or not np.isfinite(step) or not step > 0:
        raise ValueError(f"step is {quoted(step)}; expected a number above 0")
    measure = None if metric is None else make_metric(metric, model, base.logits[0])[0]

    def moved(distance: float) -> np.ndarray:
        edit = edits.add(np.float32(distance) * direction, positions=rows)
        run = model.run(base, edit={name: edit}, routing=False)
        logits = run.logits[0].astype(np.float64)
        return logits if measure is None else np.float64(measure(logits))

    near = (moved(step) - moved(-step)) / (2 * step)
    far = (moved(2 * step) - moved(-2 * step)) / (4 * step)
    return Directional(np.float32(near), np.float32(abs(near - far)), float(step))
