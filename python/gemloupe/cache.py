"""The KV cache of one sequence, as Python sees it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from gemloupe import _core, cache_diff, cache_file, cache_table
from gemloupe.arrays import as_float32
from gemloupe.errors import quoted

if TYPE_CHECKING:
    from gemloupe.model import Model

BASE = "none"
"""Stands for no adapter in `KvCache.provenance`."""


class CacheLayer:
    """One layer's keys and values, in position order whatever the storage."""

    def __init__(self, cache: KvCache, index: int) -> None:
        self._cache = cache
        self._core = cache.core
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
    def shape(self) -> tuple[int, int, int]:
        """(S, K, H): positions held, key-value heads, head size."""
        heads, head_dim, _pairs = self._core.layer_shape(self.source_layer)
        return len(self.positions), heads, head_dim

    @property
    def storage(self) -> str:
        """How the entries read by this layer are stored.

        "separate": keys and values. "derived": values and the rotated dims of the keys, where keys
        are w ⊙ values before RoPE; `keys` rebuilds them. The first `set` makes it "separate".
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

    def set(self, keys: Any = None, values: Any = None, positions: Any = None) -> None:
        """Replaces entries, rounded to the cache's dtype; the next pass reads them.

        `keys` (after norm and RoPE) and `values`: [n, K, H], anything that is an array; None
        leaves that part bit for bit. `positions`: absolute ones (negative: from the end), a slice
        or a boolean mask; None for all that are held. Forks of the cache see nothing of it.

        Derived keys are stored whole from the first `set` on: they keep their values in float32
        and are rounded to the cache's dtype once in the others.

        ValueError for a shared layer (naming source_layer), for positions that are not held
        (naming those that are), and for a wrong shape (naming both).
        """
        if self.source_layer != self.index:
            raise ValueError(
                f"layer {self.index} has no entries of its own: source_layer is "
                f"{self.source_layer}. Set cache.layers[{self.source_layer}], which it reads."
            )
        if keys is None and values is None:
            raise ValueError("keys and values are None; expected an array for one of them or both")
        at = self._cache._positions(self.positions if positions is None else positions)
        self._check_held(at)
        _held, heads, head_dim = self.shape
        shape = (len(at), heads, head_dim)
        arrays = [
            None if x is None else as_float32(x, name, shape)
            for name, x in (("keys", keys), ("values", values))
        ]
        self._core.set(self.index, at.tolist(), *arrays)
        parts = " and ".join(n for n, x in (("keys", keys), ("values", values)) if x is not None)
        self._cache.note("set", f"layer {self.index}, {parts} of {_count(at)}")

    def _check_held(self, positions: np.ndarray) -> None:
        held = self.positions
        first = int(held[0]) if len(held) else self._core.length
        missing = positions[positions < first]
        if len(missing):
            hint = "" if self._core.full_sliding else ' sliding="full" keeps every position.'
            raise ValueError(
                f"position {missing[0]} is no longer held by layer {self.index} ({self.kind}); "
                f"expected {first} to {self._core.length - 1}.{hint}"
            )

    def __repr__(self) -> str:
        positions = self.positions
        held = f"{positions[0]}…{positions[-1]}" if len(positions) else "none"
        return (
            f"CacheLayer({self.index}, {self.kind}, positions {held}, {self.storage}, "
            f"{self.nbytes} bytes)"
        )


class _Layers(Sequence[CacheLayer]):
    def __init__(self, cache: KvCache) -> None:
        self._cache = cache

    def __len__(self) -> int:
        return self._cache.core.num_layers

    @overload
    def __getitem__(self, index: int) -> CacheLayer: ...
    @overload
    def __getitem__(self, index: slice) -> list[CacheLayer]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [CacheLayer(self._cache, i) for i in range(len(self))[index]]
        if not -len(self) <= index < len(self):
            raise IndexError(f"layer {index}, expected 0 to {len(self) - 1}")
        return CacheLayer(self._cache, range(len(self))[index])


@dataclass(frozen=True)
class CacheNote:
    """Something that contributed to the entries of a cache, see `KvCache.provenance`."""

    kind: str
    """"adapter", "edit" (of a pass), or "set", "remove", "insert", "replace"."""
    detail: str
    length: int
    """The cache's length when it was noted: entries from there on may come from it."""


class KvCache:
    """Keys and values of one sequence, made by `model.new_cache` or by a run.

    `length` is the position of the next token, `start` that of the first; `tokens` are the ids
    that have been read. A cache serves one call at a time: RuntimeError otherwise.
    """

    def __init__(
        self, core: _core.KvCache, fingerprint: str, notes: Iterable[CacheNote] = ()
    ) -> None:
        self.core = core
        self.fingerprint = fingerprint
        """What the model is, as JSON: `cache_file.fingerprint`."""
        self._notes = list(notes)

    @staticmethod
    def load(path: str | os.PathLike[str], model: Model) -> KvCache:
        """Reads a cache that `save` wrote, bit for bit, for use with `model`.

        FileNotFoundError; ValueError where the file is damaged, is not such a cache, or belongs
        to a model of other layers (naming the first difference); MemoryError where it doesn't
        fit. A UserWarning where the layers agree but the weights are others.
        """
        return cache_file.load(path, model)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the cache to a safetensors file, bit for bit, and renames it to `path`.

        Tensors: `tokens` [n] and for each layer that stores `layers.{i}.keys` [S, K, H] (where
        keys are derived the 2 · pairs rotated dims only: the others are `.key_weight` [H] times
        the values), `.values` [S, K, H], and with int8 `.key_scales` and `.value_scales` [S, K].
        """
        cache_file.save(self, path)

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
    def sliding(self) -> str:
        """ "ring" where sliding layers hold their window, "full" where they keep every position."""
        return "full" if self.core.full_sliding else "ring"

    @property
    def nbytes(self) -> int:
        """Bytes of all layers; blocks that a fork shares count in both."""
        return self.core.nbytes

    @property
    def shared_nbytes(self) -> int:
        """Of `nbytes`, those in blocks that a fork holds too: nothing was copied for them."""
        return self.core.shared_nbytes

    @property
    def layers(self) -> Sequence[CacheLayer]:
        return _Layers(self)

    @property
    def provenance(self) -> tuple[CacheNote, ...]:
        """What contributed to the entries beside the model: adapters, edits, changes by hand."""
        return tuple(self._notes)

    def note(self, kind: str, detail: str) -> None:
        """Adds to `provenance`, once for each kind and detail."""
        if not any(note.kind == kind and note.detail == detail for note in self._notes):
            self._notes.append(CacheNote(kind, detail, self.length))

    def forget(self, kept: Iterable[CacheNote]) -> None:
        """Makes `provenance` what it was, after a call that raised."""
        self._notes = list(kept)

    def note_adapter(self, adapter: str = BASE) -> None:
        """Notes that the next entries are computed under `adapter`, in front of a pass.

        UserWarning where entries that are held were computed under another one: attention will
        read both.
        """
        noted = [note.detail for note in self._notes if note.kind == "adapter"]
        if not noted and len(self) > 0:
            noted = [BASE]
        others = [detail for detail in noted if detail != adapter]
        if others and len(self) > 0:
            warnings.warn(
                f"this cache holds entries computed under adapter {others[-1]}, and is now used "
                f"under {adapter}; begin a new cache, or keep one for each adapter",
                stacklevel=3,
            )
            self.note("adapter", others[-1])
        if others or adapter != BASE:
            self.note("adapter", adapter)

    def fork(self) -> KvCache:
        """An independent cache with the same content. Cheap: storage is copied where one writes."""
        return KvCache(self.core.fork(), self.fingerprint, self._notes)

    def truncate(self, length: int) -> None:
        """Drops the positions from `length` on.

        ValueError, naming the smallest length possible, where a sliding layer no longer holds the
        window before it; `model.new_cache(sliding="full")` keeps every position.
        """
        self.core.truncate(length)

    def remove(self, positions: Any) -> None:
        """Takes positions out; later entries move down, and their tokens with them.

        `positions` as in `CacheLayer.set`. Keys that move are rotated from the float32 angles of
        their old position to those of the new one. The entries themselves are not computed again:
        they still know what their tokens attended to.

        ValueError, naming layer and position, where a sliding layer would have to see positions
        that left its ring; a cache made with sliding="full" can always do it.
        """
        gone = self._positions(positions)
        if not len(gone):
            return
        edges = np.unique(gone)
        kept = []
        begin = self.start
        for position in edges.tolist():
            if position > begin:
                kept.append((begin, position))
            begin = position + 1
        if begin < self.length:
            kept.append((begin, self.length))
        self.core.splice(kept)
        self.note("remove", _count(edges))

    def insert(self, other: KvCache, at: int) -> None:
        """Puts all entries and tokens of `other` before position `at`; later ones move up.

        `at`: `start` to `length` (which appends), negative ones from the end. `other` is a cache
        of the same model, in any dtype; it keeps its content. Rotation and errors as in `remove`.
        """
        if isinstance(at, bool) or not isinstance(at, int | np.integer):
            raise TypeError(f"at is {quoted(at)}; expected a position")
        where = int(at) + (self.length if at < 0 else 0)
        if not self.start <= where <= self.length:
            raise ValueError(f"at is {at}; expected {self.start} to {self.length}")
        count = len(other)
        self.core.splice([(self.start, where), (where, self.length)], other.core, 1)
        self._take_notes(other)
        self.note("insert", f"{count} positions before {where}")

    def replace(self, other: KvCache, layers: Any = None, positions: Any = None) -> None:
        """Copies the entries of `other`, a cache of the same model, at the same positions.

        `layers`: an index, a slice or several; None for every layer that stores. `positions` as
        in `CacheLayer.set`, held by both caches in each of the layers; None for those that both
        hold. `tokens` stay. ValueError as in `CacheLayer.set`; the cache is then as it was.
        """
        chosen = self._source_layers(layers)
        explicit = None if positions is None else self._positions(positions)
        before = self.core.fork()
        try:
            for index in chosen:
                at = explicit
                if at is None:
                    mine, theirs = self.layers[index].positions, other.layers[index].positions
                    at = np.intersect1d(mine, theirs)
                self.core.copy_from(other.core, index, at.tolist())
        except BaseException:
            self.core.restore(before)
            raise
        self._take_notes(other)
        what = "all positions" if explicit is None else _count(explicit)
        self.note("replace", f"{what} in layers {cache_table.ranges(chosen)}")

    def diff(self, other: KvCache) -> cache_diff.CacheDiff:
        """Compares with a cache of the same model and positions, layer by layer.

        ValueError where they belong to two models or hold other positions.
        """
        return cache_diff.diff(self, other)

    def _take_notes(self, other: KvCache) -> None:
        for note in other.provenance:
            self.note(note.kind, note.detail)

    def _positions(self, positions: Any) -> np.ndarray:
        """Absolute positions of this cache, int64 [n], each once; ValueError beyond its ends."""
        start, length = self.start, self.length
        if isinstance(positions, slice):
            return np.array([p for p in range(length)[positions] if p >= start], np.int64)
        given = np.atleast_1d(np.asarray(positions))
        if given.ndim != 1 or (given.size and given.dtype.kind not in "iub"):
            raise TypeError(
                f"positions is {quoted(positions)}; expected integers, a slice or a boolean mask"
            )
        if given.dtype.kind == "b":
            if len(given) != length - start:
                raise ValueError(
                    f"positions is a mask of {len(given)}; expected {length - start}, one for each "
                    "token"
                )
            return start + np.flatnonzero(given).astype(np.int64)
        at = given.astype(np.int64)
        at = np.where(at < 0, at + length, at)
        outside = given[(at < start) | (at >= length)]
        if len(outside):
            held = f"{start} to {length - 1}" if length > start else "none: the cache is empty"
            raise ValueError(f"position {outside[0]} is not in this cache; expected {held}")
        if len(np.unique(at)) != len(at):
            raise ValueError("positions has one twice; expected each once")
        return at

    def _source_layers(self, layers: Any) -> list[int]:
        count = self.core.num_layers
        if layers is None:
            return [i for i in range(count) if self.core.layer_source(i) == i]
        if isinstance(layers, slice):
            chosen = list(range(count))[layers]
        else:
            chosen = [int(layers)] if isinstance(layers, int | np.integer) else list(layers)
        indices = []
        for layer in chosen:
            one = self.layers[layer]
            if one.kind == "shared":
                raise ValueError(
                    f"layer {one.index} has no entries of its own: source_layer is "
                    f"{one.source_layer}. Replace those."
                )
            indices.append(one.index)
        return indices

    def __len__(self) -> int:
        return self.length - self.start

    def __repr__(self) -> str:
        return cache_table.text(self)

    def _repr_html_(self) -> str:
        return cache_table.html(self)


def _count(positions: np.ndarray) -> str:
    return f"position {positions[0]}" if len(positions) == 1 else f"{len(positions)} positions"


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
