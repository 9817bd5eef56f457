"""Writes a released model's GGUF file with random weights, as `llama-quantize Q4_0` lays it out.

    python benchmarks/random_gguf.py E2B FILE.gguf [--vocab N] [--layers N]

Both gemloupe and llama.cpp load the file: the same bytes for comparisons of speed and memory. The
types are llama.cpp's for a model with tied embeddings: matrices Q4_0, both embeddings Q6_K,
per_layer_model_proj BF16, the router, norms and scales F32. Activations stay finite; tokens mean
nothing, and the vocabulary holds only what the loaders ask for. Needs `pip install gguf`.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from random_checkpoint import PREFIX, Tensor, check_space, model_config, plan_tensors
from tqdm import tqdm

from gemloupe.gguf import gguf_name
from gemloupe.variants import VARIANTS

# The tests' twin of llama.cpp's converter; it is nowhere in the package.
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from gguf_files import config_metadata, random_blocks, rope_freqs

# A prime: rows of a matrix begin at different places of the run, so that no two are equal.
RUN_BLOCKS = 65_537
WRITE_BLOCKS = 1 << 14

# Pieces at the released ids; chat markers, the bytes, and what a merge needs.
_PIECES = {
    0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 4: "<mask>", 46: "<|tool>", 47: "<tool|>",
    48: "<|tool_call>", 49: "<tool_call|>", 50: "<|tool_response>", 51: "<tool_response|>",
    52: '<|"|>', 98: "<|think|>", 100: "<|channel>", 101: "<channel|>", 105: "<|turn>",
    106: "<turn|>", 107: "\n", 494: "\u2581", 495: "a", 496: "b", 497: "ab",
    255999: "<|image>", 256000: "<|audio>", 258880: "<|image|>", 258881: "<|audio|>",
    258882: "<image|>", 258883: "<audio|>",
}  # fmt: skip
_FIRST_BYTE = 238


def type_of(name: str, shape: tuple[int, ...]) -> Type:
    """The type that llama-quantize gives a tensor (llama.cpp's name) in a Q4_0 file."""
    if len(shape) == 1 or name.endswith("ffn_gate_inp.weight"):
        return Type.F32
    if name == "per_layer_model_proj.weight":
        return Type.BF16
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return Type.Q6_K
    return Type.Q4_0


class RandomRuns:
    """Random blocks of every type and width, endlessly repeating a run of prime length."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._runs: dict[tuple[Type, float, float], np.ndarray] = {}
        self._at = 0

    def pieces(self, tensor: Tensor, kind: Type) -> Iterator[np.ndarray]:
        """Yields the tensor's bytes in order, at most a few MB at a time."""
        key = (kind, tensor.mean, tensor.std)
        if key not in self._runs:
            if len(self._runs) >= 8:
                self._runs.pop(next(iter(self._runs)))
            self._runs[key] = self._run(kind, tensor.mean, tensor.std)
        run = self._runs[key]
        left = tensor.elements // gguf.GGML_QUANT_SIZES[kind][0]
        while left:
            count = min(left, WRITE_BLOCKS, len(run) - self._at)
            yield run[self._at : self._at + count]
            self._at = (self._at + count) % len(run)
            left -= count

    def _run(self, kind: Type, mean: float, std: float) -> np.ndarray:
        elements = gguf.GGML_QUANT_SIZES[kind][0]
        if kind == Type.Q6_K:
            run = random_blocks((RUN_BLOCKS, elements), kind, std, self._random)
        else:
            values = self._random.standard_normal((RUN_BLOCKS, elements), dtype=np.float32)
            run = gguf.quantize(np.float32(mean) + np.float32(std) * values, kind)
        return np.ascontiguousarray(run).view(np.uint8).reshape(RUN_BLOCKS, -1)


def write_gguf(
    variant: str,
    path: Path,
    *,
    vocab: int | None = None,
    layers: int | None = None,
    seed: int = 0,
) -> int:
    """Writes the file and returns its bytes of weights. Nothing is left after a failure.

    Raises ValueError (an impossible cut, a file that exists) and OSError (no space).
    """
    if path.exists():
        raise ValueError(f"{path} exists; give another name")
    raw = model_config(variant, "bfloat16", vocab, layers)
    text = raw["text_config"]
    plan = []
    for tensor in plan_tensors(raw):
        name = gguf_name(tensor.name.removeprefix(PREFIX))
        if name.endswith("attn_q_norm.weight"):
            # Scores of order one: at 16 the softmax is an argmax, and every rounding a new answer.
            tensor = replace(tensor, mean=1 / math.sqrt(tensor.shape[0]), std=0.005)
        plan.append((name, tensor, type_of(name, tensor.shape)))
    total = sum(_nbytes(tensor.shape, kind) for _, tensor, kind in plan)
    check_space(path, total)
    writer = gguf.GGUFWriter(None, "gemma4")
    _add_metadata(writer, variant, text)
    freqs = rope_freqs(text)
    for name, tensor, kind in plan:
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        # The writer counts the last axis of uint8 data in bytes.
        stored = (*tensor.shape[:-1], tensor.shape[-1] // elements * size)
        writer.add_tensor_info(
            name, stored, np.dtype(np.uint8), _nbytes(tensor.shape, kind), raw_dtype=kind
        )
    writer.add_tensor_info("rope_freqs.weight", freqs.shape, freqs.dtype, freqs.nbytes)
    partial = path.with_name(path.name + ".partial")
    try:
        _write(writer, partial, plan, freqs, seed, total)
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
    return total


def _nbytes(shape: tuple[int, ...], kind: Type) -> int:
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    return math.prod(shape) // elements * size


def _add_metadata(writer: gguf.GGUFWriter, variant: str, text: dict[str, Any]) -> None:
    writer.add_name(f"random Gemma 4 {variant}")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    for key, value in config_metadata(text).items():
        key = key if key.startswith("general.") else f"gemma4.{key}"
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_uint32(key, int(value))
    count = text["vocab_size"]
    pieces = [f"\u2581w{i}" for i in range(count)]
    types = [gguf.TokenType.NORMAL] * count
    for i, piece in _PIECES.items():
        if i < count:
            pieces[i] = piece
            if piece.startswith("<"):
                types[i] = gguf.TokenType.CONTROL
    for byte in range(256):
        pieces[_FIRST_BYTE + byte] = f"<0x{byte:02X}>"
        types[_FIRST_BYTE + byte] = gguf.TokenType.BYTE
    writer.add_tokenizer_model("gemma4")
    writer.add_token_list(pieces)
    writer.add_token_scores([-1000.0] * count)
    writer.add_token_types(types)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    writer.add_mask_token_id(4)
    writer.add_add_space_prefix(False)
    writer.add_add_bos_token(True)


def _write(
    writer: gguf.GGUFWriter,
    path: Path,
    plan: list[tuple[str, Tensor, Type]],
    freqs: np.ndarray,
    seed: int,
    total: int,
) -> None:
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    file = writer.fout[0]
    runs = RandomRuns(seed)
    writer.write_padding(file, file.tell())
    with tqdm(
        total=total, unit="B", unit_scale=True, desc=path.name, leave=False, disable=None
    ) as bar:
        for _, tensor, kind in plan:
            for piece in runs.pieces(tensor, kind):
                file.write(piece.data)
                bar.update(piece.nbytes)
            writer.write_padding(file, _nbytes(tensor.shape, kind))
        file.write(freqs.tobytes())
        writer.write_padding(file, freqs.nbytes)
    # Otherwise the disk would still be writing while the first benchmark runs.
    file.flush()
    os.fsync(file.fileno())
    writer.close()


def main() -> int:
    parser = argparse.ArgumentParser(description="writes a Q4_0 GGUF file with random weights")
    parser.add_argument("variant", choices=list(VARIANTS))
    parser.add_argument("path", type=Path)
    parser.add_argument("--vocab", type=int, metavar="N", help="cut the vocabulary to N tokens")
    parser.add_argument("--layers", type=int, metavar="N", help="cut the model to N layers")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # So that partial files are removed.
    try:
        total = write_gguf(**vars(arguments))
    except (ValueError, OSError) as error:
        print(f"random_gguf: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(f"{arguments.path}: {total:,} bytes of weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
