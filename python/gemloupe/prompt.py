"""From what a caller passes as `x` to token ids, and where things are in them."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gemloupe.chat_template import check_messages
from gemloupe.errors import did_you_mean, one_of, quoted
from gemloupe.media import Medium, Reader
from gemloupe.media import placing as _placing
from gemloupe.tokenizer import StreamDecoder, Tokenizer
from gemloupe.tools import Tool, parse_tools

if TYPE_CHECKING:
    from gemloupe.adapters.selection import Selection
    from gemloupe.config import ModelConfig

Kind = Literal["image", "audio", "video", "system", "user", "model", "thought", "tool"]
KINDS = ("image", "audio", "video", "system", "user", "model", "thought", "tool")
_MEDIA = ("image", "audio", "video")
_ROLES = {"system": ("system", "developer"), "user": ("user",), "model": ("model", "assistant")}


@dataclass(frozen=True, eq=False)
class Prompt:
    """What a model is about to read. Everything but `ids` is worked out when asked for.

    `ids` [T] are int32 and read-only. `form` is "text", "chat" or "ids", as the caller gave it.
    """

    ids: np.ndarray
    form: str
    tokenizer: Tokenizer = field(repr=False)
    config: ModelConfig | None = field(default=None, repr=False)
    thinking: bool = False
    media: tuple[Medium, ...] = ()
    """Images, sounds and videos in order of position."""
    messages: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)
    """The chat that the ids come from; empty for text and ids."""
    tools: tuple[Tool, ...] = field(default=(), repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"Prompt({len(self.ids)} tokens from {self.form})"

    def under(self, adapters: Selection) -> Prompt:
        """The same prompt, whose images, sounds and videos are encoded under these adapters."""
        if not self.media:
            return self
        media = tuple(
            dataclasses.replace(medium, content=medium.content.under(adapters))
            for medium in self.media
        )
        return dataclasses.replace(self, media=media)

    @functools.cached_property
    def tokens(self) -> list[str]:
        """The vocabulary's piece of every id (a space is U+2581)."""
        return self.tokenizer.tokens(self.ids)

    @functools.cached_property
    def text(self) -> str:
        """The text of all ids, special tokens written out."""
        return self.tokenizer.decode(self.ids, skip_special=False)

    def find(self, text: str, index: int | None = None) -> np.ndarray:
        """Returns the positions of the tokens that `text` lies in, wholly or partly.

        All occurrences together, or the `index`-th (from 0, negative from the end) alone.
        Raises ValueError where there is none.
        """
        if not text:
            raise ValueError("text to find is empty; pass at least one character")
        begins, ends, data = self._spans
        needle = text.encode()
        found = []
        at = data.find(needle)
        while at >= 0:
            touched = (begins < at + len(needle)) & (ends > at)
            found.append(np.flatnonzero(touched))
            at = data.find(needle, at + len(needle))
        if not found:
            raise ValueError(
                f"{quoted(text)} does not occur in the prompt {quoted(self.text)}; "
                "print(prompt.text) shows all of it"
            )
        return _pick(found, index, f"occurrences of {quoted(text)}")

    def positions(self, kind: Kind | str, index: int | None = None) -> np.ndarray:
        """Returns the positions of one kind of content, all or the `index`-th block of it.

        "system", "user", "model": the contents of these turns, without the tokens that mark them.
        "thought": inside the thinking channel; "tool": inside tool results; "image", "audio",
        "video": soft tokens. No such block: an empty array, or ValueError with `index`.
        """
        return find_positions(self.ids, kind, index, self.tokenizer, self.config)

    @functools.cached_property
    def _spans(self) -> tuple[np.ndarray, np.ndarray, bytes]:
        """Begin and end [T] of every token in the UTF-8 bytes of the text, and these bytes."""
        decoder = StreamDecoder(self.tokenizer, skip_special=False)
        ends = np.zeros(len(self.ids), np.int64)
        begins = np.zeros(len(self.ids), np.int64)
        data = b""
        first = 0  # First token whose text has not come yet.
        for position, token in enumerate(self.ids.tolist()):
            text = decoder.push(token)
            if position == len(self.ids) - 1:
                text += decoder.flush()
            if not text:
                if not decoder.holding:  # An id without a piece.
                    begins[position] = ends[position] = len(data)
                    first = position + 1
                continue
            piece = text.encode()
            count = position + 1 - first
            held = _split_run(piece, count)
            begins[first : position + 1] = len(data) + held[:-1]
            ends[first : position + 1] = len(data) + held[1:]
            data += piece
            first = position + 1
        return begins, ends, data


def _split_run(piece: bytes, count: int) -> np.ndarray:
    """Returns the `count` + 1 boundaries of tokens whose text came in one piece.

    All but the last are byte tokens: one byte each, or the three of U+FFFD in a run that is not
    UTF-8. The text does not tell which; where neither fits, all of it goes to the last token.
    """
    for width, run in ((3, "\ufffd".encode() * (count - 1)), (1, b"")):
        if count > 1 and len(piece) > width * (count - 1) and piece.startswith(run):
            return np.array([*(width * i for i in range(count)), len(piece)])
    if len(piece) in (count, 3 * count):  # The run is the end of the prompt.
        return np.arange(count + 1) * (len(piece) // count)
    return np.array([0] * count + [len(piece)])


def find_positions(
    ids: np.ndarray,
    kind: str,
    index: int | None,
    tokenizer: Tokenizer,
    config: ModelConfig | None,
) -> np.ndarray:
    """Returns `Prompt.positions` for any ids [T], those of prompt and answer together included."""
    if kind not in KINDS:
        raise ValueError(
            f"kind {quoted(kind)} is not known; expected {one_of(KINDS)}. "
            + did_you_mean(kind, KINDS)
        )
    if kind in _MEDIA:
        blocks = _placing.runs_of(ids, getattr(config, f"{kind}_token_id", None))
    elif kind == "thought":
        blocks = _channel_blocks(ids, tokenizer)
    elif kind == "tool":
        blocks = _between(ids, tokenizer.id("<|tool_response>"), tokenizer.id("<tool_response|>"))
    else:
        blocks = _turn_blocks(ids, tokenizer, _ROLES[kind])
    return _pick(blocks, index, f"{kind} blocks")


def _pick(blocks: list[np.ndarray], index: int | None, what: str) -> np.ndarray:
    if index is None:
        return np.unique(np.concatenate(blocks)) if blocks else np.zeros(0, np.int64)
    if not -len(blocks) <= index < len(blocks):
        raise ValueError(
            f"index {index} is out of range: there are {len(blocks)} {what}; "
            "count from 0, or from -1 backwards"
        )
    return blocks[index]


def _between(ids: np.ndarray, open_id: int | None, close_id: int | None) -> list[np.ndarray]:
    """Returns the positions between each opening token and the next closing one, or the end."""
    ids = np.asarray(ids)
    if open_id is None or close_id is None:
        return []
    closes = np.flatnonzero((ids == close_id) | (ids == open_id))
    blocks = []
    for start in np.flatnonzero(ids == open_id):
        after = closes[closes > start]
        blocks.append(np.arange(start + 1, after[0] if len(after) else len(ids)))
    return blocks


def _after_line(block: np.ndarray, ids: np.ndarray, tokenizer: Tokenizer) -> tuple[str, np.ndarray]:
    """Splits a block at the first token with a newline: (first line's text, the rest)."""
    tokens = tokenizer.tokens(np.asarray(ids)[block[:16]])
    line = ""
    for count, token in enumerate(tokens):
        head, newline, _ = token.partition("\n")
        line += head
        if newline:
            return line, block[count + 1 :]
    return line, block[len(block) :]


def _turn_blocks(ids: np.ndarray, tokenizer: Tokenizer, roles: tuple[str, ...]) -> list[np.ndarray]:
    turns = _between(ids, tokenizer.id("<|turn>"), tokenizer.id("<turn|>"))
    named = (_after_line(turn, ids, tokenizer) for turn in turns)
    return [content for role, content in named if role.strip() in roles]


def _channel_blocks(ids: np.ndarray, tokenizer: Tokenizer) -> list[np.ndarray]:
    channels = _between(ids, tokenizer.id("<|channel>"), tokenizer.id("<channel|>"))
    return [_after_line(channel, ids, tokenizer)[1] for channel in channels]


def prepare(
    x: Any,
    tokenizer: Tokenizer,
    config: ModelConfig | None,
    *,
    thinking: bool = False,
    tools: Sequence[Any] | None = None,
    bos: bool | str = "auto",
    images: Any = None,
    audio: Any = None,
    videos: Any = None,
    max_soft_tokens: Any = None,
    reader: Reader | None = None,
) -> Prompt | list[Prompt]:
    """Turns `x` into a `Prompt`, or a batch into a list of them.

    A str is raw text, a list of dicts one chat, a list of ints or a 1-D integer array ids (taken as
    given); a `Prompt` passes through; a list of these is a batch. `bos="auto"` begins text and
    chats with exactly one BOS, False (used when a cache is continued) with none.

    `images`, `audio`, `videos`: one, or a list in the order of their placeholders (<|image|>, …) or
    message parts ({"type": "image"}, …; a part may bring its own: {"type": "image", "image": …}).
    Ids must hold their runs of soft tokens already. In a batch, a list with one entry a row.
    `max_soft_tokens`: of every image, or a list of one number an image. `reader` reads them.
    """
    given = {"images": images, "audio": audio, "videos": videos}
    if not is_batch(x) or isinstance(max_soft_tokens, (list, tuple)):
        given["max_soft_tokens"] = max_soft_tokens
    arguments = _Arguments(tokenizer, config, bool(thinking), parse_tools(tools), bos, reader)
    if not is_batch(x):
        return _prepare_row(x, arguments, given, "x")
    rows = list(x)
    if not rows:
        raise ValueError("the batch is empty; pass at least one prompt")
    for name, value in given.items():
        is_list = isinstance(value, (list, tuple))
        if value is not None and not (is_list and len(value) == len(rows)):
            got = f"{len(value)} entries" if is_list else f"a {type(value).__name__}"
            raise ValueError(
                f"{name}= is {got}, but the batch has {len(rows)} prompts; expected a list with "
                "one entry a prompt, None where it has none"
            )
    budget = {} if "max_soft_tokens" in given else {"max_soft_tokens": max_soft_tokens}
    return [
        _prepare_row(row, arguments, _entry(given, i) | budget, f"x[{i}]")
        for i, row in enumerate(rows)
    ]


def _entry(given: Mapping[str, Any], index: int) -> dict[str, Any]:
    return {name: None if value is None else value[index] for name, value in given.items()}


def is_batch(x: Any) -> bool:
    """Whether `x` is a list of str, chats, id lists or prompts, or a 2-D array."""
    if isinstance(x, (list, tuple)):
        return bool(x) and not (isinstance(x[0], Mapping) or _is_number(x[0]))
    return getattr(x, "ndim", 1) == 2


def _is_number(value: Any) -> bool:
    """Whether `value` is one id; floats are let through to be refused with a better message."""
    if isinstance(value, (str, Mapping, list, tuple, Prompt)):
        return False
    return isinstance(value, (int, float, np.number)) or getattr(value, "ndim", None) == 0


@dataclass(frozen=True)
class _Arguments:
    tokenizer: Tokenizer
    config: ModelConfig | None
    thinking: bool
    tools: list[Tool] | None
    bos: bool | str
    reader: Reader | None


def _prepare_row(x: Any, arguments: _Arguments, media: Mapping[str, Any], name: str) -> Prompt:
    tokenizer = arguments.tokenizer
    given = _placing.Given(arguments.reader, media)
    if isinstance(x, Prompt):
        if given:
            raise ValueError(f"{name} is prepared already; give its images to model.prepare")
        return x
    if isinstance(x, (list, tuple)) and x and isinstance(x[0], Mapping):
        return _prepare_chat(x, arguments, given, name)
    if arguments.thinking or arguments.tools:
        option = "thinking=True" if arguments.thinking else "tools="
        raise ValueError(
            f"{option} needs a chat, whose template turns it on, but {name} is no list of "
            "messages; use model.chat(text), or pass messages"
        )
    if isinstance(x, str):
        _warn_raw_text(tokenizer)
        contents = given.contents()
        text = _placing.expanded(x, contents, arguments.config, tokenizer)
        ids = tokenizer.encode(text, bos=arguments.bos)
        return _prompt(ids, "text", arguments, f"{name} ({quoted(x)})", contents)
    if isinstance(x, Mapping):
        raise TypeError(f"{name} is one message; a chat is a list of messages: pass [{name}]")
    return _prompt(_as_ids(x, name), "ids", arguments, name, given.contents())


def _prepare_chat(
    messages: Sequence[Any], arguments: _Arguments, given: _placing.Given, name: str
) -> Prompt:
    check_messages(messages)
    contents = given.contents(messages)
    tokenizer = arguments.tokenizer
    tools = arguments.tools
    schemas = None if tools is None else [tool.schema for tool in tools]
    text = tokenizer.chat_template.render(messages, tools=schemas, thinking=arguments.thinking)
    text = _placing.expanded(text, contents, arguments.config, tokenizer)
    ids = tokenizer.encode(text, bos=arguments.bos)
    if arguments.bos is False:
        ids = tokenizer.without_bos(ids)
    prompt = _prompt(ids, "chat", arguments, name, contents)
    return dataclasses.replace(prompt, messages=tuple(messages), tools=tuple(tools or ()))


def _is_array_like(x: Any) -> bool:
    """Whether NumPy can read `x` without DLPack, which refuses read-only arrays before NumPy 2."""
    return isinstance(x, (list, tuple)) or hasattr(x, "__array__")


def _as_ids(x: Any, name: str) -> np.ndarray:
    if isinstance(x, (list, tuple)):
        for index, value in enumerate(x):
            if isinstance(value, (bool, float)) or not _is_number(value):
                raise TypeError(
                    f"{name}[{index}] is {quoted(value)} ({type(value).__name__}) in a list that "
                    "begins with ids; expected an int"
                )
    elif not (hasattr(x, "__array__") or hasattr(x, "__dlpack__")):
        raise TypeError(
            f"{name} must be a str, a list of messages, a list or 1-D array of ids, a Prompt, or a "
            f"list of these; got {type(x).__name__}"
        )
    array = np.asarray(x) if _is_array_like(x) else np.from_dlpack(x)
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"{name} has dtype {array.dtype}; expected integers (token ids)")
    if array.ndim != 1:
        raise ValueError(
            f"{name} has {array.ndim} dimensions; expected 1 (a sequence of ids), or 2 for a batch"
        )
    return array


def _prompt(
    ids: Any, form: str, arguments: _Arguments, name: str, contents: _placing.Contents
) -> Prompt:
    array = np.asarray(ids)
    if not array.size:
        raise ValueError(f"{name} is empty; pass at least one token")
    if arguments.config is not None:
        size = arguments.config.text.vocab_size
        wrong = np.flatnonzero((array < 0) | (array >= size))
        if len(wrong):
            advice = "check which tokenizer made them"
            if form != "ids":
                advice = "tokenizer.json does not belong to this checkpoint: download it again"
            raise ValueError(
                f"{name} has the id {array[wrong[0]]} at position {wrong[0]}; expected 0 to "
                f"{size - 1} (vocab_size in config.json); {advice}"
            )
    array = array.astype(np.int32)
    array.setflags(write=False)
    thinking = arguments.thinking and form == "chat"
    media = _placing.placed(array, contents, arguments.config)
    return Prompt(array, form, arguments.tokenizer, arguments.config, thinking, media)


def _warn_raw_text(tokenizer: Tokenizer) -> None:
    if tokenizer.raw_text_warned or tokenizer.chat_template.is_default:
        return
    tokenizer.raw_text_warned = True
    warnings.warn(
        "a str is raw text, but this checkpoint was tuned for chats: use model.chat(text), or pass "
        '[{"role": "user", "content": text}] (said once)',
        stacklevel=4,
    )
