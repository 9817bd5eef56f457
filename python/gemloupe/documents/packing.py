"""`gl.pack`: files in one prompt, each with its span of positions, read by the model once."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from gemloupe import override
from gemloupe.cache import BASE, KvCache
from gemloupe.documents import kept_caches, pdf
from gemloupe.documents.text_file import Unreadable, decoded, read_bytes
from gemloupe.documents.walk import Found, LeftOut, files
from gemloupe.errors import bullet_list, quoted
from gemloupe.media import Content
from gemloupe.media import placing as _placing
from gemloupe.media.images import BUDGETS, DEFAULT_BUDGET
from gemloupe.progress import ProgressBar
from gemloupe.prompt import Prompt
from gemloupe.table import Table
from gemloupe.tokenizer import Tokenizer
from gemloupe.tools import Tool, parse_tools

if TYPE_CHECKING:
    from gemloupe.model import Model
    from gemloupe.output import Output
    from gemloupe.stream import Stream

MAX_TEXT_BYTES = 16 << 20
"""Of one text file."""
# No text has so many characters a token.
_MOST_CHARACTERS = 16
# Tokens of one pass while documents are read: a multiple of the engine's chunk.
_PASS = 2048
# Stands for the documents while the chat template is rendered.
_MARK = "\ue000documents\ue000"
_NO_IMAGES: Mapping[str, list[Content]] = {kind: [] for kind in ("image", "audio", "video")}


@dataclass(frozen=True)
class Document:
    """A file that is in the prompt, and where its contents stand."""

    name: str
    kind: str
    """"text", "pdf" or "pdf as images"."""
    span: slice
    """The positions of its contents, without the lines around them."""
    pages: Mapping[int, slice] = field(default_factory=dict)
    """Page number -> the positions of its contents, of a PDF."""

    @property
    def tokens(self) -> int:
        """How many tokens its contents have."""
        return int(self.span.stop - self.span.start)


def pack(
    paths: Any,
    max_tokens: int | None = None,
    *,
    model: Model,
    pages: str = "text",
    page_tokens: int = DEFAULT_BUDGET,
    system: str | None = None,
    thinking: bool = False,
    tools: Sequence[Any] | None = None,
    keep: bool = True,
    max_cache_bytes: int = kept_caches.MAX_BYTES,
) -> Pack:
    """Puts text, code and PDF files into the prompt of `model`, for any number of questions.

    pack = gl.pack(["src", "report.pdf"], max_tokens=20_000, model=model)
    print(pack)  # what is in it, at which positions, and what was left out, and why
    out = pack.generate("What does the report say about src/a.py?")

    `paths`: files and folders, one or several; see `documents.walk.files` for what of a folder is
    read, and in which order. "a.pdf#page=3-5" is these pages. `max_tokens`: of all that stands
    before the question; None for seven eighths of the model's context. A file that does not fit
    is left out whole, and a smaller one after it may still be in. What looks like a special token
    in a file is read as ordinary text.

    `pages`: "text", or "images" for pages of PDFs as pictures of up to `page_tokens` soft tokens
    (70, 140, 280, 560 or 1120), where the model sees. `system`, `thinking` and `tools` stand before
    the documents, so that they are the same for all questions.

    The model reads the documents when the first question comes. With `keep` the filled KV cache is
    written to $XDG_CACHE_HOME/gemloupe/packs, and found there as long as files, checkpoint and
    settings are the same; the oldest go where there are more than `max_cache_bytes`.

    FileNotFoundError for a path that does not exist; ValueError where nothing is left to read, and
    for pages as images of a model that sees none; ImportError, naming the extra.
    """
    context = model.config.text.max_position_embeddings
    limit = context * 7 // 8 if max_tokens is None else max_tokens
    if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= context:
        raise ValueError(f"max_tokens is {quoted(max_tokens)}; expected 1 to {context}, or None")
    if pages not in ("text", "images"):
        raise ValueError(f"pages is {quoted(pages)}; expected 'text' or 'images'")
    if pages == "images" and model.vision is None:
        raise ValueError(
            "pages is 'images', but this model has no vision part; expected pages='text', or a "
            "multimodal checkpoint"
        )
    if page_tokens not in BUDGETS or isinstance(page_tokens, bool):
        raise ValueError(f"page_tokens is {quoted(page_tokens)}; expected one of {BUDGETS}")
    head = _Head(system, bool(thinking), tuple(parse_tools(tools) or ()))
    writer = _Writer(model, limit, page_tokens if pages == "images" else None)
    writer.add(_encoded_head(model, head))
    for found in files(paths):
        writer.read(found)
    if not writer.documents:
        reasons = [f"{each.name}: {each.reason}" for each in writer.left_out]
        raise ValueError(f"there is nothing to read in these paths:\n{bullet_list(reasons)}")
    shelf = kept_caches.Shelf(max_cache_bytes) if keep else None
    return Pack(model, head, writer, limit, shelf)


@dataclass(frozen=True)
class _Head:
    """What stands before the documents."""

    system: str | None
    thinking: bool
    tools: tuple[Tool, ...]


class Pack:
    """Documents in a prompt, made by `pack`."""

    def __init__(
        self,
        model: Model,
        head: _Head,
        written: _Writer,
        max_tokens: int,
        shelf: kept_caches.Shelf | None,
    ) -> None:
        self.model = model
        self.documents: tuple[Document, ...] = tuple(written.documents)
        """What is in the prompt, in order."""
        self.left_out: tuple[LeftOut, ...] = tuple(written.left_out)
        """(name, reason) of what is not."""
        self.max_tokens = max_tokens
        self.ids = np.array(written.ids, np.int32)
        """Token ids [T] of all that stands before a question."""
        self.ids.setflags(write=False)
        self.filled_from: str | None = None
        """ "the model" or "disk": how the cache was filled; None as long as it is not."""
        self.fill_seconds = 0.0
        self._head = head
        self._contents = {**_NO_IMAGES, "image": written.images}
        self._shelf = shelf
        self._caches: dict[tuple[str, ...], KvCache] = {}

    @functools.cached_property
    def spans(self) -> Mapping[str, slice]:
        """Name -> slice of positions, as `positions=` of edits and captures and `gl.at` take it.

        "report.pdf#page=3" is one page of a PDF.
        """
        spans = {}
        for document in self.documents:
            spans[document.name] = document.span
            for number, span in document.pages.items():
                spans[f"{document.name.partition('#')[0]}#page={number}"] = span
        return spans

    def __len__(self) -> int:
        return len(self.ids)

    def ask(self, question: Any) -> Prompt:
        """The prompt of documents and a question, as `run` and `generate` take it.

        `question`: a text, or a chat whose first message is the user's; the documents stand before
        its text. Positions are those of `spans`. ValueError for a chat that begins otherwise.
        """
        messages = _messages(question)
        first, *later = messages
        tokenizer, config = self.model.tokenizer, self.model.config
        marked = [{**first, "content": _marked(first["content"])}, *later]
        contents = _placing.Given(self.model.media_reader, {}).contents(marked)
        _before, tail = _rendered(self.model, self._head, marked)
        ids = tokenizer.encode(_placing.expanded(tail, contents, config, tokenizer), bos=False)
        whole = np.concatenate([self.ids, np.array(ids, np.int32)])
        whole.setflags(write=False)
        every = {kind: [*self._contents[kind], *contents[kind]] for kind in contents}
        return Prompt(
            whole,
            "chat",
            tokenizer,
            config,
            self._head.thinking,
            _placing.placed(whole, every, config),
            (*self._head_messages, *messages),
            self._head.tools,
        )

    @property
    def _head_messages(self) -> list[dict[str, Any]]:
        return _system_message(self._head)

    def generate(self, question: Any, **arguments: Any) -> Output | Stream:
        """Answers a question (see `ask`) with the arguments of `model.generate`.

        Only what follows the documents is read: `out.prompt` and `out.timings` are of that, at
        positions after the documents. With `edit` or `capture` all is read again, so that they
        reach the documents. Questions do not see each other; pass a chat to go on with one.
        """
        for name in ("cache", "thinking", "tools", "images", "audio", "videos"):
            if arguments.get(name):
                raise ValueError(
                    f"{name}= is not an argument of a pack's generate; pass "
                    + ("thinking= and tools= to gl.pack" if name in ("thinking", "tools")
                       else "images in the messages" if name == "images"
                       else "pack.ask(question) to model.generate")
                )  # fmt: skip
        whole = self.ask(question)
        if arguments.get("edit") is not None or arguments.get("capture"):
            return self.model.generate(whole, **arguments)  # type: ignore[return-value]
        cache = self.cache(arguments.get("adapter")).fork()
        rest = self._after(whole)
        return self.model.generate(rest, cache=cache, **arguments)  # type: ignore[return-value]

    def _after(self, whole: Prompt) -> Prompt:
        """What follows the documents, to be appended to their cache."""
        ids = whole.ids[len(self.ids) :]
        held = len(self._contents["image"])
        contents = {kind: [m.content for m in whole.media if m.kind == kind] for kind in _NO_IMAGES}
        contents["image"] = contents["image"][held:]
        media = _placing.placed(ids, contents, self.model.config)
        return Prompt(
            ids, "chat", whole.tokenizer, whole.config, whole.thinking, media, whole.messages,
            whole.tools,
        )  # fmt: skip

    def cache(self, adapter: Any = None) -> KvCache:
        """The KV cache of `ids`, filled now if it is not yet; `fork` it to append to it.

        Those that were computed under adapters, or with weights that are merged or overridden, are
        kept in memory alone.
        """
        adapters = self.model.adapters
        changed = (adapters.selected(adapter).label, adapters.merged, override.label(self.model))
        if changed in self._caches:
            return self._caches[changed]
        shelf = self._shelf if changed == (BASE, "", "") else None
        began = time.perf_counter()
        key = kept_caches.key(self.model, self.ids, self._contents["image"]) if shelf else ""
        cache = shelf.take(key, self.model, self.ids) if shelf else None
        self.filled_from = "the model" if cache is None else "disk"
        if cache is None:
            cache = self._read(adapter)
            if shelf:
                shelf.put(key, cache)
        self.fill_seconds = time.perf_counter() - began
        self._caches[changed] = cache
        return cache

    def _read(self, adapter: Any) -> KvCache:
        cache = self.model.new_cache()
        config, count = self.model.config, len(self.ids)
        # An image is not cut, and what sees it neither.
        step = count if self._contents["image"] else _PASS
        with ProgressBar("reading the documents", shown=count > _PASS) as bar:
            for begin in range(0, count, step):
                ids = self.ids[begin : begin + step]
                media = _placing.placed(ids, self._contents, config) if step == count else ()
                part = Prompt(ids, "ids", self.model.tokenizer, config, media=media)
                self.model.run(part, cache=cache, logits=None, routing=False, adapter=adapter)
                bar.show((begin + len(ids)) / count)
        return cache

    def table(self) -> Table:
        """name, kind, tokens, positions: one row a document."""
        return Table(
            {
                "name": [each.name for each in self.documents],
                "kind": [each.kind for each in self.documents],
                "tokens": [each.tokens for each in self.documents],
                "positions": [f"{e.span.start}…{e.span.stop - 1}" for e in self.documents],
            }
        )

    def __repr__(self) -> str:
        lines = [f"Pack({len(self.ids)} of {self.max_tokens} tokens)", repr(self.table())]
        if self.left_out:
            reasons = [f"{each.name}: {each.reason}" for each in self.left_out]
            lines += ["left out:", bullet_list(reasons, 40)]
        return "\n".join(lines)


def _messages(question: Any) -> list[dict[str, Any]]:
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
    fits = isinstance(messages, (list, tuple)) and messages and isinstance(messages[0], Mapping)
    if not fits or messages[0].get("role") != "user":
        raise ValueError(
            f"question is {quoted(question)}; expected a text, or a chat that begins with a user's "
            "message: instructions are gl.pack(system=…)"
        )
    content = messages[0].get("content")
    if not content or (isinstance(content, str) and not content.strip()):
        raise ValueError("question is empty; expected a text")
    return [dict(message) for message in messages]


def _marked(content: Any) -> Any:
    """A message's content with the documents' mark before it."""
    if isinstance(content, str):
        return _MARK + content.strip()
    return [{"type": "text", "text": _MARK}, *content]


def _system_message(head: _Head) -> list[dict[str, Any]]:
    return [{"role": "system", "content": head.system}] if head.system else []


def _rendered(model: Model, head: _Head, messages: Sequence[Any]) -> tuple[str, str]:
    """The chat's text before the documents and after them."""
    from gemloupe.chat_template import check_messages

    chat = [*_system_message(head), *messages]
    check_messages(chat)
    template = model.tokenizer.chat_template
    schemas = [tool.schema for tool in head.tools] or None
    text = template.render(chat, tools=schemas, thinking=head.thinking)
    parts = text.split(_MARK)
    if len(parts) != 2:
        raise ValueError(
            f"{template.origin}: the chat template writes a user's message {len(parts) - 1} times; "
            "expected once. Write the prompt yourself and pass it as text."
        )
    return parts[0], parts[1]


def _encoded_head(model: Model, head: _Head) -> list[int]:
    before, _tail = _rendered(model, head, [{"role": "user", "content": _MARK}])
    return model.tokenizer.encode(before)


class _Full(Exception):
    """A document is over the budget; the message says by what."""


class _Writer:
    """Collects ids, spans and images of documents that fit."""

    def __init__(self, model: Model, limit: int, page_tokens: int | None) -> None:
        self.ids: list[int] = []
        self.images: list[Content] = []
        self.documents: list[Document] = []
        self.left_out: list[LeftOut] = []
        self._model = model
        self._limit = limit
        self._page_tokens = page_tokens
        self._specials = _special_starts(model.tokenizer)

    def read(self, found: Found | LeftOut) -> None:
        """Adds a file, or says why not; one that does not fit leaves nothing behind."""
        if isinstance(found, LeftOut):
            self.left_out.append(found)
            return
        before = len(self.ids), len(self.images), len(self.left_out)
        try:
            self.documents.append(self._document(found))
        except (Unreadable, _Full) as problem:
            del self.ids[before[0] :], self.images[before[1] :], self.left_out[before[2] :]
            self.left_out.append(LeftOut(found.name, str(problem)))

    def _document(self, found: Found) -> Document:
        is_pdf = pdf.is_pdf(found.path)
        if found.pages is not None and not is_pdf:
            raise Unreadable("no PDF: has no pages")
        name = found.name
        if found.pages is not None:
            name += "#page={}-{}".format(*found.pages)
        self._add_text(f'<document name="{name}">\n')
        begin = len(self.ids)
        pages: dict[int, slice] = {}
        kind = "text"
        if is_pdf:
            kind = "pdf" if self._page_tokens is None else "pdf as images"
            pages = self._pages(found)
        else:
            self._add_text(_ended(decoded(read_bytes(found.path, MAX_TEXT_BYTES))))
        end = len(self.ids)
        self._add_text("</document>\n\n")
        return Document(name, kind, slice(begin, end), pages)

    def _pages(self, found: Found) -> dict[int, slice]:
        cell = self._model.vision.config.cell if self._model.vision else 0
        kind = "text" if self._page_tokens is None else "image"
        pixels = (self._page_tokens or 0) * cell**2
        spans = {}
        for page in pdf.pages(found.path, kind, found.pages, pixels):
            name = f"{found.name}#page={page.number}"
            if page.problem is not None:
                self.left_out.append(LeftOut(name, page.problem))
                continue
            if page.pixels is None and not page.text.strip():
                self.left_out.append(LeftOut(name, "holds no text (a picture?)"))
                continue
            self._add_text(f"[page {page.number}]\n")
            begin = len(self.ids)
            if page.pixels is None:
                self._add_text(_ended(page.text))
            else:
                self._add_image(page.pixels, name)
            spans[page.number] = slice(begin, len(self.ids))
        if not spans:
            raise Unreadable(
                'holds no text on its pages; pages="images" shows them to a model that sees'
                if kind == "text" else "has no page that can be drawn"
            )  # fmt: skip
        return spans

    def _add_text(self, text: str) -> None:
        left = self._limit - len(self.ids)
        if len(text) > left * _MOST_CHARACTERS:
            raise self._full(f"{len(text)} characters")
        self.add(plain_ids(text, self._model.tokenizer, self._specials))

    def _add_image(self, pixels: np.ndarray, name: str) -> None:
        config, tokenizer = self._model.config, self._model.tokenizer
        assert self._model.vision is not None
        try:
            content = self._model.vision.read(pixels, name, self._page_tokens or DEFAULT_BUDGET)
        except ValueError as error:
            raise Unreadable(str(error)) from None
        piece = tokenizer.tokens([config.image_token_id or 0])[0]
        contents = {**_NO_IMAGES, "image": [content]}
        self.add(tokenizer.encode(_placing.expanded(piece, contents, config, tokenizer), bos=False))
        self.add(plain_ids("\n", tokenizer, self._specials))
        self.images.append(content)

    def add(self, ids: list[int]) -> None:
        """Adds ids; _Full where they are too many."""
        if len(self.ids) + len(ids) > self._limit:
            raise self._full(f"{len(ids)} tokens")
        self.ids += ids

    def _full(self, what: str) -> _Full:
        left = self._limit - len(self.ids)
        return _Full(f"over the budget: {left} of {self._limit} tokens were left for its {what}")


def _ended(text: str) -> str:
    return text if text.endswith("\n") else text + "\n"


def _special_starts(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Matches, without taking it, where a special token is written out."""
    pieces = sorted({piece for piece in tokenizer.tokens(tokenizer.special_ids) if len(piece) > 1})
    return (
        re.compile("(?=" + "|".join(map(re.escape, pieces)) + ")") if pieces else re.compile("$^")
    )


def plain_ids(text: str, tokenizer: Tokenizer, specials: re.Pattern[str]) -> list[int]:
    """Token ids of a stranger's text: what looks like a special token becomes ordinary ones."""
    cuts = [0, *(match.start() + 1 for match in specials.finditer(text)), len(text)]
    ids: list[int] = []
    for begin, end in zip(cuts, cuts[1:], strict=False):
        if begin < end:
            ids += tokenizer.encode(text[begin:end], bos=False)
    return ids
