"""`model.generate`: prompts and options in, outputs or a stream of pieces out.

Each step asks the C++ session for one pass over the rows; it samples there. This module decodes
the tokens, looks for stop strings and ends rows.
"""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from gemloupe import _core, cache_edits, capturing
from gemloupe import routing as _routing
from gemloupe.adapters.selection import Selection
from gemloupe.answer import AnswerReader, Part
from gemloupe.cache import row_caches
from gemloupe.drafter import DraftCounts, Drafter, PromptLookup
from gemloupe.guide import AnswerForm, RequiredCall, RowGuide, ThoughtBudget, answer_ends
from gemloupe.media import Reader, engine_input, media_parts, tower_hooks
from gemloupe.output import Output, Timings, TokenLogprobs
from gemloupe.positions import Span
from gemloupe.prefix_cache import PrefixCache, Reading, RowPrefixes
from gemloupe.prompt import Prompt, is_batch, prepare
from gemloupe.sampling import RowOptions, resolve_rows, softcap_value
from gemloupe.stream import Piece, Stream
from gemloupe.structured import compiler, parse_response_format
from gemloupe.tokenizer import Tokenizer
from gemloupe.tool_rounds import check_template, next_prompt
from gemloupe.tools import (
    Tool,
    ToolChoice,
    can_run,
    parse_tools,
    read_tool_choice,
    run_tools,
)

if TYPE_CHECKING:
    from gemloupe.adapters.registry import Adapters
    from gemloupe.config import ModelConfig
    from gemloupe.media.audio_tower import AudioTower
    from gemloupe.media.vision import Vision

# A prompt shorter than this is read in a few seconds at most; no bar is shown.
_BAR_TOKENS = 2048
# What separates the seeds of a row's rounds: 2^64 divided by the golden ratio.
_ROUND_SEED = 0x9E3779B97F4A7C15
# Arguments that `sampling.resolve_rows` reads.
_ROW_ARGUMENTS = (
    "max_new_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "seed",
    "stop",
    "logprobs",
    "prompt_logprobs",
    "max_thinking_tokens",
)


class GenerationModel(Protocol):
    """What this module needs of a model."""

    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def config(self) -> ModelConfig: ...
    @property
    def generation_config(self) -> Mapping[str, Any]: ...
    @property
    def media_reader(self) -> Reader: ...
    def new_session(self) -> Any:
        """Returns a `_core.Session` on the model's weights."""

    def new_request(self) -> Any:
        """Returns an empty `_core.RowRequest`."""

    def new_mask(self, vocab_size: int) -> Any:
        """Returns a `_core.TokenMask`."""

    def core_cache(self, cache: Any) -> Any:
        """Returns the `_core.KvCache` inside a cache that the caller passed."""

    def wrap_cache(self, core_cache: Any) -> Any:
        """Returns the cache that the caller gets for a `_core.KvCache`."""

    @property
    def vision(self) -> Vision | None: ...
    @property
    def audio_tower(self) -> AudioTower: ...
    @property
    def adapters(self) -> Adapters: ...

    def drafter(self, drafter: Any) -> Drafter | PromptLookup:
        """Returns what a call's `drafter` stands for."""


def generate(
    model: GenerationModel,
    x: Any,
    *,
    max_new_tokens: int | Sequence[int] = 256,
    temperature: float | Sequence[float | None] | None = None,
    top_p: float | Sequence[float | None] | None = None,
    top_k: int | Sequence[int | None] | None = None,
    min_p: float | Sequence[float | None] | None = None,
    repetition_penalty: float | Sequence[float | None] | None = None,
    seed: int | Sequence[int | None] | None = None,
    stop: Any = (),
    logprobs: int | Sequence[int] = 0,
    prompt_logprobs: int | Sequence[int] = 0,
    adapter: Any = None,
    cache: Any = None,
    capture: Any = (),
    edit: Any = None,
    routing: Any = "experts",
    softcap: Any = "config",
    thinking: bool = False,
    max_thinking_tokens: int | Sequence[int | None] | None = None,
    tools: Sequence[Any] | None = None,
    tool_choice: Any = "auto",
    max_tool_rounds: int = 4,
    response_format: Any = None,
    images: Any = None,
    audio: Any = None,
    videos: Any = None,
    max_soft_tokens: Any = None,
    drafter: Any = None,
    prefix_cache: PrefixCache | None = None,
    bos: bool | str = "auto",
    check_finite: bool = False,
    stream: bool = False,
) -> Output | list[Output] | Stream:
    """Continues `x` (see `prompt.prepare`); an `Output`, a list of them for a batch, or a `Stream`.

    `thinking` lets the model think first (`out.reasoning`); `max_thinking_tokens` ends thoughts
    that get longer, as the model would end them. `tools`: functions with type hints, or JSON
    schemas. Calls come as `out.tool_calls`; where all of them are of functions, these are run one
    after the other, in this thread and at most `max_tool_rounds` times, and the model goes on with
    what they return or raise: `out` is then the last round, `out.rounds` has those before, and
    `out.messages` all of them for a history. Every round may have `max_new_tokens` tokens;
    captures and edits act in each, at positions that count from `x`.
    `tool_choice`: "auto", "none", "required" (the first round calls one) or {"type": "function",
    "function": {"name": …}} (it calls this one).
    `response_format` makes the answer, not thoughts and calls, follow a JSON schema, "json",
    {"regex": text}, {"grammar": Lark}, or {"choices": [text, …]} (needs gemloupe[structured]; see
    gl.help("chat")).

    Sampling arguments left None come from generation_config.json, else 1.0 / 0.95 / 64;
    temperature=0 is greedy. One seed gives one text, alone or in a batch. `stop`: strings and ids;
    strings are looked for in the answer, not in the thought. `logprobs=n` reports each token's
    log-probability and the n most likely ids', 0 nothing. With `cache`, `x` is appended to it and
    gets no BOS. In a batch each of these may be a list, one value a row. `softcap`: "config", a
    number, or None for uncapped logits. Fewer tokens come where the context ends.

    `routing`: "experts" gives `out.routing` the experts and their weights, "full" logits and
    probabilities too, False nothing (None for a dense model).
    `capture` and `edit` as in `model.run`: they act on the prompt and on every generated token.
    `out.captured[name]` covers both ([prompt + new − 1, …]; the last token is never read); scores,
    patterns, keys and values are lists with one array a pass (keys and values: the prompt's passes
    are one). Points of the towers ("vision.…", "audio.…") act once, when the prompt's media are
    encoded; after tool calls their captures are those of the first round, `out.rounds[0]`.
    `adapter` as in `model.run`; caches remember which adapters their entries come from.
    `drafter`: what `model.load_drafter` gave, the path or hub id of such a checkpoint, or
    "prompt-lookup" (or a `gl.PromptLookup`), which repeats what followed the same tokens before. It
    guesses tokens, a pass of the model then checks them together: the same tokens come, sooner;
    `out.drafts` counts them. Rows with edits, captures of patterns, scores, keys, values or means,
    stop strings, grammars or thinking budgets, and batches of more than four rows, go without.
    `prefix_cache`: what `model.prefix_cache` made. Prompts go on from the longest beginning that it
    holds and are stored in it; `out.timings.cached_tokens` says how much. Every position that a
    capture, router trace, edit or prompt_logprobs is about is computed, and of rows with edits
    nothing is stored. Not together with `cache`.
    """
    arguments = {**locals()}
    rows = make_rows(arguments.pop("model"), arguments.pop("x"), arguments)
    generation = Generation(model, rows, stream)
    result = Stream(generation, is_batch(x))
    return result if stream else result.result


def make_rows(model: GenerationModel, x: Any, arguments: Mapping[str, Any]) -> list[Row]:
    """The rows of a call with `generate`'s arguments (those left out have its defaults).

    Nothing is computed or held by the engine yet; a `Generation` takes them.
    """
    given = {**_DEFAULTS, **arguments}
    started = time.perf_counter()
    batch = is_batch(x)
    caches = row_caches(given["cache"], len(x) if batch else None)
    continued = any(cache is not None and cache.length > 0 for cache in caches)
    prepared = prepare(
        x,
        model.tokenizer,
        model.config,
        thinking=given["thinking"],
        tools=None if given["tool_choice"] == "none" else given["tools"],
        bos=False if continued and given["bos"] == "auto" else given["bos"],
        images=given["images"],
        audio=given["audio"],
        videos=given["videos"],
        max_soft_tokens=given["max_soft_tokens"],
        reader=model.media_reader,
    )
    prompts = prepared if isinstance(prepared, list) else [prepared]
    options = resolve_rows(
        {name: given[name] for name in _ROW_ARGUMENTS},
        len(prompts) if batch else None,
        model.generation_config,
        model.config.eos_token_ids,
        model.config.text.vocab_size,
    )
    finite = given["check_finite"]
    capture, of_towers = tower_hooks.split_capture(given["capture"])
    hooked = capturing.Options(capture, given["routing"], finite)
    selected = model.adapters.rows(given["adapter"], len(prompts) if batch else None)
    prompts = [
        prompt.under(model.adapters.media(adapters))
        for prompt, adapters in zip(prompts, selected, strict=True)
    ]
    row_edits = capturing.row_edits(given["edit"], len(prompts) if batch else None)
    requests, towers = [], []
    for of_row, adapters in zip(row_edits, selected, strict=True):
        of_text, of_row_towers = tower_hooks.parse(model, of_towers, of_row, finite, adapters)
        requests.append(capturing.parse(hooked, of_text, model.config.text, adapters))
        towers.append(of_row_towers)
    tools = parse_tools(None if given["tool_choice"] == "none" else given["tools"])
    rounds = given["max_tool_rounds"]
    row_tools = [_row_tools(prompt, tools, rounds) for prompt in prompts]
    softcap = softcap_value(given["softcap"])
    choice = read_tool_choice(given["tool_choice"], tools)
    drafter = None if given["drafter"] is None else model.drafter(given["drafter"])
    guides = _guides(model, prompts, options, given["response_format"], batch, choice)
    rows = [
        Row(prompt, of_row, cache, started, request, adapters, guide, can_call, rounds, softcap)
        for prompt, of_row, cache, request, adapters, guide, can_call in zip(
            prompts, options, caches, requests, selected, guides, row_tools, strict=True
        )
    ]
    prefixes = _check_prefixes(model, given["prefix_cache"], given["cache"])
    for row, of_row_towers in zip(rows, towers, strict=True):
        row.drafter, row.towers = drafter, of_row_towers
        if prefixes is not None:
            row.prefixes = RowPrefixes(prefixes, row.prompt)
    return rows


def _check_prefixes(model: GenerationModel, prefixes: Any, cache: Any) -> PrefixCache | None:
    if prefixes is None:
        return None
    if not isinstance(prefixes, PrefixCache):
        raise TypeError(
            f"prefix_cache is a {type(prefixes).__name__}; expected what model.prefix_cache made"
        )
    if prefixes.model is not model:
        raise ValueError("the prefix cache is of another model; make one with model.prefix_cache")
    if cache is not None:
        raise ValueError("a row goes on from cache= or from a prefix cache; leave one of them out")
    return prefixes


_DEFAULTS = {name: each.default for name, each in inspect.signature(generate).parameters.items()}


def chat(
    model: GenerationModel, message: str | Sequence[Mapping[str, Any]], **arguments: Any
) -> Output | list[Output] | Stream:
    """Answers one user message, or a list of messages, with `generate`'s arguments.

    Images, sounds and videos of a message that is a str stand before its text.
    """
    if isinstance(message, str):
        parts = media_parts(arguments)
        content = [*parts, {"type": "text", "text": message}] if parts else message
        message = [{"role": "user", "content": content}]
    return generate(model, message, **arguments)


def _row_tools(prompt: Prompt, given: list[Tool] | None, max_rounds: Any) -> list[Tool]:
    """The tools of a row, whose functions may be run; checks that results can be fed back."""
    if isinstance(max_rounds, bool) or not isinstance(max_rounds, int) or max_rounds < 0:
        raise ValueError(f"max_tool_rounds is {max_rounds!r}; expected 0 or more")
    if given and not prompt.tools:
        raise ValueError(
            "tools= comes with a prompt that was prepared without; pass them to model.prepare"
        )
    tools = given or list(prompt.tools)
    if max_rounds and any(tool.function for tool in tools):
        check_template(prompt)
    return tools


def _guides(
    model: GenerationModel,
    prompts: Sequence[Prompt],
    options: Sequence[RowOptions],
    response_format: Any,
    batch: bool,
    tool_choice: ToolChoice = None,
) -> list[RowGuide | None]:
    """What each row's next tokens must obey; None where that is nothing."""
    formats = [response_format] * len(prompts)
    if isinstance(response_format, (list, tuple)):
        if not batch or len(response_format) != len(prompts):
            raise ValueError(
                f"response_format is a list of {len(response_format)}, which gives one value a row "
                f"of a batch; x has {len(prompts) if batch else 1}: pass one value, or one a row"
            )
        formats = list(response_format)
    grammars = [parse_response_format(each) for each in formats]
    limited = [of_row.max_thinking_tokens is not None for of_row in options]
    if not any(limited) and not any(grammars) and tool_choice is None:
        return [None] * len(prompts)
    vocab_size = model.config.text.vocab_size
    # A thread for every row would only queue for the same cores.
    workers = ThreadPoolExecutor(min(len(prompts), 4), "gemloupe-mask")
    matchers: dict[Any, Any] = {}
    guides: list[RowGuide | None] = []
    for prompt, of_row, grammar in zip(prompts, options, grammars, strict=True):
        form = None
        forcing: list[ThoughtBudget | RequiredCall] = []
        tokenizer = prompt.tokenizer
        if grammar is not None:
            ends = answer_ends(tokenizer, of_row.end_ids)
            key = (grammar.source, ends)
            if key not in matchers:
                matchers[key] = compiler(tokenizer, vocab_size, ends).compile(grammar)
            form = AnswerForm(
                tokenizer,
                matchers[key],
                of_row.end_ids,
                thinking=prompt.thinking,
                tools=bool(prompt.tools),
            )
        if of_row.max_thinking_tokens is not None:
            forcing.append(ThoughtBudget(tokenizer, of_row.max_thinking_tokens))
        if tool_choice is not None:
            forcing.append(RequiredCall(tokenizer, tool_choice.name, prompt.thinking))
        if form is None and not forcing:
            guides.append(None)
            continue
        mask = model.new_mask(vocab_size)
        guides.append(RowGuide(mask, forcing, form, of_row.sampling.suppress, workers))
    return guides


class Row:
    """One row while it is generated."""

    def __init__(
        self,
        prompt: Prompt,
        options: RowOptions,
        cache: Any,
        started: float,
        request: capturing.Request,
        adapters: Selection,
        guide: RowGuide | None,
        tools: list[Tool],
        max_rounds: int,
        softcap: float | None,
    ) -> None:
        self.guide = guide
        self.softcap = softcap
        self.drafter: Drafter | PromptLookup | None = None
        self.streams_experts = False
        """Whether its pieces say which experts read the tokens (`Piece.experts`)."""
        self.towers: tower_hooks.TowerRequest | None = None
        # What the towers gave for this round's media.
        self.inside = tower_hooks.Inside()
        self.prefixes: RowPrefixes | None = None
        self.reading: Reading | None = None
        """What a prefix cache does for the row, in its first round."""
        self.begun = False
        """Whether a pass has read something of the prompt."""
        self.number = -1
        """The session's number of the row, of its present round."""
        self.tools = tools
        self.max_rounds = max_rounds
        # Whether calls of this round are to be run: the row is between two rows of the session.
        self.must_run = False
        self.rounds: list[Output] = []
        self.cached_ids = np.array([], np.int32) if cache is None else _tokens(cache)
        self.prompt = prompt
        self.options = options
        self.cache = cache
        self.started = started
        self.request = request
        self.adapters = adapters
        # Positions are resolved once: later rounds keep the span of the first prompt.
        self.span: Span | None = None
        self.hooks: capturing.BoundHooks | None = None
        self.ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: list[TokenLogprobs | None] = [None]
        self.finish_reason = ""
        self.timings = Timings(prefill_tokens=len(prompt))
        self.reader: AnswerReader | None = None

    def look_up(self, longer_than: int | None = None) -> Reading:
        """What the row's prefix cache holds of the prompt now."""
        assert self.prefixes is not None
        logprobs = bool(self.options.prompt_logprobs)
        return self.prefixes.look_up(self.adapters, self.hooks, logprobs, longer_than)

    def read_from(self, reading: Reading) -> None:
        """Makes the prompt be read from where `reading` says."""
        self.reading = reading
        self.timings.cached_tokens = reading.length
        self.timings.prefill_tokens = len(self.prompt) - reading.length
        if self.hooks is not None:
            self.hooks.passes.skipped = reading.passes

    def read_text(self) -> None:
        """Makes each token be decoded as it comes; without, only `Output.text` decodes."""
        ids = np.concatenate([self.cached_ids, self.prompt.ids])
        schemas = [tool.schema for tool in self.prompt.tools]
        stops = self.options.stop_strings
        self.reader = AnswerReader(self.prompt.tokenizer, ids, stops, schemas)

    def take(self, result: Any, seconds: float) -> Piece | None:
        """Takes what a step did to this row; returns a piece if that was a token."""
        if self.ids:
            self.timings.decode_seconds += seconds
        else:
            self.timings.prefill_seconds += seconds
        if result.token < 0:
            return None
        if not self.ids:
            self.timings.time_to_first_token = time.perf_counter() - self.started
            self.prompt_logprobs += [_logprobs(entry) for entry in result.prompt_logprobs or ()]
        else:
            self.timings.decode_tokens += 1
        self.ids.append(result.token)
        logprobs = None
        if self.options.logprobs:
            logprobs = [_logprobs(result.logprobs)]
            self.logprobs += logprobs
        part = self.reader.push(result.token) if self.reader else Part()
        self.finish_reason = "stop" if part.stopped else result.finish_reason
        if self.finish_reason and self.reader and not part.stopped:
            part = self._with_rest(part)
        if self.waits_for_results:
            self.must_run = len(self.rounds) < self.max_rounds and can_run(self.tools, self.calls)
            self.finish_reason = "" if self.must_run else "tool_calls"
        elif not self.finish_reason and self.guide:
            self.guide.push(result.token)
        return self._piece(part, (result.token,), logprobs)

    def _new_experts(self) -> capturing.RoutedTokens | None:
        return self.hooks.new_experts() if self.streams_experts and self.hooks else None

    @property
    def calls(self) -> list[dict[str, Any]]:
        """The calls of this round so far."""
        return self.reader.parser.tool_calls if self.reader else []

    @property
    def waits_for_results(self) -> bool:
        """Whether the row ended with an end id after calls."""
        ended = self.finish_reason == "stop" and self.ids[-1] in self.options.end_ids
        return ended and bool(self.calls)

    def next_round(self, ended: Output, prompt: Prompt, cached: np.ndarray) -> None:
        """Begins the round that reads `prompt`, the results of the calls of the one that ended."""
        self.rounds.append(ended)
        self.prompt = prompt
        self.cached_ids = cached
        self.ids, self.logprobs, self.prompt_logprobs = [], [], [None]
        self.must_run, self.finish_reason = False, ""
        self.timings = Timings(prefill_tokens=len(prompt))
        self.hooks = self.reading = None
        self.towers, self.inside = None, tower_hooks.Inside()
        self.started = time.perf_counter()
        self.read_text()

    def cancel(self) -> Piece:
        """Ends the row early and returns its last piece."""
        self.finish_reason = "cancelled"
        part = self._with_rest(Part()) if self.reader else Part()
        return self._piece(part, (), None)

    def _with_rest(self, part: Part) -> Part:
        """Adds the text that was held back, which may complete a stop string."""
        assert self.reader is not None
        rest = self.reader.finish()
        if rest.stopped:
            self.finish_reason = "stop"
        return part + rest

    def _piece(
        self, part: Part, ids: tuple[int, ...], logprobs: list[TokenLogprobs] | None
    ) -> Piece:
        return Piece(
            row=0,
            text=part.text,
            ids=ids,
            reasoning=part.reasoning,
            tool_calls=list(part.tool_calls),
            tool_errors=list(part.tool_errors),
            logprobs=logprobs,
            experts=self._new_experts(),
            finish_reason=self.finish_reason or None,
        )

    def output(self, cache: Any) -> Output:
        ids = np.array(self.ids, np.int32)
        ids.setflags(write=False)
        captured: capturing.Captured | None = None
        trace = None
        if self.hooks:
            # The last token is chosen, not read, unless the row was closed while it was being read.
            read = np.concatenate([self.prompt.ids, ids])
            tokenizer = self.prompt.tokenizer
            captured, trace = self.hooks.take(read, lambda: tokenizer.tokens(read), joined=False)
        assert self.prompt.config is not None
        return Output(
            prompt=self.prompt,
            ids=ids,
            finish_reason=self.finish_reason,
            logprobs=self.logprobs if self.options.logprobs else None,
            prompt_logprobs=self.prompt_logprobs if self.options.prompt_logprobs else None,
            cache=cache,
            timings=self.timings,
            captured=self.inside.captured(captured, self.prompt.config.text),
            routing=trace,
            seed=self.options.sampling.seed,
            stop_strings=self.options.stop_strings,
            rounds=tuple(self.rounds),
            cached_ids=self.cached_ids,
        )


def _tokens(cache: Any) -> np.ndarray:
    return np.array(cache.tokens, np.int32)


def _logprobs(entry: Any) -> TokenLogprobs:
    return float(entry.logprob), [(int(token), float(value)) for token, value in entry.top]


class Generation:
    """Rows on one session: those of one call, or whatever a server adds and removes."""

    def __init__(
        self, model: GenerationModel, rows: Sequence[Row] = (), stream: bool = True
    ) -> None:
        """`stream`: every row's text is read as it comes."""
        self._model = model
        self._stream = stream
        self._rows: dict[int, Row] = {}
        self._session = model.new_session()
        # Rows of the session that earlier rounds had: (number, index of the row).
        self._ended: list[tuple[int, int]] = []
        self.errors: dict[int, ValueError] = {}
        """Why rows could not go on, by index; the others can."""
        self._noted = [row.cache for row in rows if row.cache is not None]
        self._notes = [cache.provenance for cache in self._noted]
        with cache_edits.forgotten_on_error(self._noted):
            for index, row in enumerate(rows):
                self.add(index, row)
        self._bar = _PrefillBar(sum(len(row.prompt) for row in rows))
        self._collectors = _routing.collectors(model)
        self._outputs: list[Output] | None = None

    def add(self, index: int, row: Row) -> None:
        """Begins a row, between two steps; its pieces come with `index`, which must be free.

        ValueError and MemoryError where the row can't fit, and it is not added.
        """
        if self._stream or row.options.stop_strings or row.prompt.tools:
            row.read_text()
        if row.cache is not None:
            row.cache.note_adapter(row.adapters.label)
        self._bind_hooks(row, index)
        if row.towers:
            row.inside = tower_hooks.encode(self._model, row.prompt, row.towers, index)
            if row.cache is not None:
                cache_edits.note_towers(row.cache, row.towers)
        if row.guide:
            row.guide.begin(np.concatenate([row.cached_ids, row.prompt.ids]))
        if row.prefixes is not None:
            if row.inside.soft_tokens:
                row.prefixes.hold(row.inside.soft_tokens)
            row.read_from(row.look_up())
        row.number = self._session.submit(self._request(row))
        self._rows[index] = row

    def remove(self, index: int) -> Output:
        """Takes a row out, ends it if it runs, and frees what the engine holds of it."""
        row = self._rows.pop(index)
        self._session.release(row.number)
        self.errors.pop(index, None)
        if not row.finish_reason:
            row.cancel()
        if row.guide:
            row.guide.close()
        return row.output(None)

    def _bind_hooks(self, row: Row, index: int) -> None:
        if not row.request:
            return
        text = self._model.config.text
        if row.span is None:
            row.span = Span(row.prompt, row.cache.length if row.cache is not None else 0)
            new = row.options.max_new_tokens
            capturing.check_memory(row.request, text, row.span, new, _core.DEFAULT_CHUNK)
            if row.cache is not None:
                cache_edits.note(row.cache, row.request)
        row.hooks = capturing.BoundHooks(row.request, text, row.span, index)

    def _request(self, row: Row, core_cache: Any = None) -> Any:
        options = row.options
        request = self._model.new_request()
        skipped = row.reading.length if row.reading else 0
        request.ids = row.prompt.ids[skipped:].tolist()
        if core_cache is not None:
            request.cache = core_cache
        elif row.reading is not None:
            request.cache, row.reading.cache = row.reading.cache, None
            request.cuts = [cut - skipped for cut in row.reading.cuts]
        elif row.cache is not None:
            request.cache = self._model.core_cache(row.cache)
        request.max_new_tokens = options.max_new_tokens
        sampling = request.sampling
        sampling.temperature = options.sampling.temperature
        sampling.top_k = options.sampling.top_k
        sampling.top_p = options.sampling.top_p
        sampling.min_p = options.sampling.min_p
        sampling.repetition_penalty = options.sampling.repetition_penalty
        # A round of its own draws, or its tokens would be tied to the first round's.
        sampling.seed = (options.sampling.seed + len(row.rounds) * _ROUND_SEED) % 2**64
        sampling.suppress = list(options.sampling.suppress)
        request.stop_ids = list(options.stop_ids)
        request.logprobs = options.logprobs or -1
        request.prompt_logprobs = options.prompt_logprobs or -1
        request.softcap = row.softcap
        request.mask = row.guide.mask if row.guide else None
        # A stop string is found after a pass: guesses behind it would stay in the cache.
        if row.drafter is not None and not options.stop_strings:
            row.drafter.serve(request)
        request.hooks = row.hooks.core if row.hooks else None
        if row.adapters:
            request.adapters = row.adapters.core
        soft_tokens = row.inside.soft_tokens
        request.media = engine_input(row.prompt.media, self._model.config, skipped, soft_tokens)
        return request

    @property
    def done(self) -> bool:
        """Whether every row has ended."""
        return all(row.finish_reason for row in self._rows.values())

    def step(self) -> list[Piece]:
        """Runs one pass, or the tools that a row called; returns its pieces in order."""
        for index, row in self._rows.items():
            if row.must_run and not row.finish_reason:
                return [self._run_calls(index)]
        before = time.perf_counter()
        results = self._session.step()
        seconds = time.perf_counter() - before
        if not results and not self.done:
            raise RuntimeError("the session has no rows left to step, but not all have ended")
        pieces = []
        seen: set[int] = set()
        indices = {row.number: index for index, row in self._rows.items()}
        for result in results:
            index = indices[result.row]
            row = self._rows[index]
            row.begun = True
            if row.finish_reason:  # another thread closed the stream while this step ran
                continue
            if result.error:
                row.cancel()
                self.errors[index] = ValueError(result.error)
                continue
            # Guesses that were right come as several results of one pass.
            piece = row.take(result, 0.0 if index in seen else seconds)
            seen.add(index)
            if not row.rounds:
                self._bar.show(index, result.prefilled)
            if row.finish_reason == "stop" and not result.finish_reason:
                self._session.cancel(result.row)
            # Of the tokens that come after the prompt, those that an answer ends with are enough.
            if row.reading and (result.token < 0 or len(row.ids) == 1 or row.finish_reason):
                self._store(row, row.reading)
            if piece is not None:
                pieces.append(_of_row(piece, index))
        if self.done:
            self._close()
        return pieces

    def _store(self, row: Row, reading: Reading) -> None:
        """Stores what has been read of the row, for later rows and those that have not begun."""
        assert row.prefixes is not None
        row.prefixes.cache.store(reading, self._session.cache(row.number), row.ids)
        for other in self._rows.values() if len(row.ids) == 1 else ():
            if other.begun or other.finish_reason or other.reading is None:
                continue
            better = other.look_up(other.reading.length)
            if better.length > other.reading.length:
                self._session.release(other.number)
                other.read_from(better)
                other.number = self._session.submit(self._request(other))

    def _close(self) -> None:
        self._bar.close()
        for row in self._rows.values():
            if row.guide:
                row.guide.close()

    def _run_calls(self, index: int) -> Piece:
        """Runs what a row called, and lets it go on with the results."""
        row = self._rows[index]
        number = row.number
        results = run_tools(row.tools, row.calls)
        row.finish_reason = "tool_calls"
        ended = row.output(None)
        ended.tool_results, ended.rounds = tuple(results), ()
        prompt = next_prompt(row.prompt, ended.message, results)
        cache = self._session.cache(number)
        row.next_round(ended, prompt, _tokens(cache))
        self._bind_hooks(row, index)
        try:
            row.number = self._session.submit(self._request(row, cache))
        except (ValueError, MemoryError):  # No room for the results: what came so far is kept.
            row.finish_reason, row.hooks = "length", None
            if self.done:
                self._close()
        else:
            self._ended.append((number, index))
            if row.guide:
                row.guide.begin(np.concatenate([row.cached_ids, prompt.ids]))
        return Piece(row=index, tool_results=results, finish_reason=row.finish_reason or None)

    def cancel(self) -> list[Piece]:
        """Ends the rows that still run; their caches keep what was computed."""
        return self._end(self._session.cancel)

    def abort(self) -> None:
        """Ends every row and gives the caller's caches their earlier content: the call raises."""
        for row in self._rows.values():
            if row.cache is not None and row.finish_reason:
                self._session.rollback(row.number)
        self._end(self._session.rollback)
        for number, index in reversed(self._ended):
            if self._rows[index].cache is not None:
                self._session.rollback(number)
        for cache, notes in zip(self._noted, self._notes, strict=True):
            cache.forget(notes)

    def _end(self, end_row: Callable[[int], None]) -> list[Piece]:
        pieces = []
        for index, row in self._rows.items():
            if not row.finish_reason:
                end_row(row.number)
                pieces.append(_of_row(row.cancel(), index))
        self._close()
        return pieces

    def outputs(self) -> list[Output]:
        """Returns one output a row, the same ones whenever it is asked after all rows ended."""
        if self._outputs is None:
            self._outputs = [row.output(self._cache(row)) for row in self._rows.values()]
            for row, output in zip(self._rows.values(), self._outputs, strict=True):
                if row.drafter is not None:
                    output.drafts = DraftCounts(*self._session.drafts(row.number))
            _routing.count((output.routing for output in self._outputs), self._collectors)
        return self._outputs

    def _cache(self, row: Row) -> Any:
        if row.cache is not None:
            return row.cache
        made = self._model.wrap_cache(self._session.cache(row.number))
        if row.adapters:
            made.note("adapter", row.adapters.label)
        if row.request.edits:
            cache_edits.note(made, row.request)
        if row.towers:
            cache_edits.note_towers(made, row.towers)
        return made


def _of_row(piece: Piece, row: int) -> Piece:
    return Piece(**{**piece.__dict__, "row": row})


class _PrefillBar:
    """A progress bar while a long prompt is read, on a terminal only."""

    def __init__(self, total: int) -> None:
        self._bar: Any = None
        self._read: dict[int, int] = {}
        if total >= _BAR_TOKENS and sys.stderr is not None and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc="reading the prompt", unit="tok", leave=False)

    def show(self, row: int, prefilled: int) -> None:
        if self._bar is None:
            return
        self._bar.update(prefilled - self._read.get(row, 0))
        self._read[row] = prefilled
        if self._bar.n >= self._bar.total:
            self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
