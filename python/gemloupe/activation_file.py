"""Activations of many inputs in one safetensors file: written row by row, read without loading.

A tensor for each hook point, [rows, …], and int32 [rows] of each row's origin: `input` (number of
the input), `positions` (absolute) and `ids` (the token's). The metadata holds `format`, `version`,
`model`, `inputs`, `complete` ("false" after Ctrl-C) and `reduced`, a JSON object from a hook point
to what its rows are a reduction of.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gemloupe import strict_json
from gemloupe.errors import did_you_mean, format_bytes, format_shape, one_of, quoted
from gemloupe.safetensors_header import TensorInfo, read_header, read_metadata

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""What activations can be stored in -> the file format's name."""

INDEX = ("input", "positions", "ids")
"""Tensors that say where a row comes from."""

_FORMAT = "gemloupe.activations"
_VERSION = "1"
_NUMPY = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I32": "<i4"}
_BLOCK_BYTES = 4 << 20
_MAX_NUMBER = 2**53  # No offset or count in a header has more digits.


@dataclass(frozen=True)
class Column:
    """A tensor [rows, *shape] that is to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """In the file format's terms."""

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(_NUMPY[self.dtype]).itemsize


class ActivationFileWriter:
    """Takes rows of all columns, and makes one file of them that appears when it is complete.

    Where the number of rows is known, each tensor is written at its place. Otherwise the first one
    is, and the others wait in files beside it. Memory: blocks of 4 MiB.
    """

    def __init__(
        self,
        path: Path,
        columns: Sequence[Column],
        rows: int | None,
        metadata: Mapping[str, str],
    ) -> None:
        """OSError where the disk has no room for `rows` of them, or the folder can't be written."""
        self._path = path
        index = [Column(name, (), "I32") for name in INDEX]
        self._columns = [*columns, *index]
        self.rows = 0
        """Rows that all columns have."""
        self._metadata = dict(metadata)
        longest = len(self._header(_MAX_NUMBER, _MAX_NUMBER, complete=False))
        self._header_bytes = longest + -(8 + longest) % 64
        if rows is not None:
            self._check_room(rows)
        self._paths = [path.with_name(f".{path.name}-{secrets.token_hex(4)}")]
        self._files: list[BinaryIO] = [self._paths[0].open("x+b")]
        self._places: list[tuple[BinaryIO, int]] = []
        begin = 8 + self._header_bytes
        for number, column in enumerate(self._columns):
            if rows is not None or number == 0:
                self._places.append((self._files[0], begin))
                begin += (rows or 0) * column.row_bytes
            else:
                self._paths.append(self._paths[0].with_name(f"{self._paths[0].name}-{number}"))
                self._files.append(self._paths[-1].open("x+b"))
                self._places.append((self._files[-1], 0))
        self._planned = rows

    def add(self, values: Sequence[np.ndarray], index: Sequence[np.ndarray]) -> None:
        """Appends n rows: of each column a float32 or int32 array [n, *shape], and of `INDEX`.

        ValueError where a value is larger than its dtype holds.
        """
        count = len(index[0])
        if self._planned is not None and self.rows + count > self._planned:
            raise RuntimeError(f"{self.rows + count} rows came; {self._planned} were announced")
        for column, (file, begin), array in zip(
            self._columns, self._places, [*values, *index], strict=True
        ):
            assert array.shape == (count, *column.shape), column.name
            file.seek(begin + self.rows * column.row_bytes)
            step = max(1, _BLOCK_BYTES // max(1, column.row_bytes))
            for first in range(0, count, step):
                file.write(_stored(array[first : first + step], column).data)
        self.rows += count

    def finish(self, inputs: int, *, complete: bool) -> None:
        """Brings the tensors together under a header; the file appears under its name."""
        main = self._files[0]
        begin = 8 + self._header_bytes
        for column, (file, stored) in zip(self._columns, self._places, strict=True):
            size = self.rows * column.row_bytes
            _move(file, stored, main, begin, size)
            begin += size
            if file is not main:
                file.truncate(0)  # Its room may be needed by the next.
        main.truncate(begin)
        header = self._header(self.rows, inputs, complete=complete)
        main.seek(0)
        main.write(self._header_bytes.to_bytes(8, "little"))
        main.write(header.ljust(self._header_bytes))
        main.flush()
        os.fsync(main.fileno())
        os.replace(self._paths[0], self._path)

    def close(self) -> None:
        """Removes what is not finished; call it in any case."""
        for file in self._files:
            file.close()
        for path in self._paths:
            path.unlink(missing_ok=True)

    def _header(self, rows: int, inputs: int, *, complete: bool) -> bytes:
        metadata = {"format": _FORMAT, "version": _VERSION, **self._metadata}
        metadata |= {"inputs": str(inputs), "complete": json.dumps(complete)}
        entries: dict[str, Any] = {"__metadata__": metadata}
        begin = 0
        for column in self._columns:
            end = begin + rows * column.row_bytes if rows != _MAX_NUMBER else _MAX_NUMBER
            entries[column.name] = {
                "dtype": column.dtype,
                "shape": [rows, *column.shape],
                "data_offsets": [begin, end],
            }
            begin = end
        return json.dumps(entries).encode()

    def _check_room(self, rows: int) -> None:
        size = 8 + self._header_bytes + rows * sum(column.row_bytes for column in self._columns)
        free = shutil.disk_usage(self._path.parent).free
        if size > free:
            raise OSError(
                errno.ENOSPC,
                f"{self._path} needs {format_bytes(size)} for {rows} rows; its disk has "
                f"{format_bytes(free)} left. Record less, or with dtype='float16'",
            )


def _stored(array: np.ndarray, column: Column) -> np.ndarray:
    if column.dtype == "BF16":
        return to_bfloat16(array)
    if column.dtype == "F16":
        with np.errstate(over="ignore"):
            half = np.ascontiguousarray(array, "<f2")
        lost = np.isinf(half) & np.isfinite(array)
        if lost.any():
            raise ValueError(
                f"{column.name} reaches {np.abs(array[lost]).max():.6g}, more than float16 holds "
                f'(65504); expected dtype="bfloat16" or "float32"'
            )
        return half
    return np.ascontiguousarray(array, _NUMPY[column.dtype])


def to_bfloat16(array: np.ndarray) -> np.ndarray:
    """The bfloat16 bits (uint16) of float32 values, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return np.where(np.isnan(array), np.uint16(0x7FC0), rounded).astype("<u2")


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """float32 values of bfloat16 bits."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def _move(source: BinaryIO, begin: int, target: BinaryIO, to: int, size: int) -> None:
    """Copies bytes; within one file only towards its beginning."""
    if source is target and begin == to:
        return
    for done in range(0, size, _BLOCK_BYTES):
        source.seek(begin + done)
        block = source.read(min(_BLOCK_BYTES, size - done))
        target.seek(to + done)
        target.write(block)


# --- reading ---


def open_activations(path: str | os.PathLike[str]) -> Activations:
    """Opens a file that `record` wrote; nothing but its header is read.

    Raises FileNotFoundError, and ValueError for a file that is no such file, or damaged.
    """
    return Activations(Path(path))


class Activations(Mapping[str, Any]):
    """Hook point -> activations [rows, …], mapped from the file and read where they are looked at.

    float32, float16 and int32 (chosen experts) are read-only arrays; bfloat16 is a `Bfloat16Array`,
    whose slices are float32 arrays. `block` gives float32 rows of any of them, `means` what
    `gl.edits.mean` takes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        tensors = {info.name: info for info in read_header(path)}
        metadata = read_metadata(path)
        if (metadata.get("format"), metadata.get("version")) != (_FORMAT, _VERSION):
            raise ValueError(
                f"{path}: the metadata has format {quoted(metadata.get('format'))}, version "
                f"{quoted(metadata.get('version'))}; expected {_FORMAT!r}, {_VERSION!r}, as "
                "gl.record writes them"
            )
        self.model = metadata.get("model", "")
        """What the model was loaded from."""
        self.complete = metadata.get("complete") == "true"
        """False where Ctrl-C ended the recording: later inputs are missing."""
        self.reduced = _reduced(path, metadata)
        """Hook point -> "mean", "norm" or "last", for points that were recorded so."""
        self.rows = _rows(path, tensors)
        """Rows of every point."""
        self._tensors = {name: info for name, info in tensors.items() if name not in INDEX}
        self.input, self.positions, self.ids = (self._map(tensors[name]) for name in INDEX)
        """int32 [rows] each: number of the input, absolute position, token id. -1 for positions and
        ids of rows that are a mean over positions."""

    def _map(self, info: TensorInfo) -> np.ndarray:
        if info.begin == info.end:  # Nothing can't be mapped.
            return np.zeros(info.shape, _NUMPY[info.dtype])
        return np.memmap(self.path, _NUMPY[info.dtype], "r", info.begin, info.shape)

    def __getitem__(self, name: str) -> Any:
        info = self._tensors.get(name)
        if info is None:
            hint = did_you_mean(str(name), self._tensors) or f"It has {one_of(list(self)[:8])}."
            raise KeyError(f"{quoted(name)} is not in {self.path}. {hint}")
        array = self._map(info)
        return Bfloat16Array(array) if info.dtype == "BF16" else array

    def block(self, name: str, rows: Any) -> np.ndarray:
        """float32 [n, …]: some rows of a point (a slice, indices or a mask), whatever its dtype."""
        return np.asarray(self[name][rows], np.float32)

    def means(self, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
        """The mean over all rows of each point (or of `names`), float32: `gl.edits.mean(…)`.

        ValueError where there are no rows.
        """
        if not self.rows:
            raise ValueError(f"{self.path} has no rows to take the mean of")
        means = {}
        for name in self if names is None else names:
            shape = self[name].shape[1:]
            total = np.zeros(shape)
            step = max(1, _BLOCK_BYTES // max(1, 4 * int(np.prod(shape, dtype=np.int64))))
            for first in range(0, self.rows, step):
                block = self.block(name, slice(first, first + step))
                total += block.sum(0, dtype=np.float64)
            means[name] = (total / self.rows).astype(np.float32)
        return means

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        inputs = len(np.unique(self.input))
        lines = [f"  {n}  {i.dtype} {format_shape(i.shape)}" for n, i in self._tensors.items()]
        rest = [f"  … {len(lines) - 12} more"] if len(lines) > 12 else []
        state = "" if self.complete else ", interrupted"
        first = f"Activations({str(self.path)!r}, {self.rows} rows of {inputs} inputs{state})"
        return "\n".join([first, *lines[:12], *rest])


class Bfloat16Array:
    """bfloat16 values in a file as float32: `array[rows]` and `np.asarray(array)` convert."""

    def __init__(self, bits: np.ndarray) -> None:
        self.bits = bits
        """uint16: the values as they are stored."""
        self.shape = bits.shape
        self.ndim = bits.ndim
        self.dtype = np.dtype(np.float32)

    def __len__(self) -> int:
        return len(self.bits)

    def __getitem__(self, rows: Any) -> Any:
        return from_bfloat16(self.bits[rows])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return from_bfloat16(self.bits).astype(dtype or np.float32, copy=False)

    def __repr__(self) -> str:
        return f"Bfloat16Array({format_shape(self.shape)})"


def _reduced(path: Path, metadata: Mapping[str, str]) -> dict[str, str]:
    text = metadata.get("reduced", "{}")
    reduced = strict_json.parse_object(text.encode(), f"{path}, reduced")
    if not all(value in ("mean", "norm", "last") for value in reduced.values()):
        raise ValueError(f"{path}: reduced is {quoted(text)}; expected mean, norm or last")
    return reduced


def _rows(path: Path, tensors: Mapping[str, TensorInfo]) -> int:
    missing = [name for name in INDEX if name not in tensors]
    if missing:
        raise ValueError(f"{path}: tensor {one_of(missing)} is missing. Record the file again.")
    count = tensors[INDEX[0]].shape[:1]
    for name, info in tensors.items():
        is_index = name in INDEX
        right = info.dtype == "I32" and len(info.shape) == 1 if is_index else info.dtype in _NUMPY
        if not right or info.shape[:1] != count or not count:
            rows = ", ".join(map(str, count))
            expected = f"I32 [{rows}]" if is_index else f"{one_of(list(_NUMPY))} [{rows}, …]"
            raise ValueError(
                f"{path}: {quoted(name)} is {info.dtype} {format_shape(info.shape)}; expected "
                f"{expected}. Record the file again."
            )
    return count[0]


__all__ = ["Activations", "ActivationFileWriter", "Bfloat16Array", "Column", "open_activations"]
