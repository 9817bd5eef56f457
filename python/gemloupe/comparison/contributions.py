"""What rounding each tensor's weights does to a quantised model.

Two measures. The output error of a tensor is |x (W - W_ref)ᵀ| / |x W_refᵀ|, where x are the inputs
that the reference captured: it tells how wrong the tensor's own product is, and needs no further
pass, but not how much of that reaches the logits. The KL of a tensor is KL(reference || reference
with this tensor alone rounded), the mean over positions: one pass of the transformers reference for
each tensor. Single KLs do not add up to the whole one: errors of many tensors partly cancel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from gemloupe.comparison import tensors as weights
from gemloupe.comparison.engines import PLAIN
from gemloupe.comparison.operations import operation_of, split_name
from gemloupe.comparison.report import Contribution
from gemloupe.comparison.sides import TransformersSide
from gemloupe.comparison.tensors import Tensors
from gemloupe.comparison.walk import PointError, Walk
from gemloupe.prompt import Prompt


def kl(p_logits: np.ndarray, q_logits: np.ndarray) -> np.ndarray:
    """KL(p || q) of each row of logits [T, V], in nats, float64 [T]."""
    rows = []
    for p_row, q_row in zip(p_logits, q_logits, strict=True):
        p, q = _log_softmax(p_row), _log_softmax(q_row)
        rows.append(float((np.exp(p) * (p - q)).sum()))
    return np.maximum(np.array(rows), 0.0)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    wide = x.astype(np.float64)
    wide -= wide.max()
    return np.asarray(wide - np.log(np.exp(wide).sum()))


def rank(points: Sequence[PointError], walk: Walk, tensors: Tensors) -> list[Contribution]:
    """The rounded tensors by output error, the largest first."""
    found: dict[str, Contribution] = {}
    for point in points:
        operation = operation_of(point.name)
        if operation is None or point.output_error is None:
            continue
        prefix = f"layers.{point.layer}." if split_name(point.name)[0] >= 0 else ""
        for tensor in operation.tensors:
            name = prefix + tensor
            if point.point == "attn.result" or not _has(tensors, name):
                continue
            if tensors.dtype(name) in PLAIN:
                continue
            before = found.get(name)
            if before is None or before.output_error < point.output_error:
                error = walk.weight_error(name)
                found[name] = Contribution(name, tensors.dtype(name), point.output_error, error)
    return sorted(found.values(), key=lambda c: -c.output_error)


def _has(tensors: Tensors, name: str) -> bool:
    try:
        tensors.dtype(name)
    except KeyError:
        return False
    return True


def with_kl(
    ranked: Sequence[Contribution],
    side: TransformersSide,
    tensors: Tensors,
    prompts: Sequence[Prompt],
) -> list[Contribution]:
    """Measures each tensor's KL alone; the largest first."""
    plain = [side.values(prompt, ["logits"])["logits"] for prompt in prompts]
    measured = []
    for contribution in ranked:
        name = contribution.tensor
        rows = tensors.rows(name, 0, weights.num_rows(tensors, name))
        with side.swapped(name, rows):
            swapped = [side.values(prompt, ["logits"])["logits"] for prompt in prompts]
        values = [kl(p, q) for p, q in zip(plain, swapped, strict=True)]
        measured.append(replace(contribution, kl=float(np.concatenate(values).mean())))
    return sorted(measured, key=lambda c: -(c.kl or 0.0))
