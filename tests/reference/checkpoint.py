"""Reads safetensors files into float64 arrays, without torch (NumPy has no bfloat16)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

_WIDTHS = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
_PREFIXES = ("model.language_model.", "model.")


def read_weights(folder: Path) -> dict[str, np.ndarray]:
    """Returns the text decoder's tensors as float64, by their name after the class's prefix."""
    files = sorted(folder.glob("*.safetensors"))
    stored = {name: array for path in files for name, array in _read_file(path).items()}
    prefix = next(p for p in _PREFIXES if p + "embed_tokens.weight" in stored)
    return {
        name.removeprefix(prefix): array
        for name, array in stored.items()
        if name.startswith(prefix)
    }


def _read_file(path: Path) -> dict[str, np.ndarray]:
    data = path.read_bytes()
    header_size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + header_size])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = (8 + header_size + offset for offset in entry["data_offsets"])
        raw = np.frombuffer(data[begin:end], dtype=_WIDTHS[entry["dtype"]])
        if entry["dtype"] == "BF16":  # bfloat16 is the upper half of a float32.
            raw = (raw.astype(np.uint32) << 16).view(np.float32)
        tensors[name] = raw.astype(np.float64).reshape(entry["shape"])
    return tensors
