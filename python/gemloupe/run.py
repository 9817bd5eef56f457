"""One forward pass over a prompt: logits, captured activations, cache."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from gemloupe import _core, hooks
from gemloupe.cache import KvCache, row_caches
from gemloupe.config import TextConfig
from gemloupe.errors import did_you_mean, one_of, quoted
from gemloupe.prompt import Prompt, is_batch
from gemloupe.sampling import softcap_value

if TYPE_CHECKING:
    from gemloupe.model import Model

LogitsRows = str | slice | None


@dataclass(eq=False)
class Run:
    """What a pass gave. `run["layers.3.resid_post"]` is a captured activation."""

    prompt: Prompt
    logits: np.ndarray | None
    """float32 [n, V], read-only, after the soft-cap: the rows that were asked for; or None."""
    captured: Mapping[str, np.ndarray]
    """name -> float32 [T, …], read-only."""
    cache: KvCache
    """The KV cache after the pass."""
    positions: np.ndarray
    """int64 [T]: the absolute position of each row."""
    skipped: tuple[str, ...] = field(default=())
    """Points of a pattern that their layers don't have."""

    def __getitem__(self, name: str) -> np.ndarray:
        try:
            return self.captured[name]
        except KeyError:
            hint = did_you_mean(name, self.captured)
            raise KeyError(f"{quoted(name)} was not captured. {hint}".rstrip()) from None

    def _ipython_key_completions_(self) -> list[str]:
        return list(self.captured)

    def __repr__(self) -> str:
        rows = [("tokens", str(len(self.prompt)))]
        if self.logits is not None:
            rows.append(("logits", str(list(self.logits.shape))))
        rows += [(name, str(list(array.shape))) for name, array in list(self.captured.items())[:12]]
        if len(self.captured) > 12:
            rows.append(("…", f"{len(self.captured)} captured in all"))
        width = max(len(name) for name, _ in rows)
        return "Run\n" + "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def run(
    model: Model,
    x: Any,
    *,
    cache: KvCache | Sequence[KvCache | None] | None = None,
    capture: str | Iterable[str] = (),
    logits: LogitsRows = "last",
    softcap: float | str | None = "config",
    thinking: bool = False,
    bos: bool | str = "auto",
    chunk: int = _core.DEFAULT_CHUNK,
) -> Run | list[Run]:
    batch = is_batch(x)
    caches = row_caches(cache, len(x) if batch else None)
    if isinstance(chunk, bool) or not isinstance(chunk, int) or not 1 <= chunk <= 2**30:
        raise ValueError(f"chunk is {chunk!r}; expected a number of tokens, 1 or more")
    continued = any(given is not None and given.length > 0 for given in caches)
    prompts = model.prepare(x, thinking=thinking, bos=False if continued and bos == "auto" else bos)
    points, skipped = hooks.select(capture, model.config.text) if capture else ([], [])
    if logits is None and (heads := [p.name for p in points if p.name.startswith("logits")]):
        raise ValueError(
            f'capture has {one_of(heads)}, but logits is None; expected "last", "all" or a slice: '
            "only the rows that it asks for have logits"
        )
    cap = softcap_value(softcap)
    runs = []
    before = [(given, given.fork()) for given in caches if given is not None and batch]
    try:
        for prompt, given in zip(prompts if batch else [prompts], caches, strict=True):
            runs.append(_run_row(model, prompt, given, logits, points, skipped, cap, chunk))
    except BaseException:
        for given, fork in before:  # rows that had succeeded: the call raises as a whole
            given.core.restore(fork.core)
        raise
    return runs if batch else runs[0]


def _run_row(
    model: Model,
    prompt: Prompt,
    given: KvCache | None,
    logits: LogitsRows,
    points: Sequence[hooks.HookPoint],
    skipped: Sequence[str],
    cap: float | None,
    chunk: int,
) -> Run:
    used = given if given is not None else model.new_cache()
    first = used.length
    begin, end = _logits_rows(logits, len(prompt))
    wanted = [(point.index, point.layer) for point in points]
    values, captured = model.core.run(
        prompt.ids.tolist(), used.core, begin, end, wanted, cap, chunk
    )
    text = model.config.text
    shaped = {point.name: _shaped(captured[point.name], point, text) for point in points}
    positions = np.arange(first, first + len(prompt))
    return Run(prompt, values, shaped, used, positions, tuple(skipped))


def _logits_rows(logits: LogitsRows, count: int) -> tuple[int, int]:
    if logits is None:
        return 0, 0
    if isinstance(logits, slice):
        begin, end, step = logits.indices(count)
        if step != 1:
            raise ValueError(f"logits is {logits!r}; expected a slice with step 1")
        return begin, max(begin, end)
    if logits == "last":
        return count - 1, count
    if logits == "all":
        return 0, count
    raise ValueError(f'logits is {logits!r}; expected "last", "all", None or a slice')


def _shaped(array: np.ndarray, point: hooks.HookPoint, config: TextConfig) -> np.ndarray:
    """Gives captured rows [T, columns] the shape of their hook point."""
    per_layer = config.hidden_size_per_layer_input
    sizes = {"T": len(array), "L": config.num_hidden_layers, "P": per_layer}
    if point.layer >= 0:
        sizes["H"] = config.layers[point.layer].head_dim
    letters = point.shape.strip("[]").split(", ")
    shaped = array.reshape([sizes.get(letter, -1) for letter in letters])
    if point.name.endswith("router.experts"):
        shaped = shaped.astype(np.int32)
        shaped.flags.writeable = False
    return shaped
