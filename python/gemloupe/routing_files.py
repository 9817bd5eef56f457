"""Router traces in Parquet and safetensors files. What is read may come from a stranger."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from gemloupe import strict_json
from gemloupe.errors import format_shape, missing_extra, one_of, quoted
from gemloupe.router_trace import RouterTrace

FORMAT = "gemloupe.routing"
VERSION = 1
SUFFIXES = (".parquet", ".safetensors")
_MAX_LAYERS = 1024
_MAX_EXPERTS = 1 << 16
_MAX_TOKENS = 1 << 30
# Floats are stored as they are: no file of ours unpacks to more than 6 times its size.
_MAX_GROWTH = 16

_AGAIN = "Save the trace again with trace.save(path)."


def save(trace: RouterTrace, path: Path) -> None:
    write = _writers()[_suffix(path)]
    if not len(trace):
        raise ValueError(f"{path}: the trace has no tokens; expected at least one to save")
    if trace.mean_outputs is not None and path.suffix == ".parquet":
        raise ValueError(
            f"{path}: the trace has mean_outputs, which a Parquet file has no place for; save it "
            "as .safetensors, or leave them out with trace.select(slice(None))"
        )
    with _replacing(path) as partial:
        write(trace, partial)


def load(path: Path) -> RouterTrace:
    read = {".parquet": _read_parquet, ".safetensors": _read_safetensors}[_suffix(path)]
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected one that trace.save(path) wrote")
    return read(path)


def _writers() -> dict[str, Callable[[RouterTrace, Path], None]]:
    return {".parquet": _write_parquet, ".safetensors": _write_safetensors}


def _suffix(path: Path) -> str:
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"{path}: the suffix is {quoted(path.suffix)}; expected {one_of(SUFFIXES)}"
        )
    return path.suffix


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its name when it is complete."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    os.close(descriptor)
    try:
        yield Path(name)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _refuse(path: Path, got: str, expected: str) -> NoReturn:
    raise ValueError(f"{path}: {got}; expected {expected}. {_AGAIN}")


@dataclass(frozen=True)
class _Sizes:
    """What a file says of its trace, checked."""

    layers: list[int]
    tokens: int
    chosen: int
    experts: int
    full: bool
    norms: bool

    @staticmethod
    def of(trace: RouterTrace) -> _Sizes:
        return _Sizes(
            layers=trace.layers.tolist(),
            tokens=len(trace),
            chosen=trace.experts.shape[2],
            experts=trace.num_experts,
            full=trace.probs is not None,
            norms=trace.output_norms is not None,
        )

    def to_json(self) -> str:
        return json.dumps({"version": VERSION, **vars(self)})

    @staticmethod
    def parse(text: bytes, path: Path) -> _Sizes:
        values = strict_json.parse_object(text, f"{path}, metadata {FORMAT}")
        names = ("version", "layers", "tokens", "chosen", "experts", "full", "norms")
        if set(values) != set(names):
            _refuse(path, f"{FORMAT} has {quoted(sorted(values))}", f"{sorted(names)}")
        if values["version"] != VERSION or isinstance(values["version"], bool):
            _refuse(path, f"its version is {quoted(values['version'])}", f"{VERSION}")
        layers = values["layers"]
        if (
            not isinstance(layers, list)
            or not 1 <= len(layers) <= _MAX_LAYERS
            or not all(_is_count(layer, 0, _MAX_LAYERS - 1) for layer in layers)
            or layers != sorted(set(layers))
        ):
            _refuse(path, f"layers are {quoted(layers)}", "ascending layer numbers")
        limits = {"tokens": _MAX_TOKENS, "experts": _MAX_EXPERTS, "chosen": _MAX_EXPERTS}
        for name, most in limits.items():
            if not _is_count(values[name], 1, most):
                _refuse(path, f"{name} is {quoted(values[name])}", f"a number from 1 to {most}")
        if values["chosen"] > values["experts"]:
            _refuse(path, f"{values['chosen']} are chosen of {values['experts']} experts", "fewer")
        for name in ("full", "norms"):
            if not isinstance(values[name], bool):
                _refuse(path, f"{name} is {quoted(values[name])}", "true or false")
        return _Sizes(**{name: values[name] for name in names[1:]})


def _is_count(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _make(arrays: Mapping[str, Any], sizes: _Sizes, tokens: list[str], path: Path) -> RouterTrace:
    """The trace of arrays of the right shapes and types; ValueError where values are wrong."""
    try:
        return RouterTrace(
            **arrays,
            layers=np.array(sizes.layers, np.int64),
            num_experts=sizes.experts,
            token_source=lambda: tokens,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}. {_AGAIN}") from None


# --- safetensors ---


_MEANS = "mean_outputs."


def _write_safetensors(trace: RouterTrace, path: Path) -> None:
    from safetensors.numpy import save_file

    pieces = [token.encode() for token in trace.token_strings]
    arrays = {name: getattr(trace, name) for name in _tensor_types(_Sizes.of(trace))}
    for layer, means in (trace.mean_outputs or {}).items():
        arrays[f"{_MEANS}{layer}"] = means
    arrays["tokens.utf8"] = np.frombuffer(b"".join(pieces), np.uint8)
    arrays["tokens.ends"] = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    save_file(arrays, path, {FORMAT: _Sizes.of(trace).to_json()})


def _tensor_types(sizes: _Sizes) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Fields of a trace -> their type in safetensors and shape."""
    layers, tokens = len(sizes.layers), sizes.tokens
    choices, all_experts = (layers, tokens, sizes.chosen), (layers, tokens, sizes.experts)
    types: dict[str, tuple[str, tuple[int, ...]]] = {
        "experts": ("I32", choices),
        "weights": ("F32", choices),
        "weights_norm": ("F32", choices),
        "ids": ("I32", (tokens,)),
        "positions": ("I64", (tokens,)),
    }
    if sizes.norms:
        types["output_norms"] = ("F32", choices)
    if sizes.full:
        types |= {"logits": ("F32", all_experts), "probs": ("F32", all_experts)}
    return types


def _read_safetensors(path: Path) -> RouterTrace:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get(FORMAT)
            if text is None:
                _refuse(path, "this is not a router trace", f"the metadata {FORMAT}")
            sizes = _Sizes.parse(text.encode(), path)
            types = _tensor_types(sizes)
            slices = {name: file.get_slice(name) for name in file.keys()}
            found = {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
            _check_tensors(path, found, types, sizes)
            arrays = {name: file.get_tensor(name) for name in found}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error}). {_AGAIN}") from None
    means = {
        layer: arrays.pop(f"{_MEANS}{layer}")
        for layer in sizes.layers
        if f"{_MEANS}{layer}" in arrays
    }
    arrays["mean_outputs"] = means or None
    tokens = _split_tokens(arrays.pop("tokens.utf8"), arrays.pop("tokens.ends"), path)
    return _make(arrays, sizes, tokens, path)


def _check_tensors(
    path: Path,
    found: Mapping[str, tuple[str, tuple[int, ...]]],
    types: Mapping[str, tuple[str, tuple[int, ...]]],
    sizes: _Sizes,
) -> None:
    def last(name: str) -> int:
        """A last size that the file itself tells."""
        shape = found.get(name, ("", ()))[1]
        return shape[-1] if shape else 0

    expected = {**types, "tokens.ends": ("I64", (sizes.tokens,))}
    expected["tokens.utf8"] = ("U8", (last("tokens.utf8"),))
    for name in (f"{_MEANS}{layer}" for layer in sizes.layers):
        if name in found:
            expected[name] = ("F32", (sizes.experts, last(name)))
    if set(found) != set(expected):
        _refuse(path, f"it holds {quoted(sorted(found))}", f"{sorted(expected)}")
    for name, (dtype, shape) in expected.items():
        if found[name] != (dtype, shape):
            got = f"{found[name][0]} {format_shape(found[name][1])}"
            _refuse(path, f"{name} is {got}", f"{dtype} {format_shape(shape)}")


def _split_tokens(utf8: np.ndarray, ends: np.ndarray, path: Path) -> list[str]:
    starts = np.concatenate([[0], ends[:-1]])
    if ends[-1] != len(utf8) or starts.min() < 0 or np.any(ends < starts):
        _refuse(
            path, "tokens.ends do not cut up tokens.utf8", f"ascending numbers up to {len(utf8)}"
        )
    data = utf8.tobytes()
    try:
        pairs = zip(starts.tolist(), ends.tolist(), strict=True)
        return [data[start:end].decode() for start, end in pairs]
    except UnicodeDecodeError:
        _refuse(path, "tokens.utf8 is not UTF-8", "text")


# --- Parquet ---


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise missing_extra("pyarrow", "a router trace in Parquet", "parquet") from None
    import pyarrow

    return pyarrow


def _schema(sizes: _Sizes) -> Any:
    pa = _pyarrow()
    columns = [
        ("layer", pa.int16()),
        ("row", pa.int32()),
        ("position", pa.int64()),
        ("id", pa.int32()),
        ("token", pa.string()),
        ("choice", pa.int16()),
        ("expert", pa.int32()),
        ("weight_norm", pa.float32()),
        ("weight", pa.float32()),
    ]
    if sizes.norms:
        columns.append(("output_norm", pa.float32()))
    if sizes.full:
        columns += [("logits", pa.list_(pa.float32())), ("probs", pa.list_(pa.float32()))]
    return pa.schema(columns, {FORMAT: sizes.to_json()})


def _write_parquet(trace: RouterTrace, path: Path) -> None:
    """One row group a layer: a reader that wants one layer skips the others."""
    pa = _pyarrow()
    import pyarrow.parquet as pq

    sizes = _Sizes.of(trace)
    schema = _schema(sizes)
    packed = ("layer", "row", "position", "id", "token", "choice", "expert")
    compression = {name: "zstd" if name in packed else "none" for name in schema.names}
    for name in ("logits", "probs"):  # A list's values are a column with a name of their own.
        compression[f"{name}.list.element"] = "none"
    every = _repeated(trace, sizes)
    tokens = pa.array(trace.token_strings, pa.string()).dictionary_encode()
    spelled = tokens.take(pa.array(every["row"])).cast(pa.string())
    options = {"compression": compression, "use_dictionary": ["token"], "write_page_checksum": True}
    with pq.ParquetWriter(path, schema, **options) as file:
        for index, layer in enumerate(sizes.layers):
            columns: dict[str, Any] = {
                **every,
                "layer": np.full(len(every["row"]), layer, np.int16),
                "token": spelled,
                "expert": trace.experts[index].ravel(),
                "weight_norm": trace.weights_norm[index].ravel(),
                "weight": trace.weights[index].ravel(),
            }
            if trace.output_norms is not None:
                columns["output_norm"] = trace.output_norms[index].ravel()
            if trace.logits is not None and trace.probs is not None:
                columns["logits"] = _first_choice_lists(trace.logits[index], sizes.chosen)
                columns["probs"] = _first_choice_lists(trace.probs[index], sizes.chosen)
            arrays = [pa.array(columns[field.name], field.type) for field in schema]
            file.write_table(pa.Table.from_arrays(arrays, schema=schema), len(every["row"]))


def _repeated(trace: RouterTrace, sizes: _Sizes) -> dict[str, np.ndarray]:
    """The columns that are the same in every layer; rows are tokens · choices."""
    return {
        "row": np.repeat(np.arange(sizes.tokens, dtype=np.int32), sizes.chosen),
        "position": np.repeat(trace.positions, sizes.chosen),
        "id": np.repeat(trace.ids, sizes.chosen),
        "choice": np.tile(np.arange(sizes.chosen, dtype=np.int16), sizes.tokens),
    }


def _first_choice_lists(values: np.ndarray, chosen: int) -> Any:
    """Lists [E] in the rows of choice 0, null in the others, of values [T, E]."""
    pa = _pyarrow()
    tokens, experts = values.shape
    row = np.arange(tokens * chosen + 1)
    offsets = ((row + chosen - 1) // chosen * experts).astype(np.int32)
    empty = pa.array(row[:-1] % chosen != 0)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.ravel()), mask=empty)


def _read_parquet(path: Path) -> RouterTrace:
    pa = _pyarrow()
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            text = (file.schema_arrow.metadata or {}).get(FORMAT.encode())
            if text is None:
                _refuse(path, "this is not a router trace", f"the metadata {FORMAT}")
            sizes = _Sizes.parse(text, path)
            _check_parquet(file, sizes, path)
            return _read_layers(file, sizes, path)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = quoted(str(error))
        raise ValueError(
            f"{path}: not a Parquet file that can be read ({reason}). {_AGAIN}"
        ) from None


def _check_parquet(file: Any, sizes: _Sizes, path: Path) -> None:
    expected = _schema(sizes)
    if not file.schema_arrow.equals(expected, check_metadata=False):
        got = [f"{field.name}: {field.type}" for field in file.schema_arrow]
        _refuse(path, f"the columns are {got[:20]}", str([f"{f.name}: {f.type}" for f in expected]))
    rows = sizes.tokens * sizes.chosen
    counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    if counts != [rows] * len(sizes.layers):
        _refuse(path, f"row groups have {quoted(counts)} rows", f"{len(sizes.layers)} of {rows}")
    types = _tensor_types(sizes).values()
    needed = sum(4 * int(np.prod(shape, dtype=object)) for _, shape in types)
    if needed > _MAX_GROWTH * path.stat().st_size:
        _refuse(path, f"it says it holds {needed} bytes of values", "no more than it has room for")


def _read_layers(file: Any, sizes: _Sizes, path: Path) -> RouterTrace:
    names = [name for name in file.schema_arrow.names if name != "token"]
    arrays: dict[str, list[np.ndarray]] = {name: [] for name in names}
    tokens: list[str] = []
    for index, layer in enumerate(sizes.layers):
        table = file.read_row_group(index, [*names, "token"] if index == 0 else names, False)
        if index == 0:
            spelled = table["token"].combine_chunks()
            _no_nulls(spelled, "token", path)
            tokens = spelled.take(np.arange(0, len(spelled), sizes.chosen)).to_pylist()
        for name in names:
            column = table[name].combine_chunks()
            if name in ("logits", "probs"):
                arrays[name].append(_from_lists(column, name, sizes, path))
            else:
                _no_nulls(column, name, path)
                arrays[name].append(column.to_numpy().reshape(sizes.tokens, sizes.chosen))
        _check_order({name: arrays[name][index] for name in names}, arrays, sizes, layer, path)
    fields = {"expert": "experts", "weight": "weights", "weight_norm": "weights_norm"}
    fields |= {"output_norm": "output_norms", "logits": "logits", "probs": "probs"}
    stacked: dict[str, Any] = {
        field: np.stack(arrays[name]) for name, field in fields.items() if name in arrays
    }
    stacked["ids"] = arrays["id"][0][:, 0].copy()
    stacked["positions"] = arrays["position"][0][:, 0].copy()
    return _make(stacked, sizes, tokens, path)


def _no_nulls(column: Any, name: str, path: Path) -> None:
    if column.null_count:
        _refuse(path, f"column {name} has {column.null_count} nulls", "none")


def _from_lists(column: Any, name: str, sizes: _Sizes, path: Path) -> np.ndarray:
    """Values [T, E] of lists that choice 0 alone has."""
    offsets = column.offsets.to_numpy()
    lengths = np.diff(offsets).reshape(sizes.tokens, sizes.chosen)
    values = column.flatten()
    present = column.is_valid().to_numpy(zero_copy_only=False).reshape(lengths.shape)
    right = np.all(lengths[:, 0] == sizes.experts) and present[:, 0].all()
    if not right or present[:, 1:].any() or values.null_count:
        _refuse(path, f"column {name} has other lists", f"{sizes.experts} values where choice is 0")
    return values.to_numpy().reshape(sizes.tokens, sizes.experts)


def _check_order(
    columns: Mapping[str, np.ndarray],
    arrays: Mapping[str, list[np.ndarray]],
    sizes: _Sizes,
    layer: int,
    path: Path,
) -> None:
    """Rows lie in the order of layer, row and choice, and tokens are the same in every layer."""
    ordered = (
        np.all(columns["layer"] == layer)
        and np.array_equal(columns["row"], np.arange(sizes.tokens)[:, None].repeat(sizes.chosen, 1))
        and np.all(columns["choice"] == np.arange(sizes.chosen))
    )
    same = all(np.all(columns[name] == arrays[name][0][:, :1]) for name in ("id", "position"))
    if not ordered or not same:
        _refuse(
            path, f"the rows of layer {layer} are out of order", "layer, row and choice ascending"
        )
