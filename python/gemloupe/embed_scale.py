"""The factor of embeddings, √size, in the dtype that a reference holds it in."""

from __future__ import annotations

import numpy as np


def embed_scale(dtype: str, size: int) -> float:
    """√size as an embedding's weights in `dtype` hold it."""
    root = np.float32(size**0.5)
    if dtype == "bfloat16":
        bits = root.view(np.uint32)
        bits = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(
            16
        )
        return float((bits << np.uint32(16)).view(np.float32))
    return float(np.float16(root) if dtype == "float16" else root)
