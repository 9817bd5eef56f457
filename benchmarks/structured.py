"""What answers of a given form cost while decoding: free text and each form, in turns.

    python benchmarks/structured.py MODEL [--new 64] [--rounds 3] [--rows 1] [--threads N]

MODEL is a folder, a GGUF file or demo:edge. Where it has no tokenizer (random_packed.py), a random
vocabulary of its size stands in: masks depend on how many pieces there are and how they begin, not
on what they mean. Forms are such that an answer has no end before --new tokens. The target is a
decode at most 5 % slower than without a form.
"""

from __future__ import annotations

import argparse
import json
import statistics
import string
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import gemloupe as gl
from gemloupe.answer import MARKS
from gemloupe.structured import compiler, parse_response_format
from gemloupe.tokenizer import Tokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "mail": {"type": "string", "pattern": "^[a-z]+@[a-z]+[.]com$"},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 2},
    },
    "required": ["name", "age", "mail", "tags"],
    "additionalProperties": False,
}
FORMS: dict[str, Any] = {
    "free": None,
    "schema": {"type": "array", "items": PERSON, "minItems": 1000},
    "strings": {"type": "array", "items": {"type": "string", "minLength": 5}, "minItems": 1000},
    "regex": {"regex": r"([A-Z][a-z]{2,9} ){5000}"},
}


def random_vocabulary(folder: Path, size: int) -> None:
    """Writes a byte-fallback BPE tokenizer of `size` pieces whose lengths are like a real one's."""
    from tokenizers import AddedToken, decoders, models, normalizers
    from tokenizers import Tokenizer as Backend

    generator = np.random.default_rng(0)
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<|think|>", "<|tool>", *MARKS]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "\n"]
    pieces += [c for c in string.printable[:95] if c != " "]
    odds = 1 / np.arange(2, 28)
    stream = generator.choice(list("etaoinshrdlucmfwypvbgkqjxz"), 12 * size, p=odds / odds.sum())
    text, at = "".join(stream), 0
    seen = dict.fromkeys(pieces)
    while len(seen) < size:
        length = min(14, 2 + generator.poisson(4))
        word = text[at : at + length]
        at = (at + length) % (len(text) - 14)
        kind = generator.random()
        word = "\u2581" + word if kind < 0.5 else word.capitalize() if kind < 0.6 else word
        if kind > 0.97:
            word = "".join(generator.choice(list('{}[]":,.;\n_-/<>=()'), 2)) + word[:2]
        seen[word] = None
    vocab = {piece: index for index, piece in enumerate(seen)}
    backend = Backend(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens([AddedToken(piece, special=True) for piece in special])
    backend.save(str(folder / "tokenizer.json"))


def mask_times(tokenizer: Tokenizer, vocab_size: int, form: Any, new: int) -> list[float]:
    """Milliseconds of each mask on an answer of random allowed tokens, nothing else running."""
    grammar = parse_response_format(form)
    assert grammar is not None
    matcher = compiler(tokenizer, vocab_size, (1,)).compile(grammar)
    words = np.zeros((vocab_size + 31) // 32, np.uint32)
    generator = np.random.default_rng(1)
    times = []
    for _ in range(new):
        started = time.perf_counter()
        matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        times.append(1e3 * (time.perf_counter() - started))
        allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
        matcher.consume_token(int(generator.choice(allowed)))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model")
    parser.add_argument("--new", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model = gl.load(arguments.model, threads=arguments.threads)
    vocab_size = model.config.text.vocab_size
    with tempfile.TemporaryDirectory() as name:
        if not model.tokenizer.exists:
            random_vocabulary(Path(name), vocab_size)
            model._tokenizer = Tokenizer(name, model.config)
        report(model, vocab_size, arguments)


def report(model: Any, vocab_size: int, arguments: argparse.Namespace) -> None:
    began = time.perf_counter()
    compiler(model.tokenizer, vocab_size, (1,))
    print(f"{model!r}\nvocabulary of {vocab_size} read in {time.perf_counter() - began:.1f} s")
    masks = {
        name: mask_times(model.tokenizer, vocab_size, form, arguments.new)
        for name, form in FORMS.items()
        if form is not None
    }
    prompt = [[2, *range(300, 332)]] * arguments.rows
    speeds: dict[str, list[float]] = {name: [] for name in FORMS}
    for _ in range(arguments.rounds):
        for name, form in FORMS.items():
            outs = model.generate(
                prompt, response_format=form, max_new_tokens=arguments.new, seed=1, routing=False
            )
            tokens = sum(out.timings.decode_tokens for out in outs)
            speeds[name].append(tokens / outs[0].timings.decode_seconds)
    free = statistics.median(speeds["free"])
    print(f"{'form':<10}{'tokens/s':>10}{'slower':>9}   mask: median, largest")
    rows = []
    for name, values in speeds.items():
        speed = statistics.median(values)
        row: dict[str, Any] = {
            "form": name,
            "tokens_per_second": values,
            "slower": 1 - speed / free,
        }
        text = f"{name:<10}{speed:>10.2f}{row['slower']:>9.1%}"
        if name in masks:
            row["mask_ms"] = [statistics.median(masks[name]), max(masks[name])]
            text += "   {:.2f} ms, {:.2f} ms".format(*row["mask_ms"])
        print(text)
        rows.append(row)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
