"""One forward pass over a prompt: logits, captured activations, cache."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from gemloupe import _core, cache_edits, capturing, override, rerun, token_scores
from gemloupe import routing as _routing
from gemloupe.adapters.selection import NO_ADAPTERS, Selection
from gemloupe.cache import KvCache, row_caches
from gemloupe.errors import one_of
from gemloupe.media import Media, engine_input, tower_hooks
from gemloupe.positions import Span
from gemloupe.prompt import Prompt, is_batch
from gemloupe.router_trace import RouterTrace
from gemloupe.sampling import softcap_value
from gemloupe.table import facts_html

if TYPE_CHECKING:
    from gemloupe.model import Model

LogitsRows = str | slice | None


@dataclass(eq=False)
class Run:
    """What a pass gave. `run["layers.3.resid_post"]` is a captured activation."""

    prompt: Prompt
    logits: np.ndarray | None
    """float32 [n, V], read-only, after the soft-cap: the rows that were asked for; or None. With
    `vocab=` [n, len(vocab)]: these columns, in the order given."""
    captured: capturing.Captured
    """name -> float32 [T, …], read-only."""
    cache: KvCache
    """The KV cache after the pass, whole with logits=None too: only layers that store nothing are
    left out then."""
    positions: np.ndarray
    """int64 [T]: the absolute position of each row."""
    skipped: tuple[str, ...] = field(default=())
    """Points of a pattern that their layers don't have."""
    routing: RouterTrace | None = None
    """The routers' choices; None for a dense model and with routing=False."""
    kept: rerun.Kept | None = field(default=None, repr=False)
    """What `model.run(this_run, edit=…)` begins from, with keep=True."""
    model: Model | None = field(default=None, repr=False)
    """The model that ran."""
    adapters: Selection = NO_ADAPTERS
    """The adapters that it ran under, with their weights; `adapters.label` names them."""
    logprobs: np.ndarray | None = None
    """float32 [T], with `targets=`: ln p of each row's target, after the soft-cap; nan where a row
    has none."""
    entropy: np.ndarray | None = None
    """float32 [T], in nats, with `targets=`: −Σ p ln p of what each row predicts."""

    @property
    def media(self) -> Media:
        """The prompt's images, sounds and videos; `media.at(position)` says what stands there."""
        return Media(self.prompt.media)

    def __getstate__(self) -> dict[str, Any]:
        # Results travel between processes; the model, its cache and what is kept beside it do not.
        return {**self.__dict__, "model": None, "cache": None, "kept": None}

    def __getitem__(self, name: str) -> Any:
        return self.captured[name]

    def positions_of(self, name: str) -> np.ndarray:
        """The absolute positions of the rows that were captured at a point."""
        return self.captured.positions_of(name)

    def _ipython_key_completions_(self) -> list[str]:
        return list(self.captured)

    def _rows(self) -> list[tuple[str, str]]:
        rows = [("tokens", str(len(self.prompt)))]
        if self.adapters:
            named = self.adapters.adapters or self.adapters.left_behind
            rows.append(("adapter" if named else "weights", self.adapters.label))
        if self.logits is not None:
            rows.append(("logits", str(list(self.logits.shape))))
        if self.logprobs is not None:
            rows.append(("logprobs, entropy", str(list(self.logprobs.shape))))
        rows += [(name, _shape_text(value)) for name, value in list(self.captured.items())[:12]]
        if len(self.captured) > 12:
            rows.append(("…", f"{len(self.captured)} captured in all"))
        return rows

    def __repr__(self) -> str:
        rows = self._rows()
        width = max(len(name) for name, _ in rows)
        return "Run\n" + "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)

    def _repr_html_(self) -> str:
        return facts_html("Run", self._rows())


def _shape_text(value: Any) -> str:
    return f"{len(value)} passes" if isinstance(value, list) else str(list(value.shape))


def run(
    model: Model,
    x: Any,
    *,
    cache: KvCache | Sequence[KvCache | None] | None = None,
    capture: str | Iterable[str] | Mapping[str, Any] = (),
    edit: Any = None,
    logits: LogitsRows | list[LogitsRows] = "last",
    vocab: Sequence[int] | None = None,
    targets: Any = None,
    softcap: float | str | None = "config",
    routing: str | bool | None = None,
    thinking: bool = False,
    bos: bool | str = "auto",
    chunk: int = _core.DEFAULT_CHUNK,
    check_finite: bool = False,
    keep: bool = False,
    adapter: Any = None,
    images: Any = None,
    audio: Any = None,
    videos: Any = None,
    max_soft_tokens: Any = None,
) -> Run | list[Run]:
    batch = is_batch(x)
    rows = len(x) if batch else None
    if routing is None:  # A trace of all layers would make a repeated run begin at the first.
        routing = False if isinstance(x, Run) else "full"
    capture, of_towers = tower_hooks.split_capture(capture)
    hooked = capturing.Options(capture, routing, check_finite)
    collectors = _routing.collectors(model)
    if isinstance(x, Run):
        if cache is not None or keep:
            raise ValueError("a run is repeated with its own cache; leave out cache= and keep=")
        if adapter is not None:
            raise ValueError("a run is repeated under its own adapters; leave out adapter=")
        if x.adapters.overridden != override.label(model):
            own = "the model's own"
            raise ValueError(
                f"this run's weights were {x.adapters.overridden or own}, and now they are "
                f"{override.label(model) or own}; run its prompt anew"
            )
        if any(value is not None for value in (images, audio, videos)):
            raise ValueError(
                "a run is repeated with its own media; leave out images=, audio=, videos="
            )
        if of_towers.vision or of_towers.audio or tower_hooks.has_edits(edit):
            raise ValueError(
                "a repeated run encodes no image and no sound; run the prompt and its media anew"
            )
        request = capturing.parse(hooked, edit, model.config.text, x.adapters)
        [logits] = _row_logits(logits, None)
        _check_logits(logits, request)
        reading = token_scores.parse(vocab, [targets], [x.prompt], model.config, logits)[0]
        cap = softcap_value(softcap)
        options = _RowOptions(0, None, logits, request, cap, chunk, x.adapters, reading=reading)
        repeated = _rerun(model, x, options)
        _routing.count([repeated.routing], collectors)
        return repeated
    caches = row_caches(cache, rows)
    selected = model.adapters.rows(adapter, rows)
    if isinstance(chunk, bool) or not isinstance(chunk, int) or not 1 <= chunk <= 2**30:
        raise ValueError(f"chunk is {chunk!r}; expected a number of tokens, 1 or more")
    continued = any(given is not None and given.length > 0 for given in caches)
    prompts = model.prepare(
        x,
        thinking=thinking,
        bos=False if continued and bos == "auto" else bos,
        images=images,
        audio=audio,
        videos=videos,
        max_soft_tokens=max_soft_tokens,
    )
    requests, towers = [], []
    for of_row, adapters in zip(capturing.row_edits(edit, rows), selected, strict=True):
        of_text, of_row_towers = tower_hooks.parse(model, of_towers, of_row, check_finite, adapters)
        requests.append(capturing.parse(hooked, of_text, model.config.text, adapters))
        towers.append(of_row_towers)
    shown = _row_logits(logits, rows)
    for of_row, request in zip(shown, requests, strict=True):
        _check_logits(of_row, request)
    rows_of = prompts if batch else [prompts]
    wanted = token_scores.per_row(targets, rows)
    has_logits = next((of_row for of_row in shown if of_row is not None), None)
    readings = token_scores.parse(vocab, wanted, rows_of, model.config, has_logits)
    cap = softcap_value(softcap)
    runs = []
    before = [(given, given.fork()) for given in caches if given is not None and batch]
    try:
        with cache_edits.forgotten_on_error(caches):
            for i, prepared in enumerate(rows_of):
                prompt = prepared.under(model.adapters.media(selected[i]))
                options = _RowOptions(
                    i, caches[i], shown[i], requests[i], cap, chunk, selected[i], keep, towers[i],
                    readings[i],
                )  # fmt: skip
                runs.append(_run_row(model, prompt, options))
    except BaseException:
        for given, fork in before:  # rows that had succeeded: the call raises as a whole
            given.core.restore(fork.core)
        raise
    _routing.count([one.routing for one in runs], collectors)
    return runs if batch else runs[0]


@dataclass(frozen=True)
class _RowOptions:
    row: int
    cache: KvCache | None
    logits: LogitsRows
    request: capturing.Request
    cap: float | None
    chunk: int
    adapters: Selection
    keep: bool = False
    towers: tower_hooks.TowerRequest | None = None
    reading: token_scores.Reading = token_scores.Reading()


def _row_logits(logits: LogitsRows | list[LogitsRows], rows: int | None) -> list[LogitsRows]:
    """`logits` of each row; ValueError for a list of another length."""
    if not isinstance(logits, list):
        return [logits] * (1 if rows is None else rows)
    if rows is None:
        raise ValueError(f"logits is {logits!r}, but x is one prompt; expected a list in a batch")
    if len(logits) != rows:
        raise ValueError(f"logits has {len(logits)} entries; expected one for each of {rows} rows")
    return logits


def _check_logits(logits: LogitsRows, request: capturing.Request) -> None:
    heads = [name for name in request.asked if name.startswith("logits")]
    if logits is None and heads:
        raise ValueError(
            f'capture has {one_of(heads)}, but logits is None; expected "last", "all" or a slice: '
            "only the rows that it asks for have logits"
        )


def _run_row(model: Model, prompt: Prompt, options: _RowOptions) -> Run:
    text = model.config.text
    used = options.cache
    if used is None:
        used = model.new_cache(sliding="full" if options.keep else "ring")
    span = Span(prompt, used.length)
    request = rerun.with_residuals(options.request, text) if options.keep else options.request
    begin, end = logits_rows(options.logits, len(prompt))
    bound = None
    if request:
        capturing.check_memory(request, text, span, 0, options.chunk)
        bound = capturing.BoundHooks(request, text, span, options.row)
        bound.core.expected_rows = len(prompt)
    used.note_adapter(options.adapters.label)
    cache_edits.note(used, request)
    inside = tower_hooks.Inside()
    if options.towers:
        inside = tower_hooks.encode(model, prompt, options.towers, options.row)
        cache_edits.note_towers(used, options.towers)
    media = engine_input(prompt.media, model.config, soft_tokens=inside.soft_tokens)
    values = model.core.run(
        prompt.ids.tolist(), used.core, begin, end, bound.core if bound else None, options.cap,
        options.chunk, adapters=options.adapters.core, media=media,
        vocab=options.reading.vocab or (), scores=(scores := options.reading.scores()),
    )  # fmt: skip
    captured, trace = capturing.Captured({}, {}, text), None
    if bound:
        captured, trace = bound.take(prompt.ids, lambda: prompt.tokens, joined=True)
    captured = inside.captured(captured, text)
    kept = None
    if options.keep:
        kept, captured = rerun.keep(captured, request, used, prompt)
    positions = np.arange(span.first, span.end)
    values = options.reading.columns(values, options.logits, end - begin)
    return Run(
        prompt, values, captured, used, positions, request.skipped, trace, kept, model,
        options.adapters, *token_scores.values(scores),
    )  # fmt: skip


def _rerun(model: Model, earlier: Run, options: _RowOptions) -> Run:
    if earlier.kept is None:
        raise ValueError(
            "this run kept nothing to begin from; make it with model.run(x, keep=True)"
        )
    text = model.config.text
    kept, prompt, request = earlier.kept, earlier.prompt, options.request
    span = Span(prompt, kept.first)
    begin, end = logits_rows(options.logits, len(prompt))
    capturing.check_memory(request, text, span, 0, options.chunk)
    bound = capturing.BoundHooks(request, text, span, 0)
    first = 0 if options.reading.targets is not None else begin  # Every row is scored.
    layer, position = rerun.reach(bound, model, span, span.first + first)
    skipped = position - span.first
    used = kept.cache.fork()
    used.core.rewind(position)
    ids = prompt.ids[skipped:]
    bound.core.expected_rows = len(ids)
    cache_edits.note(used, request)
    values = model.core.run(
        ids.tolist(), used.core, max(0, begin - skipped), max(0, end - skipped), bound.core,
        options.cap, options.chunk, layer, kept.residuals[layer][skipped:] if layer else None,
        adapters=options.adapters.core, media=engine_input(prompt.media, model.config, skipped),
        vocab=options.reading.vocab or (), scores=(scores := options.reading.scores()),
    )  # fmt: skip
    captured, trace = bound.take(ids, lambda: prompt.tokens[skipped:], joined=True)
    positions = np.arange(span.first, span.end)
    values = options.reading.columns(values, options.logits, end - begin)
    return Run(
        prompt, values, captured, used, positions, request.skipped, trace, None, model,
        options.adapters, *token_scores.values(scores),
    )  # fmt: skip


def logits_rows(logits: LogitsRows, count: int) -> tuple[int, int]:
    """The rows [begin, end) of `count` that have logits; ValueError for what is no `logits`."""
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
