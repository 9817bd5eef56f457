"""One number about a prediction: what patching and steering are measured by."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from gemloupe.analysis import arguments
from gemloupe.analysis.distributions import kl_divergence, log_sum_exp
from gemloupe.errors import quoted

if TYPE_CHECKING:
    from gemloupe.model import Model

Metric = Callable[[np.ndarray], float]


def make_metric(
    metric: Any, model: Model, reference: np.ndarray | None = None
) -> tuple[Metric, str]:
    """Returns a function of logits [V] and what it measures.

    `metric`: a pair of tokens (difference of their logits), a token (its probability), "kl"
    (KL(`reference` ‖ logits) in nats, `reference` being logits [V]), or a function of logits [V]
    that returns a number. A token is an id, or a text of one token; "kl" is never one.
    """
    if callable(metric):
        return _checked(metric), getattr(metric, "__name__", "metric")
    if isinstance(metric, str) and metric == "kl":
        if reference is None:
            raise ValueError('metric is "kl", but there is nothing here to compare with')
        return lambda logits: float(kl_divergence(reference[None], logits[None])[0]), "KL in nats"
    if isinstance(metric, (tuple, list)):
        if len(metric) != 2:
            raise ValueError(f"metric has {len(metric)} tokens; expected two, or one token alone")
        a, b = (arguments.token_id(token, model) for token in metric)
        label = f"logit {arguments.token_text(a, model)} − {arguments.token_text(b, model)}"
        return lambda logits: float(logits[a]) - float(logits[b]), label
    if metric is None:
        raise ValueError(
            f"metric is {quoted(metric)}; expected a pair of tokens, a token, 'kl' or a function "
            "of logits [V]"
        )
    token = arguments.token_id(metric, model)
    label = f"probability of {arguments.token_text(token, model)}"
    return lambda logits: float(np.exp(logits[token] - log_sum_exp(logits[None])[0])), label


def _checked(metric: Callable[[np.ndarray], Any]) -> Metric:
    def number(logits: np.ndarray) -> float:
        value = np.asarray(metric(logits))
        if value.size != 1:
            raise ValueError(
                f"metric returned shape {list(value.shape)} for logits {list(logits.shape)}; "
                "expected one number"
            )
        return float(value.reshape(()))

    return number
