"""What kind of token a vocabulary piece is: for tables of which experts handle what."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable

import numpy as np

CLASSES = ("digits", "words", "punctuation", "whitespace", "special", "tool syntax", "other")
"""In the order of tables. "special": tokens that mark turns, channels and media, <bos> and such;
"tool syntax": those that mark tool declarations, calls, results, and their strings."""

_TOOL = re.compile(r"<\|?tool(_call|_response)?\|?>|<\|\"\|>")
_SPECIAL = re.compile(r"<\|\w+\|?>|<\w+\|>|<(pad|bos|eos|unk|mask|unused\d+)>")
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACES = " \t\n\v\f\r\u2581"


def classify(tokens: Iterable[str]) -> np.ndarray:
    """Returns the class [T] (str) of each piece; the space before a word (U+2581) does not count.

    digits: decimal digits alone; words: letters, combining marks and apostrophes; punctuation:
    Unicode's punctuation and its mathematical, currency and modifier symbols; other: mixtures of
    these, emoji, single bytes, `<id 5>` of a checkpoint without a tokenizer.
    """
    return np.array([_class_of(token) for token in tokens], dtype="U11")


@functools.lru_cache(maxsize=1 << 16)
def _class_of(token: str) -> str:
    if _TOOL.fullmatch(token):
        return "tool syntax"
    if _SPECIAL.fullmatch(token):
        return "special"
    if byte := _BYTE.fullmatch(token):
        return "whitespace" if chr(int(byte[1], 16)) in _SPACES else "other"
    text = token.strip(_SPACES)
    if not text:
        return "whitespace" if token else "other"
    if token.startswith("<id "):
        return "other"
    kinds = {unicodedata.category(character) for character in text}
    if kinds == {"Nd"}:
        return "digits"
    if all(kind[0] == "P" or kind in ("Sm", "Sc", "Sk") for kind in kinds):
        return "punctuation"
    letters = {unicodedata.category(c)[0] for c in text if c not in "'\u2019"}
    return "words" if "L" in letters and letters <= {"L", "M"} else "other"
