"""A KV cache as a short table, in text and in HTML: one row for layers that are alike."""

from __future__ import annotations

import html as _html
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gemloupe.errors import format_bytes

if TYPE_CHECKING:
    from gemloupe.cache import KvCache

_HEAD = ("layers", "kind", "positions", "window", "K x H", "storage", "bytes")


def ranges(indices: Sequence[int]) -> str:
    """Returns "0–3, 5" for [0, 1, 2, 3, 5]."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _title(cache: KvCache) -> str:
    held = f"positions {cache.start}…{cache.length - 1}" if len(cache) else "empty"
    return (
        f"KvCache({held}, at most {cache.max_tokens} tokens, {cache.dtype}, "
        f"{format_bytes(cache.nbytes)})"
    )


def _rows(cache: KvCache) -> list[tuple[str, ...]]:
    alike: dict[tuple[str, ...], list[int]] = {}
    for layer in cache.layers:
        positions = layer.positions
        shared = layer.kind == "shared"
        _count, heads, head_dim = layer.shape
        key: tuple[str, ...] = (
            f"shared, reads {layer.source_layer}" if shared else layer.kind,
            f"{positions[0]}…{positions[-1]}" if len(positions) else "none",
            str(layer.window or "all"),
            f"{heads} x {head_dim}",
            layer.storage,
        )
        alike.setdefault(key, []).append(layer.index)
    rows: list[tuple[str, ...]] = []
    for cells, indices in alike.items():
        held = sum(cache.layers[i].nbytes for i in indices)
        rows.append((ranges(indices), *cells, format_bytes(held)))
    return rows


def text(cache: KvCache) -> str:
    """Returns the table as text."""
    rows = [_HEAD, *_rows(cache)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    lines = ["".join(f"  {cell:<{widths[i]}}" for i, cell in enumerate(row)) for row in rows]
    return "\n".join([_title(cache), *(line.rstrip() for line in lines)])


def html(cache: KvCache) -> str:
    """Returns the table as HTML without colours of its own: it reads on light and dark pages."""
    cell = 'style="text-align:left; padding:2px 10px; border-bottom:1px solid rgba(127,127,127,.4)"'
    head = "".join(f"<th {cell}>{_html.escape(name)}</th>" for name in _HEAD)
    body = "".join(
        "<tr>" + "".join(f"<td {cell}>{_html.escape(value)}</td>" for value in row) + "</tr>"
        for row in _rows(cache)
    )
    return (
        f"<div><code>{_html.escape(_title(cache))}</code>"
        '<table style="border-collapse:collapse; color:inherit; background:transparent">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
