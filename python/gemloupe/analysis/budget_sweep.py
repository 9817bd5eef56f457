"""What an image's number of soft tokens changes: one prompt under several budgets."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gemloupe.analysis import arguments
from gemloupe.analysis.distributions import kl_divergence, log_sum_exp
from gemloupe.analysis.metrics import make_metric
from gemloupe.media.images import BUDGETS, check_budget
from gemloupe.table import Table

if TYPE_CHECKING:
    from gemloupe.model import Model


@dataclass(frozen=True, eq=False)
class BudgetSweep:
    """One entry, or row, a budget."""

    budgets: tuple[int, ...]
    soft_tokens: np.ndarray
    """int64 [B]: how many the image really has."""
    logits: np.ndarray
    """float32 [B, V] after the last token."""
    kl: np.ndarray
    """float64 [B]: KL(largest budget ‖ this one) of the next token, in nats."""
    values: np.ndarray | None
    """float64 [B] of `metric`; None without one."""
    metric: str
    """What `values` are."""
    top: tuple[str, ...]
    """The most likely next token."""
    probabilities: np.ndarray
    """float64 [B] of `top`."""
    encode_seconds: np.ndarray
    """float64 [B]: from picture to soft tokens."""
    read_seconds: np.ndarray
    """float64 [B]: of the text model over the whole prompt."""

    def table(self) -> Table:
        """Columns budget, soft tokens, top, probability, KL, the metric, seconds."""
        columns: dict[str, Sequence[Any]] = {
            "budget": self.budgets,
            "soft tokens": self.soft_tokens.tolist(),
            "top": self.top,
            "probability": self.probabilities.tolist(),
            "KL": self.kl.tolist(),
        }
        if self.values is not None:
            columns[self.metric] = self.values.tolist()
        columns["encode s"] = self.encode_seconds.tolist()
        columns["read s"] = self.read_seconds.tolist()
        return Table(columns)

    def plot(self, ax: Any = None) -> Any:
        """See `gemloupe.plot.budgets`."""
        from gemloupe.plot.budgets import budgets

        return budgets(self, ax=ax)

    def __repr__(self) -> str:
        return f"BudgetSweep\n{self.table()!r}"

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def budget_sweep(
    model: Model,
    x: Any,
    image: Any,
    *,
    budgets: Sequence[int] = BUDGETS,
    metric: Any = None,
    thinking: bool = False,
) -> BudgetSweep:
    """Reads one prompt with one image at several budgets and compares the next token.

    `x`: text with one <|image|>, or a chat with one part {"type": "image"}. `image`: as
    `model.encode_image` takes it. `budgets`: of 70, 140, 280, 560, 1120, ascending. `metric` adds a
    column: a token (its probability), a pair of tokens (difference of their logits), or a function
    of logits [V]. Seconds are of one pass each, the vision tower's loading left out.
    ValueError for other budgets, for no image, and where the prompt has not one place for it.
    """
    chosen = tuple(budgets)
    for budget in chosen:
        check_budget(budget, "budgets")
    if not chosen or list(chosen) != sorted({*chosen}):
        raise ValueError(f"budgets are {list(chosen)}; expected at least one, ascending")
    measure, label = (None, "") if metric is None else make_metric(metric, model)
    model.encode_image(image, chosen[0])  # Loads the tower before seconds count.
    counts, logits, encoded, read = [], [], [], []
    for budget in chosen:
        begin = time.perf_counter()
        tokens = model.encode_image(image, budget)
        encoded.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        run = model.run(x, images=tokens, thinking=thinking, routing=False)
        read.append(time.perf_counter() - begin)
        counts.append(len(tokens))
        logits.append(run.logits[0])
    rows = np.stack(logits)
    best = rows.argmax(axis=-1)
    chances = np.exp(rows[np.arange(len(rows)), best] - log_sum_exp(rows))
    reference = np.broadcast_to(rows[-1], rows.shape)
    return BudgetSweep(
        budgets=chosen,
        soft_tokens=np.array(counts),
        logits=rows,
        kl=np.asarray(kl_divergence(reference, rows), np.float64),
        values=None if measure is None else np.array([measure(row) for row in rows]),
        metric=label,
        top=tuple(arguments.token_text(int(index), model) for index in best),
        probabilities=np.asarray(chances, np.float64),
        encode_seconds=np.array(encoded),
        read_seconds=np.array(read),
    )
