"""`gl.record`: runs a model over many inputs and writes what is captured while it goes on."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from gemloupe import _core, capturing
from gemloupe.activation_file import DTYPES, ActivationFileWriter, Column
from gemloupe.config import TextConfig
from gemloupe.errors import one_of, quoted
from gemloupe.positions import Span, resolve
from gemloupe.progress import ProgressBar
from gemloupe.prompt import Prompt, is_batch
from gemloupe.run import Run, logits_rows

if TYPE_CHECKING:
    from gemloupe.model import Model

FORMATS = ("safetensors", "saelens")


def record(
    model: Model,
    inputs: Any,
    capture: str | Iterable[str] | Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    format: str = "safetensors",
    dtype: str = "float32",
    edit: Any = None,
    adapter: Any = None,
    logits: str | slice | None = None,
    chunk: int = _core.DEFAULT_CHUNK,
    context_size: int | None = None,
    overwrite: bool = False,
    thinking: bool = False,
    bos: bool | str = "auto",
) -> Path:
    """Runs `model` over `inputs`, one after the other, and writes captures to disk as they come.

    `inputs`: one input as `model.run` takes it, or an iterable of these or of batches, a generator
    too; media come in a chat's parts or a `Prompt`. Memory: what is captured of one input, whatever
    their number. `capture`, `edit`, `adapter`, `logits`, `chunk`, `thinking`, `bos`: as in
    `model.run`; logits="all" is for the points `logits…`. All points need rows of the same
    positions; points whose rows are cached positions or pairs of them (attn.keys, attn.scores, …)
    are not taken. Shows a progress bar on a terminal.

    format "safetensors": a file that `gl.open_activations` and every reader of safetensors opens:
    for each point a tensor [rows, …] under its name in `dtype` ("float32", "float16", "bfloat16";
    router.experts are int32), and int32 [rows] `input` (number of the input), `positions` and
    `ids`. A capture with reduce="mean" has one row for each input. Where `inputs` is a list, the
    room on disk is checked first; where it is not, all points but the first are written twice.
    format "saelens": a folder that SAELens reads as `cached_activations_path`, of one point, in
    "float32" or "float16": the inputs' rows joined to contexts of `context_size` tokens; what fills
    none at the end is left out.

    The file or folder appears under its name when it is complete. Ctrl-C completes it with the
    inputs that are done (`Activations.complete` is False then), if there are any, and is raised
    again; after another error nothing is left. Returns the path.

    FileExistsError where `path` exists, without `overwrite` (a folder is only ever replaced where
    it holds a dataset for SAELens and nothing else); OSError where the disk is too small; KeyError
    for points that the model lacks; ValueError for other arguments and for values beyond float16.
    """
    destination = Path(path)
    _check_choice("format", format, FORMATS)
    _check_choice("dtype", dtype, list(DTYPES)[:2] if format == "saelens" else list(DTYPES))
    text = model.config.text
    adapters = model.adapters.selected(adapter)
    wanted, _ = capturing.parse_capture(capture, text, adapters)
    _check_points(wanted)
    if (context_size is None) != (format == "safetensors"):
        raise ValueError(
            f"context_size is {context_size!r} for format={format!r}; expected tokens of a context "
            'for "saelens", and None for "safetensors"'
        )
    _check_destination(destination, format, overwrite)
    source = _Inputs(model, inputs, thinking, bos)
    arguments = {"edit": edit, "adapter": dict(adapters.adapters), "logits": logits, "chunk": chunk}
    writer: _Writer
    if format == "saelens":
        writer = _saelens_writer(destination, wanted, text, dtype, context_size or 0)
    else:
        rows = sum(len(_planned(wanted[0], p, logits)) for p in source) if source.known else None
        writer = _FileWriter(destination, wanted, text, dtype, rows, model.checkpoint.source)
    try:
        _run_all(model, source, wanted, writer, arguments)
    finally:
        writer.close()
    return destination


class _Writer(Protocol):
    def add(self, values: Sequence[np.ndarray], origin: _Origin) -> None: ...
    def finish(self, inputs: int, *, complete: bool) -> bool:
        """Makes the destination appear; False where there was nothing to write."""

    def close(self) -> None:
        """Removes what is not finished."""


@dataclass(frozen=True)
class _Origin:
    """Where rows come from; arrays [rows]."""

    input: np.ndarray
    positions: np.ndarray
    ids: np.ndarray


def _run_all(
    model: Model,
    source: _Inputs,
    wanted: Sequence[capturing.Wanted],
    writer: _Writer,
    arguments: Mapping[str, Any],
) -> None:
    capture = {one.key: one.at for one in wanted}
    done = 0
    count = source.count()
    with ProgressBar("recording", counted=None if count else "inputs") as bar:
        try:
            for prompt in source:
                run = model.run(prompt, capture=capture, routing=False, **arguments)
                values, origin = _rows_of(run, wanted, done)
                with _uninterrupted():
                    writer.add(values, origin)
                    done += 1
                if count:
                    bar.show(done / count)
                else:
                    bar.count(done)
        except KeyboardInterrupt:
            if done:
                writer.finish(done, complete=False)
            raise
    if not done:
        raise ValueError("inputs is empty; expected at least one input to record")
    if not writer.finish(done, complete=True):
        raise ValueError(f"capture chose no position in any of the {done} inputs")


def _rows_of(
    run: Run, wanted: Sequence[capturing.Wanted], number: int
) -> tuple[list[np.ndarray], _Origin]:
    """The captured rows of each point, and where they come from."""
    first = _positions(wanted[0], run.positions_of(wanted[0].key))
    values = []
    for one in wanted:
        positions = _positions(one, run.positions_of(one.key))
        if not np.array_equal(positions, first):
            raise ValueError(
                f"{one.key} has rows of positions {quoted(positions.tolist())}, {wanted[0].key} of "
                f"{quoted(first.tolist())}; expected the same: record them in two files"
            )
        value = run[one.key]
        single = one.at.reduce in ("mean", "last") and len(positions)
        values.append(value[None] if single else value)
    ids = np.where(first < 0, -1, run.prompt.ids[first])
    return values, _Origin(np.full(len(first), number), first, ids)


def _positions(wanted: capturing.Wanted, positions: np.ndarray) -> np.ndarray:
    """The positions of the rows that a capture of `positions` leaves; -1 for a mean."""
    if wanted.at.reduce == "mean":
        return np.full(min(1, len(positions)), -1)
    return positions[-1:] if wanted.at.reduce == "last" else positions


def _planned(wanted: capturing.Wanted, prompt: Prompt, logits: Any) -> np.ndarray:
    """The positions of the rows that a run over `prompt` will give."""
    where = resolve(wanted.at.positions, Span(prompt, 0))
    every = np.arange(len(prompt))
    chosen = np.isin(every, where.listed)
    if where.begin is not None:
        chosen |= every >= where.begin
    if wanted.point.name.startswith("logits"):
        begin, end = logits_rows(logits, len(prompt))
        chosen &= (every >= begin) & (every < end)
    return _positions(wanted, every[chosen])


class _Inputs:
    """The prompts of `inputs`; prepared again each time they are iterated over."""

    def __init__(self, model: Model, inputs: Any, thinking: bool, bos: bool | str) -> None:
        if isinstance(inputs, (Mapping, bytes)) or not (
            isinstance(inputs, Prompt) or hasattr(inputs, "__iter__")
        ):
            raise TypeError(
                f"inputs is {quoted(inputs)}; expected texts, chats, ids or prompts, or an "
                "iterable of these"
            )
        self._model = model
        self._inputs = inputs
        self._thinking = thinking
        self._bos = bos
        listed = isinstance(inputs, (list, tuple, np.ndarray))
        self._single = isinstance(inputs, (str, Prompt)) or (listed and not is_batch(inputs))
        self.known = self._single or listed
        """Whether they can be iterated over twice."""

    def __iter__(self) -> Iterator[Prompt]:
        for item in [self._inputs] if self._single else self._inputs:
            prepared = self._model.prepare(item, thinking=self._thinking, bos=self._bos)
            yield from prepared if isinstance(prepared, list) else [prepared]

    def count(self) -> int | None:
        """How many there are; None where that is not known before the end."""
        if self._single:
            return 1
        if not self.known:
            return None
        return sum(len(item) if is_batch(item) else 1 for item in self._inputs)


class _FileWriter:
    """One safetensors file."""

    def __init__(
        self,
        path: Path,
        wanted: Sequence[capturing.Wanted],
        config: TextConfig,
        dtype: str,
        rows: int | None,
        model: str,
    ) -> None:
        columns = [_column(one, config, dtype) for one in wanted]
        reduced = {one.key: one.at.reduce for one in wanted if one.at.reduce}
        metadata = {"model": str(model), "reduced": json.dumps(reduced)}
        self._writer = ActivationFileWriter(path, columns, rows, metadata)

    def add(self, values: Sequence[np.ndarray], origin: _Origin) -> None:
        self._writer.add(values, [origin.input, origin.positions, origin.ids])

    def finish(self, inputs: int, *, complete: bool) -> bool:
        if not self._writer.rows:
            return False
        self._writer.finish(inputs, complete=complete)
        return True

    def close(self) -> None:
        self._writer.close()


def _column(wanted: capturing.Wanted, config: TextConfig, dtype: str) -> Column:
    shape = wanted.shape(config)
    if wanted.at.reduce == "norm":
        shape = shape[:-1] if len(shape) > 1 else ()
    is_choice = wanted.point.name.endswith("router.experts") and wanted.at.reduce is None
    return Column(wanted.key, shape, "I32" if is_choice else DTYPES[dtype])


class _SaelensWriter:
    """A folder for SAELens, written beside its destination and moved there."""

    def __init__(self, path: Path, hook_name: str, width: int, size: int, dtype: str) -> None:
        from gemloupe.integrations.saelens import ActivationWriter

        self._path = path
        self._width = width
        self._folder = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
        self._writer = ActivationWriter(
            self._folder, hook_name, d_in=width, context_size=size, dtype=dtype
        )

    def add(self, values: Sequence[np.ndarray], origin: _Origin) -> None:
        self._writer.add(values[0].reshape(-1, self._width), origin.ids)

    def finish(self, inputs: int, *, complete: bool) -> bool:
        if not complete and not self._writer.contexts:
            return False
        self._writer.close()
        if self._path.is_dir():
            shutil.rmtree(self._path)
        self._folder.rename(self._path)
        return True

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


def _saelens_writer(
    path: Path,
    wanted: Sequence[capturing.Wanted],
    config: TextConfig,
    dtype: str,
    context_size: int,
) -> _SaelensWriter:
    if len(wanted) != 1 or wanted[0].at.reduce:
        raise ValueError(
            f"capture is {one_of([one.key for one in wanted[:8]])} ({len(wanted)} points); "
            'expected one point, not reduced, for format="saelens"'
        )
    one = wanted[0]
    width = int(np.prod(one.shape(config), dtype=np.int64))
    name = one.key if one.delta else one.point.transformer_lens or one.point.name
    return _SaelensWriter(path, name, width, context_size, dtype)


def _check_points(wanted: Sequence[capturing.Wanted]) -> None:
    if not wanted:
        raise ValueError("capture names no hook point; expected at least one to record")
    for one in wanted:
        if "S" in one.point.shape:
            raise ValueError(
                f"{one.key} is {one.point.shape}: its size changes with every input; expected "
                "points with a row for each token, such as attn.z; model.run captures this one"
            )


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {quoted(value)}; expected {one_of(choices)}")


def _check_destination(path: Path, format: str, overwrite: bool) -> None:
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise FileExistsError(f"{path} is there already; pass overwrite=True to replace it")
    if path.is_dir() != (format == "saelens") or (path.is_dir() and not _is_dataset(path)):
        raise FileExistsError(
            f"{path} is there already and is no {format} recording; expected a path that can be "
            "replaced"
        )


def _is_dataset(folder: Path) -> bool:
    names = {entry.name for entry in folder.iterdir()}
    described = {"dataset_info.json", "state.json"}
    shards = {name for name in names if name.startswith("data-") and name.endswith(".arrow")}
    return not names or (described <= names and names == described | shards)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Holds Ctrl-C back until the block is done, so that no row is written by half."""
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is None:  # None: not set from Python.
        yield
        return
    came: list[Any] = []
    before = signal.signal(signal.SIGINT, lambda *arguments: came.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came and callable(before):
        before(*came[0])


__all__ = ["record"]
