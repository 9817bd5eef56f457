"""Writes activations as the dataset that SAELens reads as `cached_activations_path`.

It is a folder in the format of Hugging Face's `datasets` (Arrow streams, dataset_info.json,
state.json) with a row per context: a column named after the hook point, [context_size, d_in], and
`token_ids` [context_size]. Written with pyarrow alone.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from gemloupe.arrays import as_float32, check_shape
from gemloupe.errors import missing_extra, one_of, quoted

DTYPES = ("float32", "float16")
# Readers map the files and copy what they slice, batch by batch.
_BATCH_BYTES = 16 << 20
_SHARD_BYTES = 512 << 20
# An Arrow list counts its elements in int32.
_MAX_BATCH_ELEMENTS = 2**31 - 1


class ActivationWriter:
    """Takes activations [n, d_in] with their token ids and writes contexts of `context_size`.

    with ActivationWriter("acts", "blocks.12.hook_resid_post", d_in=1536, context_size=128) as out:
        for prompt in prompts:
            run = model.run(prompt, capture="layers.12.resid_post", logits=None)
            out.add(run["layers.12.resid_post"], run.prompt.ids)

    Rows are joined over calls, as SAELens joins prompts; what is left at the end and fills no
    context is not written (`left_over` tokens). Memory: at most one batch of 16 MiB. The folder
    can be loaded once the writer is closed; after an error, nothing of it is left.
    """

    def __init__(
        self,
        path: str | Path,
        hook_name: str,
        *,
        d_in: int,
        context_size: int,
        dtype: str = "float32",
    ) -> None:
        """`hook_name`: what SAELens's config says, such as "blocks.12.hook_resid_post".

        Raises FileExistsError where `path` is no empty folder, ValueError for sizes below 1 or
        another dtype than float32 and float16, ImportError without pyarrow.
        """
        for name, size in (("d_in", d_in), ("context_size", context_size)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} is {size!r}; expected a number of 1 or more")
        if d_in * context_size > _MAX_BATCH_ELEMENTS:
            raise ValueError(
                f"a context has {d_in} x {context_size} numbers; expected at most 2^31 - 1"
            )
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {quoted(dtype)}; expected {one_of(DTYPES)}")
        if not hook_name or hook_name == "token_ids":
            raise ValueError(f"hook_name is {quoted(hook_name)}; expected a hook point's name")
        self.path = Path(path)
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise FileExistsError(f"{self.path} is there already; expected a new or empty folder")
        self.hook_name = hook_name
        self.d_in = d_in
        self.context_size = context_size
        self.contexts = 0
        """Contexts written, or waiting in the batch that is being filled."""
        self._arrow = _pyarrow()
        self._dtype = np.dtype(dtype)
        context_bytes = d_in * context_size * self._dtype.itemsize
        self._batch_contexts = max(1, _BATCH_BYTES // context_bytes)
        self._values = np.empty((self._batch_contexts * context_size, d_in), self._dtype)
        self._ids = np.empty(self._batch_contexts * context_size, np.int32)
        self._filled = 0
        self._schema = self._make_schema()
        self._files: list[Path] = []
        self._shard: Any = None
        self._closed = False
        self.path.mkdir(parents=True, exist_ok=True)

    @property
    def left_over(self) -> int:
        """Tokens since the last full context."""
        return self._filled % self.context_size

    def add(self, activations: Any, token_ids: Sequence[int] | np.ndarray) -> None:
        """Appends activations [n, d_in] (any array, see `gemloupe.arrays`) and n token ids.

        Raises ValueError with both shapes where they do not fit, and once the writer is closed.
        """
        if self._closed:
            raise ValueError(f"the writer of {self.path} is closed; expected add before close")
        values = as_float32(activations, "activations", ("n", self.d_in))
        ids = np.asarray(token_ids)
        if ids.dtype.kind not in "iu" and ids.size:
            raise TypeError(f"token_ids have dtype {ids.dtype}; expected integers")
        check_shape(ids, "token_ids", (len(values),))
        largest = float(np.finfo(self._dtype).max)
        if self._dtype == np.float16 and (np.abs(values) > largest).any():
            raise ValueError(
                f"activations reach {np.abs(values).max():.6g}, more than float16 holds "
                f'({largest:.0f}); expected dtype="float32"'
            )
        begin = 0
        while begin < len(values):
            count = min(len(values) - begin, len(self._ids) - self._filled)
            place = slice(self._filled, self._filled + count)
            self._values[place] = values[begin : begin + count]
            self._ids[place] = ids[begin : begin + count]
            before = self._filled // self.context_size
            self._filled += count
            self.contexts += self._filled // self.context_size - before
            begin += count
            if self._filled == len(self._ids):
                self._write_batch()

    def close(self) -> None:
        """Writes what is left and the files that make it a dataset; a second call does nothing.

        Raises ValueError where not one context was filled.
        """
        if self._closed:
            return
        if not self.contexts:
            self._abandon()
            raise ValueError(
                f"{self._filled} tokens fill no context of {self.context_size}; "
                f"nothing was written to {self.path}"
            )
        left = self.left_over
        self._filled -= left
        if self._filled:
            self._write_batch()
        self._filled = left
        self._end_shard()
        self._closed = True
        names = self._name_shards()
        _write_json(self.path / "dataset_info.json", self._info())
        state: dict[str, Any] = {"_data_files": [{"filename": name} for name in names]}
        state |= {"_fingerprint": uuid.uuid4().hex[:16], "_format_columns": None}
        state |= {"_format_kwargs": {}, "_format_type": None}
        state |= {"_output_all_columns": False, "_split": None}
        _write_json(self.path / "state.json", state)

    def __enter__(self) -> ActivationWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._abandon()

    def _abandon(self) -> None:
        """Removes the files of an unfinished dataset."""
        if self._closed:
            return
        self._closed = True
        self._end_shard()
        for file in self._files:
            file.unlink(missing_ok=True)

    def _write_batch(self) -> None:
        arrow = self._arrow
        contexts = self._filled // self.context_size
        values = arrow.array(self._values[: self._filled].reshape(-1))
        for width in (self.d_in, self.context_size):
            offsets = np.arange(0, len(values) + 1, width, dtype=np.int32)
            values = arrow.ListArray.from_arrays(arrow.array(offsets), values)
        ids = arrow.FixedSizeListArray.from_arrays(
            arrow.array(self._ids[: self._filled]), self.context_size
        )
        assert len(values) == len(ids) == contexts
        if self._shard is None:
            self._files.append(self.path / f"data-{len(self._files):05d}.arrow.part")
            self._file = self._files[-1].open("wb")
            self._shard = arrow.ipc.new_stream(self._file, self._schema)
        self._shard.write_batch(arrow.record_batch([values, ids], schema=self._schema))
        self._filled = 0
        if self._file.tell() >= _SHARD_BYTES:
            self._end_shard()

    def _end_shard(self) -> None:
        if self._shard is not None:
            self._shard.close()
            self._file.close()
            self._shard = None

    def _name_shards(self) -> list[str]:
        names = []
        for index, file in enumerate(self._files):
            names.append(f"data-{index:05d}-of-{len(self._files):05d}.arrow")
            file.rename(self.path / names[-1])
        return names

    def _features(self) -> dict[str, Any]:
        shape = [self.context_size, self.d_in]
        ids = {"dtype": "int32", "_type": "Value"}
        return {
            self.hook_name: {"shape": shape, "dtype": self._dtype.name, "_type": "Array2D"},
            "token_ids": {"feature": ids, "length": self.context_size, "_type": "Sequence"},
        }

    def _info(self) -> dict[str, Any]:
        empty = {"citation": "", "description": "", "homepage": "", "license": ""}
        return {**empty, "features": self._features()}

    def _make_schema(self) -> Any:
        """The columns; the first one is marked as the extension type of `datasets.Array2D`."""
        arrow = self._arrow
        number = arrow.from_numpy_dtype(self._dtype)
        shape = json.dumps([[self.context_size, self.d_in], self._dtype.name])
        mark = {"ARROW:extension:name": "datasets.features.features.Array2DExtensionType"}
        mark["ARROW:extension:metadata"] = shape
        matrix = arrow.list_(arrow.list_(number))
        fields = [
            arrow.field(self.hook_name, matrix, metadata=mark),
            arrow.field("token_ids", arrow.list_(arrow.int32(), self.context_size)),
        ]
        described = json.dumps({"info": {"features": self._features()}})
        return arrow.schema(fields, metadata={"huggingface": described})


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2))


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError:
        raise missing_extra("pyarrow", "Writing a dataset for SAELens", "parquet") from None
    return pyarrow
