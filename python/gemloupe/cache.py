"""The KV cache of one sequence, as Python sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import numpy as np

from gemloupe import _core


class CacheLayer:
    """One layer's keys and values, in position order whatever the storage."""

    def __init__(self, core: _core.KvCache, index: int) -> None:
        self._core = core
        self.index = index

    @property
    def kind(self) -> str:
        """ "full", "sliding" (a ring that holds the window), or "shared" (reads another layer)."""
        if self.source_layer != self.index:
            return "shared"
        return "sliding" if self._core.layer_window(self.index) else "full"

    @property
    def source_layer(self) -> int:
        """The layer whose entries this one reads: its own index unless it shares."""
        return self._core.layer_source(self.index)

    @property
    def window(self) -> int:
        """Positions that a query sees, its own included; 0 for all."""
        return self._core.layer_window(self.index)

    @property
    def storage(self) -> str:
        """How the entries read by this layer are stored.

        "separate": keys and values. "derived": values and the rotated dims of the keys, where keys
        are w ⊙ values before RoPE; `keys` rebuilds them.
        """
        return self._core.layer_storage(self.index)

    @property
    def nbytes(self) -> int:
        """Bytes of this layer's storage, in blocks of 64 positions; 0 for a shared one."""
        return self._core.layer_nbytes(self.index)

    @property
    def positions(self) -> np.ndarray:
        """The positions held, int64 [S], ascending and without gaps."""
        return np.arange(self._core.first_position(self.index), self._core.length)

    @property
    def keys(self) -> np.ndarray:
        """Keys after norm and RoPE, float32 [S, K, H]: a copy, read-only, whatever the storage."""
        return self._core.read(self.index)[0]

    @property
    def values(self) -> np.ndarray:
        """Values after norm, float32 [S, K, H]: a copy, read-only."""
        return self._core.read(self.index)[1]

    def __repr__(self) -> str:
        positions = self.positions
        held = f"{positions[0]}…{positions[-1]}" if len(positions) else "none"
        return f"CacheLayer({self.index}, {self.kind}, positions {held}, {self.nbytes} bytes)"


class _Layers(Sequence[CacheLayer]):
    def __init__(self, core: _core.KvCache) -> None:
        self._core = core

    def __len__(self) -> int:
        return self._core.num_layers

    @overload
    def __getitem__(self, index: int) -> CacheLayer: ...
    @overload
    def __getitem__(self, index: slice) -> list[CacheLayer]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [CacheLayer(self._core, i) for i in range(len(self))[index]]
        if not -len(self) <= index < len(self):
            raise IndexError(f"layer {index}, expected 0 to {len(self) - 1}")
        return CacheLayer(self._core, range(len(self))[index])


class KvCache:
    """Keys and values of one sequence, made by `model.new_cache` or by a run.

    `length` is the position of the next token, `start` that of the first; `tokens` are the ids
    that have been read. A cache serves one call at a time: RuntimeError otherwise.
    """

    def __init__(self, core: _core.KvCache) -> None:
        self.core = core

    @property
    def length(self) -> int:
        """Position of the next token."""
        return self.core.length

    @property
    def start(self) -> int:
        """Position of the first token held."""
        return self.core.start

    @property
    def tokens(self) -> np.ndarray:
        """The ids read so far, int32 [length − start]."""
        return np.array(self.core.tokens, np.int32)

    @property
    def max_tokens(self) -> int:
        """Most tokens that this cache takes."""
        return self.core.max_tokens

    @property
    def dtype(self) -> str:
        """ "float32", "float16", "bfloat16" or "int8": how entries are stored."""
        return self.core.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all layers; blocks that a fork shares count in both."""
        return self.core.nbytes

    @property
    def layers(self) -> Sequence[CacheLayer]:
        return _Layers(self.core)

    def fork(self) -> KvCache:
        """An independent cache with the same content. Cheap: storage is copied where one writes."""
        return KvCache(self.core.fork())

    def truncate(self, length: int) -> None:
        """Drops the positions from `length` on.

        ValueError, naming the smallest length possible, where a sliding layer no longer holds the
        window before it; `model.new_cache(sliding="full")` keeps every position.
        """
        self.core.truncate(length)

    def __len__(self) -> int:
        return self.length - self.start

    def __repr__(self) -> str:
        kinds = [layer.kind for layer in self.layers]
        counts = ", ".join(
            f"{kinds.count(kind)} {kind}" for kind in ("full", "sliding", "shared") if kind in kinds
        )
        return (
            f"KvCache(positions {self.start}…{self.length - 1} of at most {self.max_tokens}, "
            f"{self.dtype}, {self.nbytes / 2**20:.1f} MiB; layers: {counts})"
            if len(self)
            else f"KvCache(empty, at most {self.max_tokens} tokens, {self.dtype}; layers: {counts})"
        )


def row_caches(cache: Any, rows: int | None) -> list[KvCache | None]:
    """One cache, or None, for each of `rows` rows (None: a single prompt), from `cache=`.

    TypeError or ValueError where their number doesn't fit, or two rows share one cache.
    """
    if not isinstance(cache, (list, tuple)):
        if cache is not None and rows is not None and rows != 1:
            raise ValueError(f"one cache can't serve {rows} rows; pass a list, one cache a row")
        return [cache] * (rows or 1)
    if rows is None:
        raise TypeError("cache is a list, but x is a single prompt; pass one cache")
    if len(cache) != rows:
        raise ValueError(f"cache has {len(cache)} entries for {rows} rows; pass one a row")
    given = [id(getattr(one, "core", one)) for one in cache if one is not None]
    if len(set(given)) != len(given):
        raise ValueError("two rows share one cache; give each its own, such as cache.fork()")
    return list(cache)
