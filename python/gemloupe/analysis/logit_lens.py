"""The logit lens: what each layer's residual stream would predict if it were the last."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from gemloupe.analysis import arguments, distributions
from gemloupe.errors import one_of, quoted
from gemloupe.progress import ProgressBar

if TYPE_CHECKING:
    from gemloupe.model import Model
    from gemloupe.run import Run

# Logits that are held at once: 64 MiB of float32, 64 rows of a real vocabulary.
_BLOCK_LOGITS = 1 << 24
_BAR_ROWS = 2000
_CAPTURE = ("layers.*.resid_post",)


@dataclass(frozen=True, eq=False)
class LogitLens:
    """Predictions of R layers at T positions; probabilities are after the soft-cap.

    Log-probabilities, entropies and divergences are in nats.
    """

    layers: np.ndarray
    """int64 [R]: the layer of each row; −1 is the embedding."""
    positions: np.ndarray
    """int64 [T]: absolute positions."""
    tokens: list[str]
    """[T]: what was read there."""
    target_ids: np.ndarray
    """int64 [T]: the token that is followed through the layers; −1 where there is none."""
    logits: np.ndarray
    """float32 [R, T]: the target's logit. NaN where there is no target; so the next two."""
    probs: np.ndarray
    """float32 [R, T]: the target's probability."""
    ranks: np.ndarray
    """int64 [R, T]: how many tokens have a larger logit: 0 for the most probable; −1 for none."""
    kl: np.ndarray
    """float32 [R, T]: KL(last layer ‖ this layer), 0 in the last layer."""
    entropy: np.ndarray
    """float32 [R, T]."""
    top_ids: np.ndarray
    """int64 [R, T, k]: the most probable tokens, descending."""
    top_probs: np.ndarray
    """float32 [R, T, k]."""
    model: Model = field(repr=False)

    @property
    def top_tokens(self) -> np.ndarray:
        """str [R, T, k]: the vocabulary's pieces of `top_ids`."""
        pieces = [arguments.token_text(int(i), self.model) for i in self.top_ids.ravel()]
        return np.array(pieces, object).reshape(self.top_ids.shape)

    @property
    def target_tokens(self) -> list[str]:
        """[T]: the targets' pieces; "" where there is none."""
        return [arguments.token_text(int(i), self.model) if i >= 0 else "" for i in self.target_ids]

    def plot(self, **arguments: Any) -> Any:
        """`gl.plot.lens(self)`."""
        from gemloupe import plot

        return plot.lens(self, **arguments)

    def __repr__(self) -> str:
        lines = [f"LogitLens({len(self.layers)} layers, {len(self.positions)} positions)"]
        lines.append(f"  after {quoted(self.tokens[-1])}, target {quoted(self.target_tokens[-1])}")
        top = self.top_tokens[:, -1]
        for row, layer in enumerate(self.layers):
            best = "  ".join(
                f"{piece} {p:.2f}"
                for piece, p in zip(top[row], self.top_probs[row, -1], strict=True)
            )
            name = "embed" if layer < 0 else f"{layer}"
            lines.append(f"  {name:>5}  KL {self.kl[row, -1]:6.2f}  {best}")
        return "\n".join(lines)


def logit_lens(
    x: Run | Mapping[str, np.ndarray] | Any,
    *,
    model: Model | None = None,
    layers: Any = None,
    positions: Any = None,
    targets: Any = "final",
    top: int = 5,
    softcap: bool = True,
) -> LogitLens:
    """Applies the final norm and the unembedding to the residual stream after each layer.

    logits[layer] = unembed(norm(resid_post[layer])): nostalgebraist, "interpreting GPT: the logit
    lens" (2020). The last layer's row is the model's own prediction.

    `x`: a run that captured "layers.*.resid_post" (with "embed" too, the embedding is a row, layer
    −1), or a mapping of such names to arrays [T, D], or an input for `model.run`. `model` may be
    left out where the run knows it. `layers`, `positions`: which; None for all that there are.
    `targets`: the token followed through the layers: "final" (the last layer's most probable one,
    for each position), "next" (the one that stands there; none at the last position), an id, a
    text of one token, or ids [T] of the chosen positions. `top`: how many tokens of each cell.
    `softcap=False` leaves the final soft-cap out.

    Works in blocks: [R, T, V] is never held. KeyError where a layer that is needed was not
    captured; ValueError for arguments of a wrong kind, range or shape.
    """
    model = arguments.model_of(x, model, "logit_lens")
    run: Run | None = None
    found: Mapping[str, np.ndarray]
    if isinstance(x, Mapping):
        found = x
    else:
        run = arguments.recorded(x, model, _CAPTURE, positions)
        found = run.captured
    streams, last = _streams(found, model, layers)
    if not isinstance(top, int) or top < 1:
        raise ValueError(f"top is {quoted(top)}; expected 1 or more")
    if run is None:
        if positions is not None:
            raise ValueError(
                f"positions is {quoted(positions)}, but a mapping of arrays does not say which it "
                "holds; leave it out, and choose rows of the arrays"
            )
        rows = absolute = np.arange(len(last))
        tokens = [str(row) for row in rows]
        following = None
    else:
        name = f"layers.{model.config.text.num_hidden_layers - 1}.resid_post"
        rows = arguments.rows_of(run, name, positions)
        absolute = run.positions_of(name)[rows]
        tokens = arguments.tokens_at(run, absolute, model)
        following = np.append(run.prompt.ids[1:], -1)[absolute - run.positions[0]]
    wanted = _target_ids(targets, following, len(rows), model)
    cells = _Cells(len(streams), len(rows), min(top, model.config.text.vocab_size))
    step = max(1, _BLOCK_LOGITS // ((len(streams) + 1) * model.config.text.vocab_size))
    chosen = np.full(len(rows), -1, np.int64)
    with ProgressBar("logit lens", shown=len(streams) * len(rows) > _BAR_ROWS) as bar:
        for begin in range(0, len(rows), step):
            part = slice(begin, begin + step)
            block = np.stack([stream[rows[part]] for stream in [*streams.values(), last]])
            logits = model.unembed(block.reshape(-1, block.shape[-1]), softcap=softcap)
            logits = logits.reshape(*block.shape[:2], -1)
            final = logits[-1]
            chosen[part] = final.argmax(axis=1) if wanted is None else wanted[part]
            cells.fill(part, logits[:-1], final, chosen[part])
            bar.show(min(1.0, (begin + step) / len(rows)))
    return LogitLens(
        layers=np.array(list(streams)), positions=absolute, tokens=tokens, target_ids=chosen,
        logits=cells.logits, probs=cells.probs, ranks=cells.ranks, kl=cells.kl,
        entropy=cells.entropy, top_ids=cells.top_ids, top_probs=cells.top_probs, model=model,
    )  # fmt: skip


class _Cells:
    """The figures of every cell, filled block by block of positions."""

    def __init__(self, rows: int, columns: int, top: int) -> None:
        shape = (rows, columns)
        self.logits = np.full(shape, np.nan, np.float32)
        self.probs = np.full(shape, np.nan, np.float32)
        self.ranks = np.full(shape, -1, np.int64)
        self.kl = np.empty(shape, np.float32)
        self.entropy = np.empty(shape, np.float32)
        self.top_ids = np.empty((*shape, top), np.int64)
        self.top_probs = np.empty((*shape, top), np.float32)

    def fill(self, part: slice, logits: np.ndarray, final: np.ndarray, targets: np.ndarray) -> None:
        """`logits` [R, n, V], the last layer's `final` [n, V], `targets` [n]."""
        final_log_probs = final - distributions.log_sum_exp(final)[:, None]
        final_probs = np.exp(final_log_probs)
        has_target = targets >= 0
        for row, values in enumerate(logits):
            log_probs = values - distributions.log_sum_exp(values)[:, None]
            self.kl[row, part] = np.maximum(
                (final_probs * (final_log_probs - log_probs)).sum(axis=1), 0.0
            )
            self.entropy[row, part] = -(np.exp(log_probs) * log_probs).sum(axis=1)
            best = distributions.top_ids(values, self.top_ids.shape[-1])
            self.top_ids[row, part] = best
            self.top_probs[row, part] = np.exp(np.take_along_axis(log_probs, best, axis=1))
            own = np.take_along_axis(values, np.maximum(targets, 0)[:, None], axis=1)
            own_log_prob = np.take_along_axis(log_probs, np.maximum(targets, 0)[:, None], axis=1)
            self.logits[row, part] = np.where(has_target, own[:, 0], np.nan)
            self.probs[row, part] = np.where(has_target, np.exp(own_log_prob[:, 0]), np.nan)
            self.ranks[row, part] = np.where(has_target, (values > own).sum(axis=1), -1)


def _streams(
    found: Mapping[str, np.ndarray], model: Model, layers: Any
) -> tuple[dict[int, np.ndarray], np.ndarray]:
    """Returns {layer: [T, D]} and the last layer's [T, D]."""
    text = model.config.text
    last_name = f"layers.{text.num_hidden_layers - 1}.resid_post"
    names = {layer: f"layers.{layer}.resid_post" for layer in range(text.num_hidden_layers)}
    if layers is None:
        chosen = [layer for layer, name in names.items() if name in found]
        if "embed" in found:
            chosen.insert(0, -1)
    else:
        chosen = arguments.layer_numbers(layers, text.num_hidden_layers).tolist()
    streams = {}
    for layer in [*chosen, text.num_hidden_layers - 1]:
        name = "embed" if layer < 0 else names[layer]
        if name not in found:
            raise KeyError(
                f"logit_lens needs {quoted(name)}, which was not captured; the last layer is "
                f"needed always: run with capture={list(_CAPTURE)!r}"
            )
        stream = np.asarray(found[name], np.float32)
        expected = np.shape(found[last_name]) if last_name in found else stream.shape
        if stream.shape != expected or stream.ndim != 2 or stream.shape[1] != text.hidden_size:
            raise ValueError(
                f"{name} has shape {list(stream.shape)}; expected [T, {text.hidden_size}], the "
                "same T in all layers"
            )
        streams[layer] = stream
    last = streams[text.num_hidden_layers - 1]
    return {layer: streams[layer] for layer in chosen}, last


def _target_ids(
    targets: Any, following: np.ndarray | None, count: int, model: Model
) -> np.ndarray | None:
    """Returns int64 [count], or None for the last layer's own choice."""
    if isinstance(targets, str) and targets == "final":
        return None
    if isinstance(targets, str) and targets == "next":
        if following is None:
            raise ValueError('targets is "next", but a mapping of arrays has no ids; pass them')
        return following.astype(np.int64)
    if isinstance(targets, str) or np.ndim(targets) == 0:
        return np.full(count, arguments.token_id(targets, model), np.int64)
    if np.shape(targets) != (count,):
        raise ValueError(
            f"targets has shape {list(np.shape(targets))}; expected [{count}], an id for each "
            f"position, or {one_of(['final', 'next'])}, an id, a text of one token"
        )
    return np.array([arguments.token_id(token, model) for token in targets], np.int64)
