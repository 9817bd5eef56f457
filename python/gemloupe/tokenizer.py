"""Text to token ids and back, with the checkpoint's own tokenizer.json.

A Gemma 4 tokenizer takes a second or more to load, so that is done when text is first encoded or
decoded; work on ids never needs it. A background thread would not help: the `tokenizers` library
keeps the GIL while it loads, and every other thread would stand still.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemloupe import strict_json

if TYPE_CHECKING:
    import tokenizers

    from gemloupe.chat_template import ChatTemplate
    from gemloupe.config import ModelConfig

NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_REPLACEMENT = "\ufffd"


class Tokenizer:
    """The tokenizer of one checkpoint folder.

    The token ids that `config` names win over the pieces that tokenizer_config.json names.
    """

    def __init__(self, folder: str | Path, config: ModelConfig | None = None) -> None:
        self.folder = Path(folder)
        self.config = config
        self._lock = threading.Lock()
        self._backend: tokenizers.Tokenizer | None = None
        self._special_ids: frozenset[int] = frozenset()
        self._chat_template: ChatTemplate | None = None
        self._settings: dict[str, Any] | None = None
        self.raw_text_warned = False

    def __reduce__(self) -> tuple[Any, ...]:
        # The folder is read again where it is unpickled.
        return type(self), (self.folder, self.config)

    def __repr__(self) -> str:
        state = f"{self.vocab_size} pieces" if self.loaded else "not loaded yet"
        return f"Tokenizer({str(self.folder)!r}, {state})"

    @property
    def loaded(self) -> bool:
        """Whether tokenizer.json has been read already."""
        return self._backend is not None

    @property
    def exists(self) -> bool:
        """Whether the checkpoint has a tokenizer; ids run without."""
        return (self.folder / "tokenizer.json").is_file()

    def _load(self) -> tokenizers.Tokenizer:
        with self._lock:
            if self._backend is None:
                backend = self._read_backend()
                added = backend.get_added_tokens_decoder()
                self._special_ids = frozenset(i for i, token in added.items() if token.special)
                self._backend = backend
            return self._backend

    def _read_backend(self) -> tokenizers.Tokenizer:
        return _read_tokenizer(self.folder / "tokenizer.json")

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """The `tokenizers.Tokenizer`, loaded now if it is not yet.

        Raises FileNotFoundError where the folder has no tokenizer.json, ValueError if broken.
        """
        return self._backend if self._backend is not None else self._load()

    @property
    def settings(self) -> dict[str, Any]:
        """The contents of tokenizer_config.json, {} where there is none."""
        if self._settings is None:
            path = self.folder / "tokenizer_config.json"
            self._settings = strict_json.read_object(path) if path.is_file() else {}
        return self._settings

    @property
    def named_tokens(self) -> dict[str, str]:
        """Pieces by role, such as {"bos_token": "<bos>"}, as a chat template sees them."""
        named = {}
        for name in NAMED_TOKENS:
            value = self.settings.get(name)
            if isinstance(value, Mapping):
                value = value.get("content")
            if isinstance(value, str):
                named[name] = value
        if "bos_token" not in named and self.config and self.config.bos_token_id is not None:
            named["bos_token"] = self.tokens([self.config.bos_token_id])[0]
        return named

    @property
    def vocab_size(self) -> int:
        """Number of pieces, added tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of the special tokens, which `decode` leaves out."""
        self._load()
        return self._special_ids

    @property
    def bos_id(self) -> int | None:
        """Id of the token that begins every sequence; None if neither config file names one."""
        if self.config and self.config.bos_token_id is not None:
            return self.config.bos_token_id
        return self._named_id("bos_token")

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a sequence, from config.json, else tokenizer_config.json."""
        if self.config and self.config.eos_token_ids:
            return self.config.eos_token_ids
        eos_id = self._named_id("eos_token")
        return () if eos_id is None else (eos_id,)

    def _named_id(self, name: str) -> int | None:
        piece = self.named_tokens.get(name)
        return None if piece is None else self.id(piece)

    def id(self, piece: str) -> int | None:
        """Returns the id of exactly this piece, None if the vocabulary lacks it."""
        return self.backend.token_to_id(piece)

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """Returns the piece of every id as the vocabulary spells it (a space is U+2581)."""
        pieces = ((int(i), self.backend.id_to_token(int(i))) for i in ids)
        return [f"<id {i}>" if piece is None else piece for i, piece in pieces]

    def encode(self, text: str, bos: bool | str = "auto") -> list[int]:
        """Encodes `text`; special pieces written out in it become their ids.

        `bos`: "auto" makes the result begin with exactly one BOS (where the checkpoint has one),
        True does the same and insists on a BOS, False adds and removes nothing.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, got {type(text).__name__}")
        if bos not in (True, False, "auto"):
            raise ValueError(f'bos must be "auto", True or False, got {bos!r}')
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text has a lone surrogate at character {error.start}; "
                "decode its bytes with errors='replace' first"
            ) from error
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return ids if bos is False else self.with_one_bos(ids, required=bos is True)

    def with_one_bos(self, ids: list[int], required: bool = False) -> list[int]:
        """Returns `ids` beginning with exactly one BOS."""
        bos_id = self.bos_id
        if bos_id is None:
            if required:
                raise ValueError(
                    f"{self.folder}: neither config.json (bos_token_id) nor tokenizer_config.json "
                    "(bos_token) names a BOS token; pass bos=False or add one of them"
                )
            return ids
        return [bos_id, *self.without_bos(ids)]

    def without_bos(self, ids: list[int]) -> list[int]:
        """Returns `ids` without the BOS tokens at their beginning."""
        start = 0
        while start < len(ids) and ids[start] == self.bos_id:
            start += 1
        return ids[start:]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Decodes `ids`; special tokens are left out unless `skip_special` is False."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    @property
    def chat_template(self) -> ChatTemplate:
        """The checkpoint's chat template, or gemloupe's Gemma 4 default (`.is_default`)."""
        if self._chat_template is None:
            self._chat_template = self._read_chat_template()
        return self._chat_template

    def _read_chat_template(self) -> ChatTemplate:
        from gemloupe.chat_template import load_chat_template

        return load_chat_template(self.folder, self.settings, self.config, self.named_tokens)


def _read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    import tokenizers

    if not path.is_file():
        hint = "download it from where the weights came from"
        if path.with_name("tokenizer.model").is_file():
            hint = (
                "only tokenizer.model is there: transformers' "
                "AutoTokenizer.from_pretrained(folder).save_pretrained(folder) writes it"
            )
        raise FileNotFoundError(
            f"{path}: no such file, but text needs it; {hint}, or pass token ids"
        )
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # The library raises plain Exception.
        raise ValueError(
            f"{path}: not a tokenizer that `tokenizers` can read ({error}); download it again"
        ) from error


class StreamDecoder:
    """Decodes ids one by one; what it has returned never changes.

    The pieces joined, `flush()` included, equal `tokenizer.decode` of all ids. A run of
    byte-fallback tokens is held back until it ends: one bad byte makes all of its run U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._backend = tokenizer.backend
        self._hidden = tokenizer.special_ids if skip_special else frozenset()
        self._held: list[int] = []
        # The last token returned, since some decoders treat the first token of a text differently.
        self._context: list[int] = []

    @property
    def holding(self) -> bool:
        """Whether some of the ids pushed so far are held back."""
        return bool(self._held)

    def push(self, id: int) -> str:
        """Takes the next id and returns the text that is certain now, often ""."""
        piece = self._backend.id_to_token(id)
        if piece is None or id in self._hidden:
            return ""
        self._held.append(id)
        if _BYTE_PIECE.fullmatch(piece):
            return ""
        text = self._decode_held()
        # Byte-level vocabularies cut characters anywhere; the rest of this one is still to come.
        if text.endswith(_REPLACEMENT) and _REPLACEMENT not in piece:
            return ""
        return self._release(text)

    def flush(self) -> str:
        """Returns the text held back, at the end of the stream."""
        text = self._decode_held() if self._held else ""
        self._held = []
        self._context = []
        return text

    def _decode_held(self) -> str:
        if not self._context:
            return self._backend.decode(self._held, skip_special_tokens=False)
        before = self._backend.decode(self._context, skip_special_tokens=False)
        both = self._backend.decode(self._context + self._held, skip_special_tokens=False)
        return both[len(before) :]

    def _release(self, text: str) -> str:
        self._context = self._held[-1:]
        self._held = []
        return text
