"""The tokenizer and the chat template inside a GGUF file.

llama.cpp's converter keeps the vocabulary, the merges and the types of the pieces, not the
pipeline around them. Gemma 4's is always the same (transformers' GemmaTokenizer): spaces become
U+2581, special pieces are cut out first, the rest is byte-pair encoding with bytes to fall back on.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from gemloupe.chat_template import ChatTemplate, load_chat_template
from gemloupe.errors import quoted
from gemloupe.tokenizer import Tokenizer

if TYPE_CHECKING:
    import tokenizers

    from gemloupe import _core
    from gemloupe.config import ModelConfig

_SPACE = "\u2581"
# Written for a space inside a merge's part, where a space parts the two.
_SPACE_IN_MERGE = chr(ord(" ") + 256)
# Types of pieces, as llama.cpp numbers them.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
# The converter calls these user-defined, so that llama.cpp prints them; they are special.
_SHOWN_SPECIAL = (
    "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>",
    "<tool_response|>", '<|"|>',
)  # fmt: skip
_NAMED = {
    "bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "sep_token": "seperator",
    "pad_token": "padding", "cls_token": "cls", "mask_token": "mask",
}  # fmt: skip
_PREFIX = "tokenizer.ggml."
_AGAIN = "Download the file again, or convert the original checkpoint with llama.cpp's converter."


class GgufTokenizer(Tokenizer):
    """Like `Tokenizer`, from the metadata of a GGUF file; read when text is first encoded."""

    def __init__(
        self, path: Path, header: _core.GgufFile, config: ModelConfig | None = None
    ) -> None:
        super().__init__(path, config)
        self._header = header
        self._keys = frozenset(header.keys)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.folder, self.config)

    @property
    def exists(self) -> bool:
        return f"{_PREFIX}model" in self._keys

    def _read_backend(self) -> tokenizers.Tokenizer:
        import tokenizers
        from tokenizers import decoders, models, normalizers, pre_tokenizers

        if not self.exists:
            raise FileNotFoundError(
                f"{self.folder}: has no tokenizer, but text needs one; convert the checkpoint "
                "with its tokenizer, or pass token ids"
            )
        self._refuse_unless("model", ("gemma4",))
        self._refuse_unless("pre", ("gemma4", "default"), optional=True)
        self._refuse_unless("add_space_prefix", (False,), optional=True)
        pieces = self._array("tokens", str)
        types = self._array("token_type", int)
        if len(types) != len(pieces):
            self._refuse("token_type", f"an array of {len(types)}", f"{len(pieces)}, as tokens")
        vocabulary = {piece: i for i, piece in enumerate(pieces)}
        if len(vocabulary) != len(pieces):
            self._refuse("tokens", "a list with a piece twice", "every piece once")
        unknown = self._header.item(f"{_PREFIX}tokens", self._id("unknown_token_id"))
        backend = tokenizers.Tokenizer(
            models.BPE(
                vocab=vocabulary,
                merges=self._merges(vocabulary),
                unk_token=unknown,
                fuse_unk=True,
                byte_fallback=_BYTE in types,
            )
        )
        backend.normalizer = normalizers.Replace(" ", _SPACE)
        # As in the original; after the normaliser it finds nothing to split.
        backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        backend.decoder = decoders.Sequence(
            [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        added = [i for i, kind in enumerate(types) if kind in (_CONTROL, _USER_DEFINED)]
        for special in (True, False):
            tokens = [
                tokenizers.AddedToken(pieces[i], normalized=False, special=special)
                for i in added
                if special == (types[i] == _CONTROL or pieces[i] in _SHOWN_SPECIAL)
            ]
            (backend.add_special_tokens if special else backend.add_tokens)(tokens)
        return backend

    def _merges(self, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
        merges = []
        for merge in self._array("merges", str):
            left, space, right = merge.partition(" ")
            if left not in vocabulary or right not in vocabulary:
                left = left.replace(_SPACE_IN_MERGE, " ")
                right = right.replace(_SPACE_IN_MERGE, " ")
            if not space or any(p not in vocabulary for p in (left, right, left + right)):
                self._refuse("merges", f"{quoted(merge)} among others", "two pieces of tokens each")
            merges.append((left, right))
        return merges

    def _refuse(self, key: str, got: str, expected: str) -> NoReturn:
        raise ValueError(f"{self.folder}: {_PREFIX}{key} is {got}; expected {expected}. {_AGAIN}")

    def _refuse_unless(self, key: str, allowed: tuple[object, ...], optional: bool = False) -> None:
        if optional and _PREFIX + key not in self._keys:
            return
        value = self._header.get(_PREFIX + key)
        if value not in allowed:
            self._refuse(key, quoted(value), " or ".join(repr(a) for a in allowed))

    def _array(self, key: str, kind: type) -> list[Any]:
        length = self._header.length(_PREFIX + key) if _PREFIX + key in self._keys else None
        if length is None:
            self._refuse(key, "missing or no array", "a list")
        values = self._header.get(_PREFIX + key)
        if not all(type(value) is kind for value in values):
            self._refuse(key, "a list of other values", f"a list of {kind.__name__}")
        return values

    def _id(self, key: str) -> int:
        """A token id of the metadata; -1 where there is none."""
        if _PREFIX + key not in self._keys:
            return -1
        value = self._header.get(_PREFIX + key)
        if type(value) is not int:
            self._refuse(key, quoted(value), "a token id")
        return value

    @property
    def settings(self) -> dict[str, Any]:
        """What tokenizer_config.json would name: the pieces by role."""
        if self._settings is None:
            settings = {}
            for name, key in _NAMED.items():
                piece = None
                if _PREFIX + "tokens" in self._keys:
                    piece = self._header.item(_PREFIX + "tokens", self._id(f"{key}_token_id"))
                if isinstance(piece, str):
                    settings[name] = piece
            self._settings = settings
        return self._settings

    def _read_chat_template(self) -> ChatTemplate:
        templates = {}
        prefix = "tokenizer.chat_template"
        for key in sorted(self._keys):
            if key == prefix or key.startswith(f"{prefix}."):
                templates[key[len(prefix) + 1 :] or "default"] = self._header.get(key)
        if not templates:
            return load_chat_template(self.folder, {}, self.config, self.named_tokens)
        for name, template in templates.items():
            if not isinstance(template, str):
                self._refuse(f"chat_template ({name})", quoted(template), "a string")
        return ChatTemplate(templates, self.named_tokens, origin=str(self.folder))


def _reopened(path: Path, config: ModelConfig | None) -> GgufTokenizer:
    from gemloupe import _core

    return GgufTokenizer(path, _core.GgufFile(str(path)), config)
