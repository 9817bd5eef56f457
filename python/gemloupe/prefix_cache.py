"""Prompts begin alike: the keys and values of prefixes that a model has read, for later prompts.

A radix tree over ids whose nodes hold forks of KV caches. A fork shares its blocks with the others
and serves its own length and, since sliding layers keep blocks of 64 positions, those lengths
before it whose windows it still holds.

A prompt goes on only from where it gets the bits that it would get alone. Products with packed
weights give a row the same bits in every pass, and so do all products of an invariant model: there
any position will do. Elsewhere the bits depend on the rows of a pass (gl.help("numbers")), and a
prompt goes on only where one of its own passes would begin.
"""

from __future__ import annotations

import functools
import hashlib
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from gemloupe import _core, recipe
from gemloupe.capturing import BoundHooks
from gemloupe.media import Medium, blocks
from gemloupe.positions import Span
from gemloupe.prompt import Prompt

if TYPE_CHECKING:
    from gemloupe.adapters import Adapter
    from gemloupe.adapters.selection import Selection
    from gemloupe.model import Model

# Fewer tokens than this are read sooner than they are looked for.
_FEWEST = 32
# A pass of its own for a place where prompts part is worth it from so many tokens on.
_WORTH_A_PASS = 64
# Edits at these points take another path through attention for all rows of their passes.
_UNFUSED = (".attn.k", ".attn.v", ".attn.rot_k")
_Place = tuple[int, "tuple[tuple[Adapter, float], ...]"]
"""What keys and values depend on beside the ids: the version of the weights, the adapters."""


@dataclass(frozen=True)
class PrefixStats:
    """What a prefix cache has done since it was made."""

    lookups: int = 0
    hits: int = 0
    tokens: int = 0
    """Of all hits: prompt tokens that were not read again."""
    stored: int = 0
    evicted: int = 0
    """Prefixes given up because of the limit."""


class _Node:
    """A prefix: the ids of all edges from the root to this node."""

    __slots__ = ("cache", "children", "depth", "hits", "keys", "parent", "shortest")

    def __init__(self, keys: np.ndarray, parent: _Node | None) -> None:
        self.keys = keys
        self.parent = parent
        self.depth: int = len(keys) + (parent.depth if parent else 0)
        self.children: dict[int, _Node] = {}
        self.cache: Any = None
        """A `_core.KvCache` of `depth` tokens, or None."""
        self.shortest = 0
        """The fewest of them that the cache can be cut to."""
        self.hits = 0

    def subtree(self) -> Iterator[_Node]:
        nodes = [self]
        while nodes:
            node = nodes.pop()
            yield node
            nodes += node.children.values()


class Reading:
    """What a prefix cache does for one row."""

    def __init__(
        self, keys: np.ndarray, place: _Place | None, lengths: Sequence[int] | None,
        media: Sequence[tuple[int, int]],
    ) -> None:  # fmt: skip
        self.keys = keys
        """int64 [T]: see `keys_of`."""
        self.place = place
        """None: nothing is read or stored."""
        self.stores = place is not None
        self.cache: Any = None
        """A `_core.KvCache` of the row's own that holds the first `length` tokens, or None."""
        self.length = 0
        self.cuts: list[int] = []
        """Positions at which a pass is to end, so that what comes before can be stored."""
        self.last: _Node | None = None
        """What was stored of the row's last pass over the prompt."""
        self._lengths = lengths
        self._media = media

    @property
    def passes(self) -> int:
        """How many passes an edited row would have had over the first `length` tokens."""
        return bisect_right(self._lengths or (), self.length)

    def longest(self, most: int) -> int:
        """The longest prefix of at most `most` tokens from which the row may go on."""
        if self._lengths is not None:
            index = bisect_right(self._lengths, most)
            return self._lengths[index - 1] if index else 0
        return next((begin for begin, end in self._media if begin < most < end), most)


class PrefixCache:
    """Keys and values of what one model has read, up to a number of bytes.

    Made by `model.prefix_cache`; `generate(..., prefix_cache=)` takes it. Any thread may use it.
    """

    def __init__(self, model: Model, max_bytes: int) -> None:
        self.model = model
        self.max_bytes = max_bytes
        text = model.config.text
        self._whole = text.bidirectional == "all"
        self._always_exact = model.invariant or _core.isa() == "portable"
        self._packed = all(
            len(info.shape) < 2 or info.dtype not in recipe.PLAIN
            for name, info in model.loaded_weights.items()
            if name not in ("embed_tokens.weight", recipe.TABLE)  # Of these, rows are read.
        )
        self._lock = threading.Lock()
        self._roots: dict[_Place, _Node] = {}
        # The nodes with caches, the one used longest ago first.
        self._stored: OrderedDict[_Node, None] = OrderedDict()
        self._bytes = 0
        self._stats = PrefixStats()

    @property
    def nbytes(self) -> int:
        """Bytes of all prefixes; blocks that several share count once."""
        return self._bytes

    @property
    def stats(self) -> PrefixStats:
        return self._stats

    def __len__(self) -> int:
        """How many prefixes are stored."""
        return len(self._stored)

    def __repr__(self) -> str:
        return (
            f"PrefixCache({len(self)} prefixes, {self.nbytes:,} of {self.max_bytes:,} bytes, "
            f"{self.stats.hits} hits of {self.stats.lookups})"
        )

    def clear(self) -> None:
        """Forgets every prefix."""
        with self._lock:
            self._roots.clear()
            self._stored.clear()
            self._bytes = 0

    def forget(self) -> None:
        """Gives up what later rows can't use: of other weights, and of deleted adapters."""
        with self._lock:
            stale = [place for place in self._roots if not self._current(place)]
            for place in stale:
                for node in [*self._roots.pop(place).subtree()]:
                    self._stored.pop(node, None)
            if stale:
                self._count_bytes()

    def begin(
        self, row: RowPrefixes, adapters: Selection, hooks: BoundHooks | None,
        prompt_logprobs: bool, longer_than: int | None = None,
    ) -> Reading:  # fmt: skip
        """Looks up what a prompt begins with; the row's `Reading`, to be passed to `store`.

        Every position from the first that `hooks` are about, and the last one, is computed. With
        `longer_than`, the row was looked up before: only what saves it another pass counts.
        """
        prompt, keys = row.prompt, row.keys
        count = len(keys)
        place = (self.model.adapters.version, adapters.adapters)
        media = blocks(prompt.media, self.model.config.text.bidirectional)
        anywhere = self._always_exact or (self._packed and not adapters)
        edited = hooks is not None and bool(hooks.edited)
        # Functions see whole passes: an edited row has those that it would have alone.
        lengths = None if anywhere and not edited else pass_ends(count, media)
        usable = self._current(place) and not self._whole and not adapters.overridden
        reading = Reading(keys, place if usable else None, lengths, media)
        # Passes for logits of the whole prompt are shorter.
        reading.stores = usable and not edited and (anywhere or not prompt_logprobs)
        first = 0 if prompt_logprobs else count - 1
        if hooks is not None:
            first = min(first, _first_needed(hooks, Span(prompt, 0)))
        again = longer_than is not None
        fewest = longer_than + _WORTH_A_PASS if longer_than is not None else _FEWEST
        with self._lock:
            self._add(lookups=0 if again else 1)
            root = self._roots.get(place) if usable else None
            if root is None:
                return reading
            path, last, common = _walk(root, keys)
            best, length = None, 0
            for node in (*path, *last.subtree()) if common >= _FEWEST else ():
                if node.cache is None:
                    continue
                most = reading.longest(min(node.depth, common, first))
                if most >= max(node.shortest, fewest, length + 1):
                    best, length = node, most
            if best is not None:
                reading.cache = best.cache.fork()
                reading.cache.truncate(length)
                reading.length = length
                best.hits += 1
                self._stored.move_to_end(best)
                self._add(hits=1, tokens=length)
        parting = reading.longest(min(common, count - 1))
        if anywhere and hooks is None and parting - length >= _WORTH_A_PASS:
            reading.cuts = [parting]
        return reading

    def store(self, reading: Reading, cache: Any, new: Sequence[int] = ()) -> None:
        """Stores a fork of a row's `cache`: its prompt as far as it was read, and `new` ids."""
        length = cache.length
        keys = np.concatenate([reading.keys, np.asarray(new, np.int64)])[:length]
        serves = _FEWEST <= length == len(keys) == reading.longest(length)
        if not reading.stores or not serves:
            return
        fork = cache.fork()
        place = reading.place
        assert place is not None
        with self._lock:
            # An adapter is deleted before `forget` is called: what gets in here, that takes out.
            if not self._current(place):
                return
            node = self._node(place, keys)
            if node.cache is None:
                node.cache, node.shortest = fork, fork.shortest_length
                self._add(stored=1)
            self._stored[node] = None
            self._stored.move_to_end(node)
            above = node.parent
            while above is not None:  # What serves no length that the new one doesn't.
                here, above = above, above.parent
                if here.cache is not None and here.shortest >= node.shortest:
                    self._drop(here)
            if length < len(reading.keys):
                last = reading.last
                passing = last is not None and last.cache is not None and not last.hits
                if passing and last is not None and not _lasting(last.depth, reading):
                    self._drop(last)
                reading.last = node
            self._count_bytes()
            while self._bytes > self.max_bytes:
                self._drop(next(iter(self._stored)))
                self._add(evicted=1)
                self._count_bytes()

    # All of these are called under the lock.

    def _current(self, place: _Place) -> bool:
        version, chosen = place
        registry = self.model.adapters
        # An odd version is between two: weights are being changed.
        right = version % 2 == 0 and version == registry.version
        return right and all(registry.holds(adapter) for adapter, _ in chosen)

    def _add(self, **counts: int) -> None:
        old = self._stats
        self._stats = replace(old, **{name: getattr(old, name) + n for name, n in counts.items()})

    def _count_bytes(self) -> None:
        held = [node.cache for node in self._stored]
        ids = 4 * sum(node.depth for node in self._stored)
        self._bytes = _core.kv_total_bytes(held) + ids

    def _node(self, place: _Place, keys: np.ndarray) -> _Node:
        """The node of exactly these keys, made now if there is none."""
        root = self._roots.setdefault(place, _Node(keys[:0], None))
        _path, last, common = _walk(root, keys)
        if common < last.depth:  # The keys part from an edge, or end in it: it is split there.
            assert last.parent is not None
            at = common - last.parent.depth
            middle = _Node(last.keys[:at].copy(), last.parent)
            last.parent.children[int(last.keys[0])] = middle
            last.keys, last.parent = last.keys[at:].copy(), middle
            middle.children[int(last.keys[0])] = last
            last = middle
        if common == len(keys):
            return last
        node = _Node(keys[common:].copy(), last)
        last.children[int(node.keys[0])] = node
        return node

    def _drop(self, node: _Node) -> None:
        node.cache = None
        del self._stored[node]
        while node.cache is None and not node.children and node.parent is not None:
            del node.parent.children[int(node.keys[0])]
            node = node.parent
        if node.parent is None and not node.children:
            self._roots = {place: root for place, root in self._roots.items() if root is not node}


class RowPrefixes:
    """The prefix cache of one row, and what it knows the row's prompt by."""

    def __init__(self, cache: PrefixCache, prompt: Prompt) -> None:
        self.cache = cache
        self.prompt = prompt

    @functools.cached_property
    def keys(self) -> np.ndarray:
        """See `keys_of`; media are encoded where nothing was held."""
        return keys_of(self.prompt)

    def hold(self, soft_tokens: Mapping[Medium, np.ndarray]) -> None:
        """Says what the row reads in place of the soft tokens of these media."""
        self.keys = keys_of(self.prompt, soft_tokens)

    def look_up(
        self, adapters: Selection, hooks: BoundHooks | None, prompt_logprobs: bool,
        longer_than: int | None = None,
    ) -> Reading:  # fmt: skip
        """See `PrefixCache.begin`."""
        return self.cache.begin(self, adapters, hooks, prompt_logprobs, longer_than)


def keys_of(prompt: Prompt, soft_tokens: Mapping[Medium, np.ndarray] | None = None) -> np.ndarray:
    """What stands at each position, int64 [T]: ids, and negative numbers for soft tokens.

    Equal ids stand for any picture: the numbers at a medium's positions are a hash of its soft
    tokens (those of `soft_tokens`, where it has any), 8 bytes a position.
    """
    keys = prompt.ids.astype(np.int64)
    given = soft_tokens or {}
    for medium in prompt.media:
        rows = given[medium] if medium in given else medium.soft_tokens
        hashed = hashlib.shake_256(medium.kind.encode())
        hashed.update(np.ascontiguousarray(rows, np.float32).tobytes())
        digest = np.frombuffer(hashed.digest(8 * len(medium.positions)), np.int64)
        keys[medium.positions] = digest | np.int64(-(2**63))
    return keys


def pass_ends(count: int, media: Sequence[tuple[int, int]]) -> list[int]:
    """Where passes end over ids from 0 that begin with these `count`; no block of media is cut."""
    ends: list[int] = []
    begin = 0
    while (end := begin + _core.DEFAULT_CHUNK) <= count:
        for first, last in media:
            if first < end < last:
                end = first if first > begin else last
                break
        ends.append(end)
        begin = end
    return ends


def _first_needed(hooks: BoundHooks, span: Span) -> int:
    """The first position whose computation captures or edits see."""
    if any("S" in point.shape for point, _ in hooks.needed):
        return span.first
    if any(point.name.endswith(_UNFUSED) for point, _ in hooks.edited):
        return span.first
    return hooks.first_position(span)


def _lasting(length: int, reading: Reading) -> bool:
    """Whether a prefix of a long prompt is kept beside later ones of it: where prompts part, and
    at lengths that double.
    """
    passes = length // _core.DEFAULT_CHUNK
    return length in reading.cuts or passes & (passes - 1) == 0


def _common(a: np.ndarray, b: np.ndarray) -> int:
    count = min(len(a), len(b))
    different = a[:count] != b[:count]
    return int(different.argmax()) if different.any() else count


def _walk(root: _Node, keys: np.ndarray) -> tuple[list[_Node], _Node, int]:
    """Follows `keys`: the nodes passed, the one at or in whose edge it ends, and after how many."""
    path: list[_Node] = []
    node, depth = root, 0
    while depth < len(keys) and (child := node.children.get(int(keys[depth]))) is not None:
        depth += _common(child.keys, keys[depth:])
        if depth < child.depth:
            return path, child, depth
        path.append(child)
        node = child
    return path, node, depth
