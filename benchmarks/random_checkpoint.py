"""Writes a released model's checkpoint with random weights: its classes, key names and sizes.

    python benchmarks/random_checkpoint.py E2B FOLDER [--dtype bfloat16] [--vocab N] [--layers N]

For measuring speed, memory and loading without the real weights. Activations stay finite; the
tokens mean nothing. There is no tokenizer: prompts are ids. Towers are null. A tensor passes
through a few MB of memory, whatever its size.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from gemloupe.checkpoint import expected_text_tensors
from gemloupe.config import parse_config
from gemloupe.variants import VARIANTS

PREFIX = "model.language_model."
SINGLE_NAME = "model.safetensors"
SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
# A prime: rows of a matrix begin at different places of the block, so that no two are equal.
BLOCK = 4_194_301
SHARD_BYTES = 50_000_000_000  # What save_pretrained writes into one file.
SPARE_BYTES = 1 << 30
WRITE_ELEMENTS = 1 << 20
EMBEDDING_STD = 0.02  # initializer_range of the released configs


@dataclass(frozen=True)
class Tensor:
    """A tensor to be written; values are mean + std · (standard normal)."""

    name: str
    shape: tuple[int, ...]
    mean: float
    std: float

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def model_config(variant: str, dtype: str, vocab: int | None, layers: int | None) -> dict[str, Any]:
    """Returns config.json of a released model without towers, cut where asked.

    ValueError for a cut that leaves no model of this kind.
    """
    raw = copy.deepcopy(VARIANTS[variant].raw)
    raw.update(dtype=dtype, vision_config=None, audio_config=None)
    text = raw["text_config"]
    if vocab is not None:
        if not 512 <= vocab <= text["vocab_size"]:
            raise ValueError(f"--vocab is {vocab}; expected 512 to {text['vocab_size']}")
        text["vocab_size"] = vocab
        if text.get("vocab_size_per_layer_input"):
            text["vocab_size_per_layer_input"] = vocab
    if layers is not None:
        _cut_layers(text, layers)
    return raw


def _cut_layers(text: dict[str, Any], layers: int) -> None:
    """Keeps the last layers of each part, own and sharing, in about the model's proportion."""
    types, shared = text["layer_types"], text["num_kv_shared_layers"]
    own = len(types) - shared
    kept_shared = round(layers * shared / len(types)) if shared else 0
    kept_own = layers - kept_shared
    least = 3 if shared else 1  # A sharing layer needs one of its own kind before it.
    if not least <= layers <= len(types):
        raise ValueError(f"--layers is {layers}; expected {least} to {len(types)}")
    text["layer_types"] = types[own - kept_own : own] + types[len(types) - kept_shared :]
    text["num_kv_shared_layers"] = kept_shared
    text["num_hidden_layers"] = layers


def plan_tensors(raw: dict[str, Any]) -> list[Tensor]:
    """Lists the tensors of a checkpoint with this config, sorted by name as transformers does."""
    text = parse_config(raw, "config.json").text
    tensors = []
    for name, shape in expected_text_tensors(text).items():
        if name.startswith("embed_tokens"):
            mean, std = 0.0, EMBEDDING_STD
        elif name.endswith("layer_scalar"):
            mean, std = 1.0, 0.0
        elif name.endswith("post_attention_layernorm.weight"):
            # Attention gives random tokens nearly the same vector. At full weight it would make
            # their residuals alike, and every token would choose the same experts.
            mean, std = 0.1, 0.01
        elif len(shape) == 1:  # Weights of norms, scales of router and experts.
            mean, std = 1.0, 0.1
        else:
            mean, std = 0.0, 1.0 / math.sqrt(shape[-1])
        tensors.append(Tensor(PREFIX + name, shape, mean, std))
    return sorted(tensors, key=lambda tensor: tensor.name)


def element_bytes(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def to_stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """Rounds float32 values to the stored type; bfloat16 comes as its upper 16 bits."""
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return values.astype(np.float16 if dtype == "float16" else np.float32)


class RandomBlock:
    """Standard normals of any mean and width, endlessly repeating a block of prime length."""

    def __init__(self, dtype: str, seed: int) -> None:
        self._dtype = dtype
        self._normal = np.random.default_rng(seed).standard_normal(BLOCK, dtype=np.float32)
        self._stored: dict[tuple[float, float], np.ndarray] = {}
        self._at = 0

    def pieces(self, tensor: Tensor) -> Iterator[np.ndarray]:
        """Yields the tensor's elements in order, a few MB at a time."""
        kind = (tensor.mean, tensor.std)
        if kind not in self._stored:
            if len(self._stored) >= 4:  # 8 or 16 MB each
                self._stored.pop(next(iter(self._stored)))
            values = np.float32(tensor.mean) + np.float32(tensor.std) * self._normal
            self._stored[kind] = to_stored(values, self._dtype)
        block = self._stored[kind]
        left = tensor.elements
        while left:
            count = min(left, WRITE_ELEMENTS, BLOCK - self._at)
            yield block[self._at : self._at + count]
            self._at = (self._at + count) % BLOCK
            left -= count


def split_shards(tensors: list[Tensor], dtype: str, most: int) -> list[list[Tensor]]:
    """Fills files of at most `most` bytes in order; a tensor larger than that stands alone."""
    shards: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        size = tensor.elements * element_bytes(dtype)
        if not shards or size > room:
            shards.append([])
            room = most
        shards[-1].append(tensor)
        room -= size
    return shards


def write_file(
    path: Path,
    tensors: list[Tensor],
    dtype: str,
    block: RandomBlock,
    advance: Callable[[int], object],
) -> None:
    """Writes one safetensors file; `advance` hears of every piece's bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.elements * element_bytes(dtype)
        header[tensor.name] = {
            "dtype": SAFETENSORS_DTYPES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            for piece in block.pieces(tensor):
                file.write(piece.data)
                advance(piece.nbytes)
        # Otherwise the disk would still be writing while the first benchmark runs.
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def remove_on_failure(folder: Path) -> Iterator[None]:
    """Makes an empty folder; if the block fails or is interrupted, removes what is in it."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder; give another one")
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in folder.iterdir():
            path.unlink()
        if made:
            folder.rmdir()
        raise


def check_space(folder: Path, needed: int) -> None:
    """Raises OSError where the disk would have less than 1 GiB left."""
    place = folder
    while not place.exists():
        place = place.absolute().parent
    free = shutil.disk_usage(place).free
    if needed + SPARE_BYTES > free:
        raise OSError(
            f"{folder}: the checkpoint has {needed / 1e9:.2f} GB and the disk {free / 1e9:.2f} GB "
            "free, of which 1.07 GB stay free. Give a folder on another disk, or cut the model "
            "with --layers and --vocab."
        )


def write_checkpoint(
    variant: str,
    folder: Path,
    *,
    dtype: str = "bfloat16",
    vocab: int | None = None,
    layers: int | None = None,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Writes the checkpoint and returns its bytes of weights. Nothing is left after a failure.

    Raises ValueError (an impossible cut, a folder in use) and OSError (no space).
    """
    raw = model_config(variant, dtype, vocab, layers)
    tensors = plan_tensors(raw)
    total = sum(tensor.elements for tensor in tensors) * element_bytes(dtype)
    check_space(folder, total)
    shards = split_shards(tensors, dtype, shard_bytes)
    names = [
        SINGLE_NAME if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        for i in range(len(shards))
    ]
    end_ids = raw["eos_token_id"]
    generation = {
        "bos_token_id": 2,
        "pad_token_id": 0,
        "eos_token_id": end_ids,
        "suppress_tokens": end_ids,  # Random weights would end where they like.
    }
    with (
        remove_on_failure(folder),
        tqdm(
            total=total, unit="B", unit_scale=True, desc=folder.name, leave=False, disable=None
        ) as bar,
    ):
        (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
        (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        block = RandomBlock(dtype, seed)
        for name, shard in zip(names, shards, strict=True):
            write_file(folder / name, shard, dtype, block, bar.update)
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": total},
                "weight_map": {
                    tensor.name: name
                    for name, shard in zip(names, shards, strict=True)
                    for tensor in shard
                },
            }
            path = folder / f"{SINGLE_NAME}.index.json"
            path.write_text(json.dumps(index, indent=2) + "\n")
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description="writes a checkpoint with random weights")
    parser.add_argument("variant", choices=list(VARIANTS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=list(SAFETENSORS_DTYPES), default="bfloat16")
    parser.add_argument("--vocab", type=int, metavar="N", help="cut the vocabulary to N tokens")
    parser.add_argument("--layers", type=int, metavar="N", help="cut the model to N layers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--shard-bytes", type=int, default=SHARD_BYTES, metavar="N", help="largest file"
    )
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # So that partial files are removed.
    try:
        total = write_checkpoint(**vars(arguments))
    except (ValueError, OSError) as error:
        print(f"random_checkpoint: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(f"{arguments.folder}: {total:,} bytes of weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
