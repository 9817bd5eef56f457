"""`gl.perplexity` and `gl.kl`: how well a model predicts a text, and how far from another one.

Long texts are read in windows of `window` tokens, each begun with the model's BOS. Two rules:

"strided" (that of transformers' guide on perplexity): a window begins every `stride` tokens and
scores those of its tokens that no earlier one has scored. Every token of the text counts once,
seen after at least window − stride − 1 others, or after all that precede it.

"llama.cpp" (that of its llama-perplexity): windows do not overlap, and each scores its second
half; window // 2 tokens and more precede what is scored. What is left at the end is left out.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from gemloupe import _core
from gemloupe.errors import one_of, quoted
from gemloupe.progress import ProgressBar
from gemloupe.scoring import log_softmax, logits_blocks, target_logprobs

if TYPE_CHECKING:
    from gemloupe.model import Model

WINDOW = 2048
RULES = ("strided", "llama.cpp")
_PERCENTILES = (0.0, 1.0, 5.0, 10.0, 50.0, 90.0, 95.0, 99.0, 99.9, 100.0)


@dataclass(frozen=True, eq=False)
class Perplexity:
    """How well a text is predicted; `print` shows it."""

    logprobs: np.ndarray
    """float64 [n]: log-probability in nats of every scored token, in the text's order."""
    windows: int
    window: int
    """Tokens of a window, BOS included."""
    stride: int | None
    """None for the rule "llama.cpp"."""
    rule: str
    text_bytes: int | None
    """UTF-8 bytes of the text; None where not all of it is scored."""
    tokens_read: int
    """By the model, those that overlapping windows read again included."""
    seconds: float

    @property
    def tokens(self) -> int:
        """Tokens that were scored."""
        return len(self.logprobs)

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood of a token, in nats."""
        return float(-self.logprobs.mean())

    @property
    def nll_error(self) -> float:
        """Standard error of `nll`, as if tokens were independent; NaN for a single one."""
        return _standard_error(self.logprobs)

    @property
    def perplexity(self) -> float:
        """exp(nll)."""
        return float(np.exp(self.nll))

    @property
    def standard_error(self) -> float:
        """Of `perplexity`, to first order: perplexity · nll_error."""
        return self.perplexity * self.nll_error

    @property
    def bits_per_byte(self) -> float | None:
        """−Σ log₂ p / bytes of the text, which tokenizers don't change; None as `text_bytes`."""
        if self.text_bytes is None:
            return None
        return float(-self.logprobs.sum() / np.log(2) / self.text_bytes)

    @property
    def tokens_per_second(self) -> float:
        """Of `tokens_read`."""
        return self.tokens_read / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON types; NaN is None."""
        return {
            "perplexity": self.perplexity,
            "standard_error": _number(self.standard_error),
            "nll": self.nll,
            "nll_error": _number(self.nll_error),
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "windows": self.windows,
            "window": self.window,
            "stride": self.stride,
            "rule": self.rule,
            "tokens_read": self.tokens_read,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
        }

    def __str__(self) -> str:
        rows = [("perplexity", f"{self.perplexity:.4f} ± {self.standard_error:.4f}")]
        if self.bits_per_byte is not None:
            rows.append(("bits per byte", f"{self.bits_per_byte:.4f}"))
        return _table([*rows, *_what_was_read(self)])

    __repr__ = __str__


@dataclass(frozen=True, eq=False)
class Divergence:
    """How far a model's predictions of a text are from a reference's; `print` shows it.

    The columns are those of llama-perplexity --kl-divergence.
    """

    model: Perplexity
    reference: Perplexity
    kl: np.ndarray
    """float64 [n]: KL(reference ‖ model) in nats where each scored token is predicted."""
    same_top: np.ndarray
    """bool [n]: whether both find the same token most likely."""
    delta_p: np.ndarray = field(init=False)
    """float64 [n]: probability of the text's token, the model's minus the reference's."""

    def __post_init__(self) -> None:
        delta = np.exp(self.model.logprobs) - np.exp(self.reference.logprobs)
        object.__setattr__(self, "delta_p", delta)

    @property
    def mean(self) -> float:
        """Mean of `kl`."""
        return float(self.kl.mean())

    @property
    def mean_error(self) -> float:
        """Standard error of `mean`."""
        return _standard_error(self.kl)

    def percentile(self, percent: float) -> float:
        """A percentile of `kl`, 0 to 100."""
        return float(np.percentile(self.kl, percent))

    @property
    def top1_agreement(self) -> float:
        """Share of positions where both find the same token most likely."""
        return float(self.same_top.mean())

    @property
    def top1_error(self) -> float:
        """Standard error of `top1_agreement`."""
        return _standard_error(self.same_top.astype(np.float64))

    @property
    def delta_p_rms(self) -> float:
        """Root of the mean square of `delta_p`."""
        return float(np.sqrt(np.mean(self.delta_p**2)))

    @property
    def log_ratio(self) -> float:
        """ln(perplexity of the model / of the reference)."""
        return self.model.nll - self.reference.nll

    @property
    def log_ratio_error(self) -> float:
        """Standard error of `log_ratio`; both see the same tokens, so it is small."""
        return _standard_error(self.model.logprobs - self.reference.logprobs)

    @property
    def correlation(self) -> float:
        """Of both models' log-probabilities, in %; NaN where one of them never varies."""
        if self.model.tokens < 2:
            return float("nan")
        with np.errstate(invalid="ignore", divide="ignore"):
            return float(100 * np.corrcoef(self.model.logprobs, self.reference.logprobs)[0, 1])

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON types; NaN is None."""
        return {
            "model": self.model.as_dict(),
            "reference": self.reference.as_dict(),
            "log_ratio": self.log_ratio,
            "log_ratio_error": _number(self.log_ratio_error),
            "correlation": _number(self.correlation),
            "kl_mean": self.mean,
            "kl_mean_error": _number(self.mean_error),
            "kl_percentiles": {f"{p:g}": self.percentile(p) for p in _PERCENTILES},
            "top1_agreement": self.top1_agreement,
            "top1_error": _number(self.top1_error),
            "delta_p_mean": float(self.delta_p.mean()),
            "delta_p_rms": self.delta_p_rms,
        }

    def __str__(self) -> str:
        ours, theirs = self.model, self.reference
        rows = [
            ("perplexity", f"{ours.perplexity:.4f} ± {ours.standard_error:.4f}"),
            ("of the reference", f"{theirs.perplexity:.4f} ± {theirs.standard_error:.4f}"),
            ("ln of their ratio", f"{self.log_ratio:.6f} ± {self.log_ratio_error:.6f}"),
            ("correlation", f"{self.correlation:.2f} %"),
            ("mean KL", f"{self.mean:.6f} ± {self.mean_error:.6f}"),
            ("maximum KL", f"{self.percentile(100):.6f}"),
            ("99.9 % KL", f"{self.percentile(99.9):.6f}"),
            ("99 % KL", f"{self.percentile(99):.6f}"),
            ("median KL", f"{self.percentile(50):.6f}"),
            ("same top token", f"{100 * self.top1_agreement:.3f} ± {100 * self.top1_error:.3f} %"),
            ("mean Δp", f"{100 * self.delta_p.mean():.3f} %"),
            ("RMS Δp", f"{100 * self.delta_p_rms:.3f} %"),
        ]
        if ours.bits_per_byte is not None:
            rows.insert(1, ("bits per byte", f"{ours.bits_per_byte:.4f}"))
        return _table([*rows, *_what_was_read(ours)])

    __repr__ = __str__


def perplexity(
    model: Model,
    text: Any,
    *,
    window: int = WINDOW,
    stride: int | None = None,
    rule: str = "strided",
    max_tokens: int | None = None,
    adapter: Any = None,
) -> Perplexity:
    """Perplexity of `text` under a model, with its standard error, bits a byte and tokens/s.

    `text`: a str (raw text, never a chat), or ids [N] without BOS. `window`: tokens of a window,
    BOS included, 2 to the model's context. `stride`: window // 2 where None; `rule`: see this
    module. `max_tokens` reads only the text's first tokens. `adapter` as in `model.run`.
    Logits are never held (`model.run(…, targets=)`). Shows a progress bar on a terminal.
    ValueError where the text is too short to score a token, and for other arguments.
    """
    given = _Given.read(model, text, max_tokens)
    plan = _plan(model, given.ids, window, stride, rule)
    scored: list[np.ndarray] = []
    began = time.perf_counter()
    with ProgressBar("perplexity", counted="tokens", total=plan.tokens_read) as bar:
        for each in plan.windows:
            for at, logprobs in _scores(model, each, adapter):
                scored.append(logprobs)
                bar.count(each.read_before + at + len(logprobs))
    seconds = time.perf_counter() - began
    return plan.result(np.concatenate(scored), given, seconds)


def kl(
    model: Model,
    reference: Any,
    text: Any,
    *,
    window: int = WINDOW,
    stride: int | None = None,
    rule: str = "strided",
    max_tokens: int | None = None,
    adapter: Any = None,
) -> Divergence:
    """KL(reference ‖ model) over a text, and how often both find the same token most likely.

    `reference`: another gemloupe model, of the same tokenizer, or what `gl.load` takes; it runs
    under no adapter where `adapter` is given, so that a model may be its own reference. Other
    arguments as in `perplexity`. Memory: the logits of 128 MiB of each model.
    """
    if not hasattr(reference, "run"):
        from gemloupe.model import load

        reference = load(reference)
    given = _Given.read(model, text, max_tokens)
    _check_same_tokens(model, reference, text, given, max_tokens)
    plan = _plan(model, given.ids, window, stride, rule)
    _check_window(reference, window)
    other: Any = None if adapter is None else {}
    scores: list[_Scores] = []
    seconds = [0.0, 0.0]
    with ProgressBar("divergence", counted="tokens", total=plan.tokens_read) as bar:
        for each in plan.windows:
            ours, theirs = _blocks(model, each, adapter), _blocks(reference, each, other)
            while True:
                began = time.perf_counter()
                one = next(ours, None)
                middle = time.perf_counter()
                two = next(theirs, None)
                seconds[0] += middle - began
                seconds[1] += time.perf_counter() - middle
                if one is None or two is None:
                    break
                at, logits = one
                scores.append(_Scores.of(logits, two[1], each.targets[at : at + len(logits)]))
                bar.count(each.read_before + at + len(logits))
    joined = [np.concatenate([getattr(s, name) for s in scores]) for name in _Scores.NAMES]
    return Divergence(
        plan.result(joined[0], given, seconds[0]),
        plan.result(joined[1], given, seconds[1]),
        joined[2],
        joined[3],
    )


@dataclass(frozen=True)
class _Given:
    """A text's ids, without BOS, and its size."""

    ids: np.ndarray
    text_bytes: int

    @staticmethod
    def read(model: Model, text: Any, max_tokens: int | None) -> _Given:
        if max_tokens is not None and (isinstance(max_tokens, bool) or max_tokens < 1):
            raise ValueError(f"max_tokens is {max_tokens!r}; expected None, or 1 or more")
        if isinstance(text, str):
            ids = np.array(model.tokenizer.encode(text, bos=False), np.int32)
            if max_tokens is None or len(ids) <= max_tokens:
                return _Given(ids, len(text.encode()))
        else:
            # Of ids only: prepare checks that they are inside the vocabulary.
            if isinstance(text, (list, tuple)) and not len(text):
                raise ValueError("text is empty; expected at least one token")
            ids = model.prepare(np.asarray(text)).ids
        ids = ids[:max_tokens]
        decoded = model.tokenizer.decode(ids, skip_special=False) if model.tokenizer.exists else ""
        return _Given(ids, len(decoded.encode()))


@dataclass(frozen=True)
class _Window:
    inputs: np.ndarray
    targets: np.ndarray
    """What should follow each input."""
    begin: int
    """The first input whose target is scored."""
    read_before: int
    """Inputs of the windows before this one."""


@dataclass(frozen=True)
class _Plan:
    windows: Sequence[_Window]
    window: int
    stride: int | None
    rule: str

    @property
    def tokens_read(self) -> int:
        return self.windows[-1].read_before + len(self.windows[-1].inputs)

    def result(self, logprobs: np.ndarray, given: _Given, seconds: float) -> Perplexity:
        whole = len(logprobs) == len(given.ids) and given.text_bytes > 0
        logprobs.setflags(write=False)
        return Perplexity(
            logprobs,
            len(self.windows),
            self.window,
            self.stride,
            self.rule,
            given.text_bytes if whole else None,
            self.tokens_read,
            seconds,
        )


def _plan(model: Model, ids: np.ndarray, window: int, stride: int | None, rule: str) -> _Plan:
    _check_window(model, window)
    if rule not in RULES:
        raise ValueError(f"rule is {quoted(rule)}; expected {one_of(RULES)}")
    bos = model.config.bos_token_id
    begin = [] if bos is None else [bos]
    pairs: list[tuple[np.ndarray, int]] = []
    if rule == "llama.cpp":
        if stride is not None:
            raise ValueError(
                'stride goes with rule="strided"; windows of "llama.cpp" lie side by side'
            )
        if window < 4:
            raise ValueError(f'window is {window}; expected 4 or more with rule="llama.cpp"')
        every = np.concatenate([np.array(begin, np.int32), ids])
        for start in range(0, len(every) // window * window, window):
            cut = every[start : start + window]
            pairs.append((np.concatenate([begin, cut[len(begin) :]]), window - window // 2 - 1))
        needed = window - len(begin)
    else:
        stride = max(1, window // 2) if stride is None else stride
        if isinstance(stride, bool) or not 1 <= stride <= window - 1:
            raise ValueError(f"stride is {stride!r}; expected 1 to {window - 1} (window − 1)")
        done = 1 - len(begin)  # Without BOS nothing predicts the first token.
        size = window - len(begin)
        for start in range(0, len(ids), stride):
            end = min(start + size, len(ids))
            if end > done:
                pairs.append((np.concatenate([begin, ids[start:end]]), end - done))
            done = max(done, end)
            if end == len(ids):
                break
        needed = 2 - len(begin)
    if not pairs:
        raise ValueError(
            f"the text has {len(ids)} tokens; expected at least {needed} for windows of {window} "
            f"under the rule {quoted(rule)}"
        )
    windows, read = [], 0
    for each, scored in pairs:
        each = each.astype(np.int32)
        windows.append(_Window(each[:-1], each[1:], len(each) - 1 - scored, read))
        read += len(each) - 1
    return _Plan(windows, window, stride, rule)


def _check_window(model: Model, window: int) -> None:
    most = model.config.text.max_position_embeddings
    if isinstance(window, bool) or not isinstance(window, int) or not 2 <= window <= most:
        raise ValueError(f"window is {window!r}; expected 2 to {most} tokens (the model's context)")


def _check_same_tokens(
    model: Model, reference: Model, text: Any, given: _Given, max_tokens: int | None
) -> None:
    sizes = [each.config.text.vocab_size for each in (model, reference)]
    same = sizes[0] == sizes[1] and model.config.bos_token_id == reference.config.bos_token_id
    if same and isinstance(text, str):
        other = reference.tokenizer.encode(text, bos=False)[:max_tokens]
        same = np.array_equal(given.ids, np.array(other, np.int32))
    if not same:
        raise ValueError(
            "the reference has another tokenizer (vocabularies of "
            f"{sizes[0]} and {sizes[1]}); expected a model of the same family"
        )


def _scores(model: Model, window: _Window, adapter: Any) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, log p of the targets [n]) of the scored rows, without their logits."""
    cache = model.new_cache(len(window.inputs))
    arguments: dict[str, Any] = {"cache": cache, "routing": False, "adapter": adapter}
    if window.begin:
        model.run(window.inputs[: window.begin], logits=None, **arguments)
    for at in range(window.begin, len(window.inputs), _core.DEFAULT_CHUNK):
        cut = slice(at, at + _core.DEFAULT_CHUNK)
        run = model.run(window.inputs[cut], targets=window.targets[cut], logits=None, **arguments)
        yield at, run.logprobs.astype(np.float64)


def _blocks(model: Model, window: _Window, adapter: Any) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, logits [n, V]) of the scored rows."""
    cache = model.new_cache(len(window.inputs))
    return logits_blocks(model, window.inputs, window.begin, cache, adapter)


@dataclass(frozen=True)
class _Scores:
    """Of one block of rows."""

    model: np.ndarray
    reference: np.ndarray
    kl: np.ndarray
    same_top: np.ndarray
    NAMES = ("model", "reference", "kl", "same_top")

    @staticmethod
    def of(logits: np.ndarray, reference: np.ndarray, targets: np.ndarray) -> _Scores:
        log_q, log_p = log_softmax(logits), log_softmax(reference)
        terms = np.exp(log_p)
        terms *= log_p - log_q
        return _Scores(
            target_logprobs(logits, targets),
            target_logprobs(reference, targets),
            np.maximum(terms.sum(axis=1, dtype=np.float64), 0.0),
            logits.argmax(axis=1) == reference.argmax(axis=1),
        )


def _standard_error(values: np.ndarray) -> float:
    if len(values) < 2:
        return float("nan")
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value


def _what_was_read(result: Perplexity) -> list[tuple[str, str]]:
    step = f", stride {result.stride}" if result.stride else f" ({result.rule}'s rule)"
    windows = "1 window" if result.windows == 1 else f"{result.windows} windows"
    return [
        ("tokens", f"{result.tokens} scored in {windows} of {result.window}{step}"),
        ("speed", f"{result.tokens_per_second:.1f} tokens/s"),
    ]


def _table(rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
