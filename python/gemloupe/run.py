"""One forward pass over a prompt: logits, captured activations, cache."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from gemloupe import _core, cache_edits, capturing, rerun
from gemloupe import routing as _routing
from gemloupe.adapters.selection import NO_ADAPTERS, Selection
from gemloupe.cache import KvCache, row_caches
from gemloupe.config import TextConfig
from gemloupe.errors import one_of
from gemloupe.media import Medium, audio_hooks, engine_input, vision_hooks
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
    """float32 [n, V], read-only, after the soft-cap: the rows that were asked for; or None."""
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

    @property
    def media(self) -> tuple[Medium, ...]:
        """The prompt's images, sounds and videos."""
        return self.prompt.media

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
            rows.append(("adapter", self.adapters.label))
        if self.logits is not None:
            rows.append(("logits", str(list(self.logits.shape))))
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
    logits: LogitsRows = "last",
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
    capture, tower_capture = vision_hooks.split_capture(capture)
    capture, sound_capture = vision_hooks.split_capture(capture, audio_hooks.PREFIX)
    hooked = capturing.Options(capture, routing, check_finite)
    collectors = _routing.collectors(model)
    if isinstance(x, Run):
        if cache is not None or keep:
            raise ValueError("a run is repeated with its own cache; leave out cache= and keep=")
        if adapter is not None:
            raise ValueError("a run is repeated under its own adapters; leave out adapter=")
        if any(value is not None for value in (images, audio, videos)):
            raise ValueError(
                "a run is repeated with its own media; leave out images=, audio=, videos="
            )
        if tower_capture or vision_hooks.split_edit(edit)[1]:
            raise ValueError("a repeated run encodes no image; run the prompt and image anew")
        if sound_capture or vision_hooks.split_edit(edit, audio_hooks.PREFIX)[1]:
            raise ValueError("a repeated run encodes no sound; run the prompt and sound anew")
        request = capturing.parse(hooked, edit, model.config.text, x.adapters)
        _check_logits(logits, request)
        repeated = _rerun(
            model,
            x,
            _RowOptions(0, None, logits, request, softcap_value(softcap), chunk, x.adapters),
        )
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
    requests, towers, sounds = [], [], []
    for of_row, adapters in zip(capturing.row_edits(edit, rows), selected, strict=True):
        of_text, of_tower = vision_hooks.split_edit(of_row)
        of_text, of_sound = vision_hooks.split_edit(of_text, audio_hooks.PREFIX)
        sounds.append(audio_hooks.AudioRequest(sound_capture, of_sound, check_finite))
        requests.append(capturing.parse(hooked, of_text, model.config.text, adapters))
        towers.append(vision_hooks.parse(model, tower_capture, of_tower, check_finite, adapters))
    _check_logits(logits, requests[0])
    cap = softcap_value(softcap)
    runs = []
    before = [(given, given.fork()) for given in caches if given is not None and batch]
    try:
        with cache_edits.forgotten_on_error(caches):
            for i, prepared in enumerate(prompts if batch else [prompts]):
                prompt = prepared.under(model.adapters.media(selected[i]))
                options = _RowOptions(
                    i, caches[i], logits, requests[i], cap, chunk, selected[i], keep, towers[i],
                    sounds[i],
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
    tower: vision_hooks.VisionRequest | None = None
    sounds: audio_hooks.AudioRequest | None = None


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
    seen = vision_hooks.Seen()
    if options.tower:
        assert model.vision is not None
        seen = vision_hooks.encode(model.vision, prompt, options.tower, text, options.row)
    heard = audio_hooks.Heard()
    if options.sounds:
        heard = audio_hooks.encode(model.audio_tower, prompt, options.sounds)
    soft_tokens = seen.soft_tokens | heard.soft_tokens
    media = engine_input(prompt.media, model.config, soft_tokens=soft_tokens)
    values = model.core.run(
        prompt.ids.tolist(), used.core, begin, end, bound.core if bound else None, options.cap,
        options.chunk, adapters=options.adapters.core, media=media,
    )  # fmt: skip
    captured, trace = capturing.Captured({}, {}, text), None
    if bound:
        captured, trace = bound.take(prompt.ids, lambda: prompt.tokens, joined=True)
    captured = captured.with_more(seen.arrays | heard.arrays, seen.positions | heard.positions)
    kept = None
    if options.keep:
        kept, captured = rerun.keep(captured, request, used, prompt)
    positions = np.arange(span.first, span.end)
    values = _of_slice(values, options.logits, text)
    return Run(
        prompt, values, captured, used, positions, request.skipped, trace, kept, model,
        options.adapters,
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
    layer, position = rerun.reach(bound, model, span, span.first + begin)
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
    )  # fmt: skip
    captured, trace = bound.take(ids, lambda: prompt.tokens[skipped:], joined=True)
    positions = np.arange(span.first, span.end)
    values = _of_slice(values, options.logits, text)
    return Run(
        prompt, values, captured, used, positions, request.skipped, trace, None, model,
        options.adapters,
    )  # fmt: skip


def _of_slice(values: np.ndarray | None, logits: LogitsRows, config: TextConfig) -> Any:
    """A slice without rows has logits, none of them; the engine gives None."""
    if values is not None or logits is None:
        return values
    return np.zeros((0, config.vocab_size), np.float32)


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
