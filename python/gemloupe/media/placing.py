"""Where images, sounds and videos stand in a prompt: placeholders become runs of soft tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gemloupe import _core
from gemloupe.config import ModelConfig
from gemloupe.errors import quoted
from gemloupe.media.content import KINDS, Content, Medium
from gemloupe.media.reader import Reader
from gemloupe.media.videos import is_frame
from gemloupe.tokenizer import Tokenizer

Contents = Mapping[str, Sequence[Content]]

# The tokens around a block, by the fields of config.json that name them.
_FRAMES = {
    "image": ("boi_token_id", "eoi_token_id"),
    "video": ("boi_token_id", "eoi_token_id"),
    "audio": ("boa_token_id", "eoa_token_id"),
}
_ARGUMENTS = {"image": "images", "audio": "audio", "video": "videos"}
# Types of message parts that templates write a placeholder for, and their keys for the content.
_PARTS = {
    **dict.fromkeys(("image", "image_url", "input_image"), "image"),
    **dict.fromkeys(("audio", "input_audio", "audio_url"), "audio"),
    **dict.fromkeys(("video", "video_url"), "video"),
}
_SOURCE_KEYS = ("url", "path", "base64", "data")


class Given:
    """What a call passes for one prompt, to be read in the order in which the prompt has it."""

    def __init__(self, reader: Reader | None, arguments: Mapping[str, Any]) -> None:
        """`arguments`: the call's images, audio, videos and max_soft_tokens."""
        self._reader = reader
        self._values = {kind: _listed(kind, arguments.get(_ARGUMENTS[kind])) for kind in KINDS}
        self._budget = arguments.get("max_soft_tokens")
        images = len(self._values["image"])
        if isinstance(self._budget, (list, tuple)) and len(self._budget) != images:
            raise ValueError(
                f"max_soft_tokens has {len(self._budget)} entries for {images} images of images=; "
                "pass one an image, or one number for all"
            )

    def contents(self, messages: Sequence[Mapping[str, Any]] = ()) -> Contents:
        """Reads everything: of a chat, parts with a content of their own and those that take the
        next value of the call; else the values of the call.

        ValueError where parts and values differ in number.
        """
        read: dict[str, list[Content]] = {kind: [] for kind in KINDS}
        parts = list(_media_parts(messages))
        for kind in KINDS:
            values = self._values[kind]
            asked = sum(part.own is None for part in parts if part.kind == kind)
            if parts and asked != len(values):
                raise _wrong_count(kind, asked, len(values), "parts without a content of their own")
            if not parts:
                read[kind] = [self._next(kind, index) for index in range(len(values))]
        taken = dict.fromkeys(KINDS, 0)
        for part in parts:
            if part.own is None:
                content = self._next(part.kind, taken[part.kind], part.max_soft_tokens)
                taken[part.kind] += 1
            else:
                content = self._read(part.kind, part.own, part.where, part.max_soft_tokens)
            read[part.kind].append(content)
        return read

    def _next(self, kind: str, index: int, budget: Any = None) -> Content:
        """Reads the `index`-th value of the call."""
        if kind == "image" and budget is None and isinstance(self._budget, (list, tuple)):
            budget = self._budget[index]
        return self._read(kind, self._values[kind][index], f"{_ARGUMENTS[kind]}[{index}]", budget)

    def _read(self, kind: str, value: Any, where: str, budget: Any = None) -> Content:
        if self._reader is None:
            raise ValueError(f"{where}: there is no model to read {kind}; use model.prepare")
        if kind == "image" and budget is None and not isinstance(self._budget, (list, tuple)):
            budget = self._budget
        options = {} if budget is None else {"max_soft_tokens": budget}
        return self._reader.read(kind, value, where, options)

    def __bool__(self) -> bool:
        return any(self._values.values())


def media_parts(arguments: Mapping[str, Any]) -> list[dict[str, str]]:
    """Returns a message part for each image, video and sound of a call's arguments."""
    counts = {kind: len(_listed(kind, arguments.get(_ARGUMENTS[kind]))) for kind in KINDS}
    return [{"type": kind} for kind in ("image", "video", "audio") for _ in range(counts[kind])]


def _listed(kind: str, value: Any) -> list[Any]:
    """One value or a list of them as a list; numbers are one sound, frames one video."""
    if value is None:
        return []
    if isinstance(value, (list, tuple)):
        if kind == "video" and value and is_frame(value[0]):
            return [value]
        if kind == "audio" and value and all(isinstance(v, (int, float)) for v in value[:16]):
            return [np.asarray(value)]
        # (samples, sampling rate)
        is_pair = isinstance(value, tuple) and len(value) == 2
        if kind == "audio" and is_pair and isinstance(value[1], (int, np.integer)):
            return [value]
        return list(value)
    return [value]


class _Part(NamedTuple):
    kind: str
    own: Any
    """The content that it brings, or None."""
    max_soft_tokens: Any
    where: str


def _media_parts(messages: Sequence[Mapping[str, Any]]) -> list[_Part]:
    """Returns every media part, in order."""
    found = []
    for index, message in enumerate(messages):
        content = message.get("content")
        for number, part in enumerate(content if isinstance(content, (list, tuple)) else ()):
            where = f"messages[{index}].content[{number}]"
            if part["type"] == "text":
                continue
            kind = _PARTS.get(part["type"])
            if kind is None:
                raise ValueError(
                    f"{where} is a part of type {quoted(part['type'])}; expected 'text', 'image', "
                    "'audio' or 'video'"
                )
            found.append(_Part(kind, _own_content(part), part.get("max_soft_tokens"), where))
    return found


def _own_content(part: Mapping[str, Any]) -> Any:
    """The content that a part brings: {"type": "image", "image": …} or "url", "path", …"""
    for key in (part["type"], *_SOURCE_KEYS):
        value = part.get(key)
        if isinstance(value, Mapping):  # As in OpenAI's API: {"image_url": {"url": …}}.
            if isinstance(value.get("data"), str) and isinstance(value.get("format"), str):
                return f"data:audio/{value['format']};base64,{value['data']}"
            value = next((value[k] for k in _SOURCE_KEYS if value.get(k) is not None), None)
        if value is not None:
            return value
    return None


def _wrong_count(kind: str, expected: int, got: int, what: str) -> ValueError:
    return ValueError(
        f"the prompt has {expected} {kind} {what}, but {_ARGUMENTS[kind]}= has {got}; "
        "pass as many, in their order"
    )


def _piece(kind: str, config: ModelConfig | None, tokenizer: Tokenizer, field: str) -> str:
    token = getattr(config, field, None)
    if token is None:
        raise ValueError(
            f"config.json has no {field}, so prompts of this model can't hold {kind}; leave it out"
        )
    return tokenizer.tokens([token])[0]


def expanded(
    text: str, contents: Contents, config: ModelConfig | None, tokenizer: Tokenizer
) -> str:
    """Returns `text` with each placeholder, such as <|image|>, as the run of its soft tokens.

    An image: <|image>, <|image|> for each soft token, <image|>; a sound likewise; a video: for each
    frame its time as mm:ss, a space, and what an image has, frames parted by spaces. ValueError
    naming both counts unless there is one placeholder a content.
    """
    pieces = {}
    for kind in KINDS:
        token = getattr(config, f"{kind}_token_id", None)
        if token is not None and (contents[kind] or f"<|{kind}|>" in text):
            pieces[kind] = tokenizer.tokens([token])[0]
    for kind in KINDS:
        if contents[kind] and kind not in pieces:
            _piece(kind, config, tokenizer, f"{kind}_token_id")
        found = text.count(pieces[kind]) if kind in pieces else 0
        if found != len(contents[kind]):
            raise _wrong_count(
                kind, found, len(contents[kind]), f"placeholders ({pieces.get(kind)})"
            )
    if not any(contents.values()):
        return text
    replacements = {}
    for kind, piece in pieces.items():
        begin, end = (_piece(kind, config, tokenizer, field) for field in _FRAMES[kind])
        replacements[piece] = iter([_run(c, begin, piece, end) for c in contents[kind]])
    pattern = "|".join(re.escape(piece) for piece in replacements)
    return re.sub(pattern, lambda found: next(replacements[found[0]]), text)


def _run(content: Content, begin: str, piece: str, end: str) -> str:
    blocks = [f"{begin}{piece * length}{end}" for length in content.lengths]
    if content.labels:
        blocks = [f"{label} {block}" for label, block in zip(content.labels, blocks, strict=True)]
    return " ".join(blocks)


def placed(ids: np.ndarray, contents: Contents, config: ModelConfig | None) -> tuple[Medium, ...]:
    """Returns the contents at the runs of their tokens in `ids`, in order of position.

    ValueError where number or length of the runs differ.
    """
    media = []
    for kind in KINDS:
        if not contents[kind]:
            continue
        token = getattr(config, f"{kind}_token_id", None)
        runs = runs_of(ids, token)
        lengths = [length for content in contents[kind] for length in content.lengths]
        if [len(run) for run in runs] != lengths:
            raise ValueError(
                f"{_ARGUMENTS[kind]}= has {len(lengths)} blocks of {_short(lengths)} soft tokens, "
                f"but the ids have {len(runs)} runs of {_short([len(run) for run in runs])} "
                f"{kind} tokens (id {token}); pass ids that were made for these contents, or text"
            )
        at = 0
        for index, content in enumerate(contents[kind]):
            media.append(Medium(content, index, tuple(runs[at : at + len(content.lengths)])))
            at += len(content.lengths)
    return tuple(sorted(media, key=lambda medium: medium.blocks[0][0]))


def _short(numbers: Sequence[int]) -> str:
    texts = [str(number) for number in numbers[:8]]
    return ", ".join(texts + ["…"] * (len(numbers) > 8)) or "no"


def runs_of(ids: np.ndarray, token: int | None) -> list[np.ndarray]:
    """Returns the positions of each run of consecutive `token`s in `ids`."""
    positions = np.flatnonzero(np.asarray(ids) == token) if token is not None else np.zeros(0, int)
    if not len(positions):
        return []
    return np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1)


def blocks(media: Sequence[Medium], bidirectional: str) -> list[tuple[int, int]]:
    """Returns the ranges [begin, end) of ids that see themselves whole in sliding layers.

    Images and frames of videos do where the config's use_bidirectional_attention is "vision".
    """
    if bidirectional != "vision":
        return []
    seen = [block for medium in media if medium.kind != "audio" for block in medium.blocks]
    return sorted((int(block[0]), int(block[-1]) + 1) for block in seen)


def engine_input(
    media: Sequence[Medium],
    config: ModelConfig,
    skipped: int = 0,
    soft_tokens: Mapping[Medium, np.ndarray] | None = None,
) -> _core.MediaInput | None:
    """Returns what the engine reads beside the prompt's ids from the `skipped`-th on; or None.

    Computes soft tokens that have not been asked for before; `soft_tokens` are instead of them.
    """
    given = soft_tokens or {}
    media = [medium for medium in media if medium.positions[-1] >= skipped]
    if not media:
        return None
    rows = np.concatenate([medium.positions for medium in media]).astype(np.int64)
    tokens = np.concatenate([given[m] if m in given else m.soft_tokens for m in media])
    kept = rows >= skipped
    ranges = [
        (begin - skipped, end - skipped)
        for begin, end in blocks(media, config.text.bidirectional)
        if begin >= skipped
    ]
    # transformers looks up this id's per-layer embedding where a soft token stands.
    padding = config.pad_token_id or 0
    return _core.MediaInput((rows[kept] - skipped).tolist(), tokens[kept], padding, ranges)
