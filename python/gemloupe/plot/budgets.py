"""What an image's budget of soft tokens buys, and what it costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gemloupe.plot.style import COLOURS, INK, new_axes, token_labels

if TYPE_CHECKING:
    from gemloupe.analysis.budget_sweep import BudgetSweep


def budgets(sweep: BudgetSweep, *, ax: Any = None) -> Any:
    """Draws the metric (without one, the KL from the largest budget) over seconds as bars.

    A bar a budget: encoding below, reading above; the most likely next token stands over it.
    Returns the axes of the line; the bars' are `ax.figure.axes[-1]`.
    """
    ax = new_axes(ax, (6.5, 3.6))
    places = range(len(sweep.budgets))
    seconds = new_axes(ax.twinx())
    seconds.bar(places, sweep.encode_seconds, 0.5, color=COLOURS[4], alpha=0.45, label="encode")
    seconds.bar(
        places, sweep.read_seconds, 0.5, bottom=sweep.encode_seconds, color=COLOURS[1], alpha=0.45,
        label="read",
    )  # fmt: skip
    seconds.set_ylabel("seconds", color=INK)
    seconds.set_ylim(0, 1.25 * float((sweep.encode_seconds + sweep.read_seconds).max()) or 1.0)
    values = sweep.kl if sweep.values is None else sweep.values
    label = "KL from the largest budget, nats" if sweep.values is None else sweep.metric
    ax.plot(places, values, marker="o", color=COLOURS[0], label=label.replace("$", "\\$"))
    for place, top, chance in zip(
        places, token_labels(sweep.top), sweep.probabilities, strict=True
    ):
        seconds.text(
            place, 0.99, f"\u201c{top}\u201d {chance:.0%}", ha="center", va="top", fontsize=8,
            color=INK, transform=seconds.get_xaxis_transform(),
        )  # fmt: skip
    ax.set_zorder(seconds.get_zorder() + 1)
    names = [f"{b}\n({n})" for b, n in zip(sweep.budgets, sweep.soft_tokens, strict=True)]
    ax.set_xticks(list(places), names)
    ax.set_xlabel("budget (soft tokens)", color=INK)
    ax.set_ylabel(label.replace("$", "\\$"), color=INK)
    low, high = float(values.min()), float(values.max())
    room = (high - low) or 1.0
    ax.set_ylim(low - 0.1 * room, high + 0.3 * room)
    seconds.legend(fontsize=7, frameon=False, labelcolor=INK, loc="upper left",
                   bbox_to_anchor=(0, 0.92))  # fmt: skip
    return ax
