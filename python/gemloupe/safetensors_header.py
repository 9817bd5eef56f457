"""Reads the headers of safetensors files: names, types, shapes and places, never the data.

A file is 8 bytes of header length (little endian), a JSON header, and the tensors' bytes without
gaps. Headers come from strangers: every figure is checked before anything is mapped.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from gemloupe import strict_json
from gemloupe.errors import bullet_list, format_bytes, format_shape, quoted

MAX_HEADER_BYTES = 100_000_000
INDEX_NAME = "model.safetensors.index.json"
_MAX_TENSORS = 100_000  # The largest released file has 2,130.
_MAX_RANK = 8
_MAX_ELEMENTS = 1 << 48

# Bits of one element, by the format's names.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "I16": 16, "U16": 16, "F16": 16,
    "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip

_AGAIN = "Download the checkpoint again."


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file; `begin` and `end` are byte offsets from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


def read_header(path: Path) -> list[TensorInfo]:
    """Reads one safetensors file's header; the tensors are returned in file order.

    Raises FileNotFoundError, and ValueError naming file, tensor, got and expected where the file
    is truncated, its header is malformed, or tensors overlap or leave holes.
    """
    header = _read_json(path)
    return parse_header(
        header, data_begin=8 + len(header), file_size=path.stat().st_size, where=str(path)
    )


def read_metadata(path: Path) -> dict[str, str]:
    """Returns the texts that the header holds beside the tensors; errors as in `read_header`."""
    header = _read_json(path)
    metadata = strict_json.parse_object(header, f"{path}, header").get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        _refuse(str(path), "__metadata__", quoted(metadata), "an object of strings")
    return metadata


def _read_json(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. {_AGAIN}")
    size = path.stat().st_size
    with path.open("rb") as file:
        length_bytes = file.read(8)
        length = int.from_bytes(length_bytes, "little")
        if len(length_bytes) < 8 or (length <= MAX_HEADER_BYTES and 8 + length > size):
            raise ValueError(
                f"{path}: the file ends inside its header: it has {size} bytes; expected at least "
                f"{8 + length if len(length_bytes) == 8 else 8}. {_AGAIN}"
            )
        if not 2 <= length <= MAX_HEADER_BYTES:
            raise ValueError(
                f"{path}: the header's length is {length} bytes; expected 2 to {MAX_HEADER_BYTES}. "
                "This is not a safetensors file, or it is damaged. " + _AGAIN
            )
        return file.read(length)


def parse_header(header: bytes, *, data_begin: int, file_size: int, where: str) -> list[TensorInfo]:
    """Checks a JSON header; the tensors' bytes fill [data_begin, file_size) without gaps."""
    if not header.startswith(b"{"):
        raise ValueError(
            f"{where}: the header begins with {quoted(header[:1])}; expected '{{'. {_AGAIN}"
        )
    entries = strict_json.parse_object(header, f"{where}, header")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        _refuse(where, "__metadata__", quoted(metadata), "an object of strings")
    if len(entries) > _MAX_TENSORS:
        raise ValueError(
            f"{where}: the header lists {len(entries)} tensors; expected at most {_MAX_TENSORS}. "
            f"{_AGAIN}"
        )
    tensors = [_tensor(where, name, value, data_begin) for name, value in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    _check_layout(where, tensors, data_begin, file_size)
    return tensors


def _refuse(where: str, name: str, got: str, expected: str) -> NoReturn:
    raise ValueError(f"{where}: tensor {quoted(name)}: got {got}; expected {expected}. {_AGAIN}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _tensor(where: str, name: str, value: Any, data_begin: int) -> TensorInfo:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        _refuse(where, name, quoted(value), "an object of dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        _refuse(where, name, f"dtype {quoted(dtype)}", "a type of the safetensors format")
    if not isinstance(shape, list) or len(shape) > _MAX_RANK or not all(map(_is_count, shape)):
        _refuse(where, name, f"shape {quoted(shape)}", f"at most {_MAX_RANK} sizes of 0 or more")
    is_pair = isinstance(offsets, list) and len(offsets) == 2 and all(map(_is_count, offsets))
    if not is_pair or offsets[0] > offsets[1]:
        _refuse(where, name, f"data_offsets {quoted(offsets)}", "[begin, end] with begin <= end")
    info = TensorInfo(name, dtype, tuple(shape), data_begin + offsets[0], data_begin + offsets[1])
    if info.elements > _MAX_ELEMENTS:
        _refuse(where, name, f"shape {format_shape(shape)}", f"at most {_MAX_ELEMENTS} elements")
    bits = info.elements * DTYPE_BITS[dtype]
    if bits % 8 or bits // 8 != info.end - info.begin:
        _refuse(
            where,
            name,
            f"{info.end - info.begin} bytes",
            f"{bits / 8:.15g} bytes for {dtype} {format_shape(shape)}",
        )
    return info


def _check_layout(where: str, tensors: list[TensorInfo], data_begin: int, file_size: int) -> None:
    position = data_begin
    for tensor in tensors:
        if tensor.end > file_size:
            raise ValueError(
                f"{where}: the file ends inside tensor {quoted(tensor.name)}: it has {file_size} "
                f"bytes; expected at least {tensor.end}. The download was cut off: download the "
                "checkpoint again."
            )
        if tensor.begin != position:
            problem = "overlaps the one before it" if tensor.begin < position else "follows a hole"
            _refuse(
                where, tensor.name, f"offset {tensor.begin}, which {problem}", f"offset {position}"
            )
        position = tensor.end
    if position != file_size:
        raise ValueError(
            f"{where}: {format_bytes(file_size - position)} follow the last tensor; expected the "
            f"file to end at byte {position}. {_AGAIN}"
        )


def read_folder(folder: Path) -> tuple[list[Path], dict[str, tuple[int, TensorInfo]]]:
    """Reads the headers of a checkpoint folder, one file or several with an index.

    Returns the files, and for every tensor name (number of its file, its place in it).
    """
    single = folder / "model.safetensors"
    if single.is_file():
        return [single], {tensor.name: (0, tensor) for tensor in read_header(single)}
    index = folder / INDEX_NAME
    if not index.is_file():
        raise FileNotFoundError(
            f"{folder}: no weights here; expected model.safetensors or {INDEX_NAME}. "
            + _other_weights(folder)
        )
    return _read_shards(folder, index)


def _other_weights(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    if "adapter_config.json" in names:
        return "This is an adapter: load the model that it was trained on."
    pickled = [name for name in names if re.fullmatch(r"pytorch_model.*\.bin", name)]
    if pickled:
        return (
            f"{pickled[0]} is a pickle, which can run code: save the model again with "
            "transformers, which writes safetensors."
        )
    gguf = [name for name in names if name.endswith(".gguf")]
    if gguf:
        return f"For the GGUF file, give its own name: {quoted(str(folder / gguf[0]))}."
    return "If a download was interrupted, start it again."


def _read_shards(folder: Path, index: Path) -> tuple[list[Path], dict[str, tuple[int, TensorInfo]]]:
    weight_map = strict_json.read_object(index, strict_json.MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f"{index}: weight_map is {quoted(weight_map)}; expected an object of tensor names and "
            f"file names. {_AGAIN}"
        )
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+\.safetensors", shard, re.ASCII):
            raise ValueError(
                f"{index}: weight_map puts {quoted(name)} into {quoted(shard)}; expected the name "
                f"of a .safetensors file in this folder. {_AGAIN}"
            )
    shards = sorted(set(weight_map.values()))
    absent = [shard for shard in shards if not (folder / shard).is_file()]
    if absent:
        raise FileNotFoundError(
            f"{folder}: {len(absent)} of {len(shards)} weight files are missing:\n"
            f"{bullet_list(absent)}\nFinish the download, or start it again."
        )
    tensors: dict[str, tuple[int, TensorInfo]] = {}
    for number, shard in enumerate(shards):
        for tensor in read_header(folder / shard):
            listed = weight_map.get(tensor.name)
            if listed != shard:
                raise ValueError(
                    f"{folder / shard}: tensor {quoted(tensor.name)} is here; {INDEX_NAME} puts it "
                    f"into {quoted(listed) if listed else 'no file'}. {_AGAIN}"
                )
            tensors[tensor.name] = (number, tensor)
    for name, shard in weight_map.items():
        if name not in tensors:
            raise ValueError(
                f"{folder / shard}: tensor {quoted(name)} is missing; {INDEX_NAME} puts it here. "
                f"{_AGAIN}"
            )
    return [folder / shard for shard in shards], tensors
