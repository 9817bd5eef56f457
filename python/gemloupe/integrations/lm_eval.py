"""gemloupe as a model of lm-evaluation-harness (`pip install gemloupe[eval]`).

    gemloupe eval --model_args pretrained=demo:edge,dtype=int4 --tasks arc_easy --limit 100

The harness finds models of other packages in no way of its own. `gemloupe eval …`, or `python -m
gemloupe.integrations.lm_eval …`, registers this one as "gemloupe" and hands all arguments to the
harness; in Python, importing this module registers it: `lm_eval.simple_evaluate("gemloupe", …)`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

import numpy as np

from gemloupe.batching import MAX_ROWS, generate_all
from gemloupe.errors import missing_extra, one_of, quoted
from gemloupe.generation import Row, make_rows
from gemloupe.model import Model, load
from gemloupe.progress import ProgressBar
from gemloupe.scoring import logits_blocks, target_logprobs
from gemloupe.sizes import count_parameters

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import model_registry
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:
    raise missing_extra("lm_eval", "gemloupe eval", "eval") from None

NAME = "gemloupe"
# Shared beginnings of contexts that are shorter than this are read again.
_WORTH_KEEPING = 16
_LOAD = ("threads", "kv_dtype", "max_memory", "residency", "activations", "adapter", "invariant")
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")

Scored = tuple[float, bool]
Request = tuple[Any, list[int], list[int]]
"""(context and continuation as texts, or None; ids of the context; ids of the continuation)."""


class GemloupeLM(TemplateLM):
    """What `--model gemloupe` stands for; keyword arguments are those of `--model_args`.

    `pretrained`: what `gl.load` takes, or a `Model`. `dtype`, `threads`, `kv_dtype`, `max_memory`,
    `residency`, `activations`, `adapter`, `invariant`: as in `gl.load`. `max_length`: tokens of an
    input (the model's context where None). `max_gen_toks`: tokens of an answer whose task does not
    say. `max_rows`: answers that are generated at once (`batch_size`, where that is more than 1).
    `enable_thinking`, `max_thinking_tokens`: of chats (--apply_chat_template). `seed`: of sampled
    answers; the n-th request has seed + n.

    BOS begins every input once: texts, chats whose template writes it out, and what was cut at the
    left to fit. It begins every window of rolling log-likelihoods too; with `window_bos=False` it
    begins the first alone, which is what the harness's own models do.
    """

    backend = "causal"

    def __init__(
        self,
        pretrained: Any,
        dtype: Any = "auto",
        *,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        max_rows: int | None = None,
        window_bos: bool = True,
        enable_thinking: bool = False,
        max_thinking_tokens: int | None = None,
        seed: int = 1234,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,  # The harness's own; it says cuda:0 where nobody asked.
        **arguments: Any,
    ) -> None:
        super().__init__()
        if unknown := [name for name in arguments if name not in _LOAD]:
            raise ValueError(
                f"model_args has {quoted(unknown[0])}; expected pretrained, dtype, max_length, "
                "max_gen_toks, max_rows, window_bos, enable_thinking, max_thinking_tokens, seed, "
                + ", ".join(_LOAD)
            )
        if isinstance(pretrained, Model):
            if arguments or dtype != "auto":
                raise ValueError(
                    "pretrained is a model; expected no arguments of gl.load beside it"
                )
            self.model = pretrained
        else:
            self.model = load(pretrained, dtype, **arguments)
        self.model.tokenizer.raw_text_warned = True
        most = self.model.config.text.max_position_embeddings
        if max_length is not None and not 2 <= max_length <= most:
            raise ValueError(f"max_length is {max_length}; expected 2 to {most} tokens")
        self.max_length = max_length or most
        self.max_gen_toks = max_gen_toks
        rows = batch_size if isinstance(batch_size, int) and batch_size > 1 else MAX_ROWS
        self.max_rows = rows if max_rows is None else max_rows
        self.window_bos = window_bos
        self.thinking = enable_thinking
        self.max_thinking_tokens = max_thinking_tokens
        self.seed = seed

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self.model.tokenizer.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What precedes a text that nothing precedes: BOS."""
        bos = self.model.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """Under which the harness caches requests."""
        return str(self.model.checkpoint.source).replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside results."""
        parameters = count_parameters(self.model.checkpoint).total
        return {"model_num_parameters": parameters, "model_dtype": self.model.dtype}

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """The ids of a text, beginning with one BOS unless `add_special_tokens` is False."""
        return self.model.tokenizer.encode(
            string, bos=False if add_special_tokens is False else "auto"
        )

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's source, which the harness writes beside results."""
        if not chat_template:
            return None
        templates = self.model.tokenizer.chat_template.templates
        name = chat_template if isinstance(chat_template, str) else "default"
        if name not in templates:
            raise ValueError(f"no chat template {quoted(name)}; expected {one_of(list(templates))}")
        return templates[name]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a chat, BOS written out; without generation prompt its last turn is open."""
        text = self.model.tokenizer.chat_template.render(
            chat_history,
            thinking=self.thinking,
            add_generation_prompt=add_generation_prompt,
        )
        if add_generation_prompt:
            return text
        content = chat_history[-1]["content"].rstrip()
        return text[: text.rindex(content) + len(content)]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts, in windows of `max_length` that predict every token once."""
        windows: list[Request] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            for context, continuation in self._windows(request.args[0]):
                windows.append((None, context, continuation))
                owners.append(index)
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for owner, (logprob, _) in zip(owners, scores, strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _windows(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        bos = self.prefix_token_id
        found = get_rolling_token_windows(
            self.tok_encode(text, add_special_tokens=False),
            prefix_token=bos,
            max_seq_len=self.max_length,
            # BOS and one token of the text, or that token alone.
            context_len=2 if self.window_bos else 1,
        )
        for number, (inputs, predicted) in enumerate(found):
            if number and self.window_bos:
                inputs = [bos, *inputs[1:]]
            yield make_disjoint_window((inputs, predicted))

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **_: Any
    ) -> list[Scored]:
        """Contexts are read in the order of their ids, so that what they share is read once."""
        scores: list[Scored | None] = [None] * len(requests)
        grouped: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            kept = self._fitted(context, continuation)
            grouped.setdefault(tuple(kept), []).append((index, continuation))
        done = 0
        with ProgressBar(
            "loglikelihood", shown=not disable_tqdm, counted="requests", total=len(requests)
        ) as bar:
            for context_ids, first, cache in self._contexts(sorted(grouped)):
                for index, continuation in grouped[context_ids]:
                    score = self._score(continuation, first, cache)
                    scores[index] = score
                    if requests[index][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[index][0], score)
                    done += 1
                    bar.count(done)
        return [score for score in scores if score is not None]

    def _fitted(self, context: Sequence[int], continuation: Sequence[int]) -> list[int]:
        """The context, cut at the left to what fits beside its continuation; BOS stays."""
        room = self.max_length + 1 - len(continuation)
        if not context or not continuation:
            raise ValueError("a request has no tokens; expected a context and a continuation")
        if room < 1:
            raise ValueError(
                f"a continuation has {len(continuation)} tokens; expected at most "
                f"{self.max_length} (max_length)"
            )
        return self._cut(context, room)

    def _cut(self, ids: Sequence[int], room: int) -> list[int]:
        if len(ids) <= room:
            return list(ids)
        bos = self.model.tokenizer.bos_id
        if ids[0] != bos:
            return list(ids[-room:])
        return [ids[0], *ids[len(ids) - room + 1 :]]

    def _contexts(
        self, contexts: Sequence[tuple[int, ...]]
    ) -> Iterator[tuple[tuple[int, ...], np.ndarray, Any]]:
        """(context, logits [1, V] after it, cache) of sorted contexts."""
        shared = [_common(a, b) for a, b in zip(contexts, contexts[1:], strict=False)] + [0]
        saved: list[Any] = []
        for number, context in enumerate(contexts):
            before = shared[number - 1] if number else 0
            while saved and saved[-1].length > before:
                saved.pop()
            cache = saved[-1].fork() if saved else self.model.new_cache()
            for end in _branches(shared, number, cache.length):
                self._read(context[cache.length : end], cache, None)
                saved.append(cache.fork())
            yield context, self._read(context[cache.length :], cache, "last").logits, cache

    def _read(self, ids: Sequence[int], cache: Any, logits: str | None) -> Any:
        return self.model.run(np.array(ids, np.int32), cache=cache, logits=logits, routing=False)

    def _score(self, continuation: Sequence[int], first: np.ndarray, cache: Any) -> Scored:
        """(Σ log p, whether each token is the most likely one) after a context."""
        ids = np.array(continuation, np.int32)
        total = float(target_logprobs(first, ids[:1])[0])
        greedy = bool(first[0].argmax() == ids[0])
        if len(ids) > 1:
            for at, logits in logits_blocks(self.model, ids[:-1], 0, cache.fork()):
                targets = ids[at + 1 : at + 1 + len(logits)]
                total += float(target_logprobs(logits, targets).sum())
                greedy = greedy and bool((logits.argmax(axis=1) == targets).all())
        return total, greedy

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Answers up to a stop string, the longest contexts first, `max_rows` at once."""
        contexts = [self.tok_encode(request.args[0]) for request in requests]
        order = sorted(range(len(requests)), key=lambda index: -len(contexts[index]))
        texts = [""] * len(requests)
        tokens = done = 0

        def rows(index: int) -> list[Row]:
            return [self._row(contexts[index], requests[index].args[1], index)]

        def advance(count: int) -> None:
            nonlocal tokens
            tokens += count
            bar.count(done, f"{tokens} tokens")

        jobs = ((index, lambda index=index: rows(index)) for index in order)
        with ProgressBar(
            "generate_until", shown=not disable_tqdm, counted="requests", total=len(requests)
        ) as bar:
            for index, outputs in generate_all(
                self.model, jobs, max_rows=self.max_rows, advance=advance
            ):
                if isinstance(outputs, Exception):
                    raise outputs
                texts[index] = outputs[0].text
                self.cache_hook.add_partial("generate_until", requests[index].args, texts[index])
                done += 1
                bar.count(done)
        return texts

    def _row(self, context: list[int], given: Mapping[str, Any], index: int) -> Row:
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(dict(given), self.max_gen_toks))
        stop = [text for text in handle_stop_sequences(kwargs.pop("until", None), None) if text]
        tokens = kwargs.pop("max_gen_toks")
        if not 1 <= tokens < self.max_length:
            raise ValueError(
                f"max_gen_toks is {tokens}; expected 1 to {self.max_length - 1} (max_length − 1)"
            )
        sampled = kwargs.pop("do_sample", False)
        arguments = {name: kwargs.pop(name) for name in _SAMPLING if name in kwargs}
        arguments.setdefault("seed", (self.seed + index) % 2**63)
        if not sampled:
            arguments["temperature"] = 0
        for name, nothing in (("num_beams", 1), ("num_return_sequences", 1), ("use_cache", True)):
            if kwargs.get(name) == nothing:
                del kwargs[name]
        if kwargs:
            raise ValueError(
                f"generation_kwargs has {quoted(next(iter(kwargs)))}; expected until, "
                "max_gen_toks, do_sample, " + ", ".join(_SAMPLING)
            )
        ids = self._cut(context, self.max_length - tokens)
        more = {"max_new_tokens": tokens, "stop": stop, "routing": False}
        if self.max_thinking_tokens is not None:
            more["max_thinking_tokens"] = self.max_thinking_tokens
        return make_rows(self.model, np.array(ids, np.int32), {**arguments, **more})[0]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two contexts begin with together."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _branches(shared: Sequence[int], number: int, held: int) -> list[int]:
    """Where later contexts part from context `number`, ascending, beyond what is `held`.

    `shared[i]` is what contexts i and i + 1 begin with together.
    """
    ends: list[int] = []
    for length in shared[number:]:
        if length < held + _WORTH_KEEPING:
            break
        if not ends or length < ends[-1]:
            ends.append(length)
    kept: list[int] = []
    for end in reversed(ends):
        if end >= (kept[-1] if kept else held) + _WORTH_KEEPING:
            kept.append(end)
    return kept


if NAME not in model_registry:
    model_registry.register(NAME, target=GemloupeLM)


def main(arguments: Sequence[str]) -> int:
    """Runs the harness's command line with this model registered; `--model gemloupe` is added."""
    from lm_eval.__main__ import cli_evaluate

    given = list(arguments)
    if given[:1] not in (["ls"], ["validate"]):
        given = ["run", *(given[1:] if given[:1] == ["run"] else given)]
        names = {each.split("=")[0] for each in given}
        if not names & {"--model", "-M", "--config", "-C", "--help", "-h"}:
            given[1:1] = ["--model", NAME]
    before, sys.argv = sys.argv, ["lm-eval", *given]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
    return 0


if __name__ == "__main__":
    # The module under its own name, not as __main__: the registry holds one class.
    from gemloupe.integrations import lm_eval as _this

    sys.exit(_this.main(sys.argv[1:]))
