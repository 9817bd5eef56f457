"""A small table of results: text on a terminal, HTML in a notebook, columns for everything else."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from gemloupe.errors import did_you_mean, quoted

_MAX_SHOWN = 60


class Table:
    """Named columns of equal length. `table["load"]` is one; `pandas.DataFrame(table.columns)`.

    Iterating gives one dict a row. Text and HTML show the first 60 rows and say how many follow.
    """

    def __init__(self, columns: Mapping[str, Sequence[Any]]) -> None:
        self.columns = {name: list(values) for name, values in columns.items()}
        lengths = {name: len(values) for name, values in self.columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"the columns have {lengths} entries; expected equal lengths")

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def __getitem__(self, name: str) -> list[Any]:
        try:
            return self.columns[name]
        except KeyError:
            hint = did_you_mean(name, self.columns) or f"The columns are {list(self.columns)}."
            raise KeyError(f"the table has no column {quoted(name)}. {hint}") from None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for values in zip(*self.columns.values(), strict=True):
            yield dict(zip(self.columns, values, strict=True))

    def _shown(self) -> list[list[str]]:
        return [[_cell(value) for value in values[:_MAX_SHOWN]] for values in self.columns.values()]

    def _more(self) -> str:
        return f"… {len(self) - _MAX_SHOWN} more rows" if len(self) > _MAX_SHOWN else ""

    def __repr__(self) -> str:
        columns = []
        for (name, values), cells in zip(self.columns.items(), self._shown(), strict=True):
            width = max(map(len, [name, *cells]))
            left = any(isinstance(value, str) for value in values)
            columns.append([c.ljust(width) if left else c.rjust(width) for c in [name, *cells]])
        lines = ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]
        return "\n".join([*lines, self._more()]).rstrip("\n")

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(name)}</th>" for name in self.columns)
        rows = (
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
            for cells in zip(*self._shown(), strict=True)
        )
        more = f"<p>{self._more()}</p>" if self._more() else ""
        return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>{more}"


def facts_html(title: str, rows: Iterable[tuple[str, str]]) -> str:
    """Returns a title over (name, value) rows as HTML in the page's own colours, light or dark."""
    cell = 'style="text-align:left; padding:2px 10px; border-bottom:1px solid rgba(127,127,127,.4)"'
    body = "".join(
        f"<tr><th {cell}>{html.escape(name)}</th><td {cell}>{html.escape(value)}</td></tr>"
        for name, value in rows
    )
    return (
        f"<div><code>{html.escape(title)}</code>"
        '<table style="border-collapse:collapse; color:inherit; background:transparent">'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
