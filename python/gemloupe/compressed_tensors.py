"""Folders whose config.json has a quantization_config: which can be loaded, and their tensors.

compressed-tensors' "pack-quantized" format with symmetric 4-bit integers in groups of 32 (W4A16,
Google's *-qat-w4a16-ct) is read value for value: `X.weight_packed` holds eight integers plus 8 in
each int32, from the lowest bits up, `X.weight_scale` one scale for each group, and
`X.weight_shape` the matrix's shape. Modules that were left alone have an `X.weight` as ever.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from gemloupe.errors import format_shape, quoted
from gemloupe.safetensors_header import TensorInfo

STORED = "w4a16"
"""What a matrix of this format is called as a stored dtype."""
GROUP = 32

_PACKED, _SCALE, _SHAPE = ".weight_packed", ".weight_scale", ".weight_shape"
_UNREAD = (".weight_zero_point", ".weight_g_idx", ".weight_global_scale", ".input_scale")
_SCALE_DTYPES = ("BF16", "F16", "F32")
_ADVICE = (
    'Load the checkpoint that this one was made from (dtype="int4" or "int8" quantises it), '
    "Google's '-qat-w4a16-ct' checkpoint, or a GGUF file of the model"
)
_METHODS = {
    "bitsandbytes": "bitsandbytes", "gptq": "GPTQ", "awq": "AWQ", "torchao": "torchao",
    "modelopt": "NVIDIA ModelOpt (NVFP4, FP8)", "fp8": "FP8", "fbgemm_fp8": "FP8 of FBGEMM",
    "finegrained_fp8": "fine-grained FP8", "mxfp4": "MXFP4", "hqq": "HQQ", "quanto": "Quanto",
    "auto-round": "AutoRound", "aqlm": "AQLM", "quark": "AMD Quark", "eetq": "EETQ",
}  # fmt: skip


class Pair(NamedTuple):
    """A matrix in two tensors, each with the number of its file."""

    shape: tuple[int, int]
    packed: tuple[int, TensorInfo]
    scale: tuple[int, TensorInfo]


def check(config: Any, where: str) -> None:
    """Returns if a quantization_config is W4A16 in groups of 32; else ValueError.

    The message names the method and what to load instead; `where` (file and field) begins it.
    """
    if not isinstance(config, Mapping):
        _refuse(where, f"is {quoted(config)}", "an object")
    method = config.get("quant_method")
    if method != "compressed-tensors":
        name = _METHODS.get(str(method), quoted(method) if method else "an unnamed method")
        _refuse(where, f"says that the weights are quantised with {name}", _expected())
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        _refuse(where, f"has config_groups {quoted(groups)}", _expected())
    for name, group in groups.items():
        _check_group(config, group, f"{where}, config_groups.{name}")
    status = config.get("quantization_status", "compressed")
    if status != "compressed":
        _refuse(where, f"has quantization_status {quoted(status)}", "'compressed'")
    sparsity = config.get("sparsity_config")
    if sparsity and (not isinstance(sparsity, Mapping) or sparsity.get("format") != "dense"):
        _refuse(where, "has a sparsity_config", "dense weights")
    transforms = config.get("transform_config")
    if transforms and (not isinstance(transforms, Mapping) or transforms.get("config_groups")):
        _refuse(where, "has a transform_config", "none")


def _expected() -> str:
    return (
        "float32, bfloat16 or float16 weights, or compressed-tensors W4A16 (format pack-quantized, "
        f"4-bit symmetric integers in groups of {GROUP})"
    )


def _check_group(config: Mapping[str, Any], group: Any, where: str) -> None:
    if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
        _refuse(where, f"is {quoted(group)}", _expected())
    form = group.get("format") or config.get("format")
    if form != "pack-quantized":
        _refuse(where, f"has the compressed-tensors format {quoted(form)}", _expected())
    if group.get("input_activations") is not None or group.get("output_activations") is not None:
        _refuse(where, "quantises activations", "weights alone (W4A16)")
    weights = group["weights"]
    wanted = {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP,
    }  # fmt: skip
    for field, value in wanted.items():
        default = "int" if field == "type" else True if field == "symmetric" else None
        got = weights.get(field, default)
        if field == "strategy" and got is None:
            continue  # A group size alone says it.
        if got != value:
            _refuse(where, f"has weights.{field} {quoted(got)}", f"{value!r}, as {_expected()}")


def _refuse(where: str, got: str, expected: str) -> NoReturn:
    raise ValueError(f"{where} {got}; expected {expected}. {_ADVICE}.")


def pair_tensors(
    files: list[Path], tensors: dict[str, tuple[int, TensorInfo]]
) -> tuple[dict[str, tuple[int, TensorInfo]], dict[str, Pair]]:
    """Puts a matrix `X.weight` in the place of each `X.weight_packed` and its companions.

    Returns the tensors, the new ones with dtype "W4A16" and the place of their integers, and the
    pairs by the new names. ValueError where companions are missing or do not fit.
    """
    merged: dict[str, tuple[int, TensorInfo]] = {}
    pairs: dict[str, Pair] = {}
    for full_name, (number, info) in tensors.items():
        stem = full_name.removesuffix(_PACKED)
        if full_name.endswith((_SCALE, _SHAPE)):
            suffix = _SCALE if full_name.endswith(_SCALE) else _SHAPE
            if full_name.removesuffix(suffix) + _PACKED in tensors:
                continue
        if full_name.endswith(_UNREAD):
            _wrong(files[number], full_name, "is there", "symmetric weights in their own order")
        if not full_name.endswith(_PACKED):
            merged[full_name] = (number, info)
            continue
        name = f"{stem}.weight"
        if name in tensors:
            _wrong(files[number], full_name, f"stands beside {quoted(name)}", "one of them")
        pair = _pair(files, tensors, stem)
        pairs[name] = pair
        merged[name] = (number, TensorInfo(name, "W4A16", pair.shape, info.begin, info.end))
    return merged, pairs


def _pair(files: list[Path], tensors: dict[str, tuple[int, TensorInfo]], stem: str) -> Pair:
    number, packed = tensors[stem + _PACKED]
    file = files[number]
    if packed.dtype != "I32" or len(packed.shape) != 2 or packed.shape[1] * 8 % GROUP:
        got = f"is {packed.dtype} {format_shape(packed.shape)}"
        _wrong(file, packed.name, got, f"I32 [rows, columns / 8], columns a multiple of {GROUP}")
    rows, cols = packed.shape[0], packed.shape[1] * 8
    scale = tensors.get(stem + _SCALE)
    if scale is None:
        _wrong(file, stem + _SCALE, "is missing", f"[{rows}, {cols // GROUP}]")
    if scale[1].dtype not in _SCALE_DTYPES or scale[1].shape != (rows, cols // GROUP):
        got = f"is {scale[1].dtype} {format_shape(scale[1].shape)}"
        _wrong(files[scale[0]], stem + _SCALE, got, f"BF16, F16 or F32 [{rows}, {cols // GROUP}]")
    shape = tensors.get(stem + _SHAPE)
    if shape is not None:
        stored = _read_shape(files[shape[0]], shape[1])
        if stored != (rows, cols):
            _wrong(files[shape[0]], stem + _SHAPE, f"holds {stored}", f"{(rows, cols)}")
    return Pair((rows, cols), (number, packed), scale)


def _read_shape(file: Path, info: TensorInfo) -> tuple[int, ...]:
    code = {"I64": "q", "I32": "i"}.get(info.dtype)
    if code is None or info.shape != (2,):
        _wrong(file, info.name, f"is {info.dtype} {format_shape(info.shape)}", "I64 [2]")
    with file.open("rb") as stream:
        stream.seek(info.begin)
        return struct.unpack(f"<2{code}", stream.read(info.end - info.begin))


def _wrong(file: Path, name: str, got: str, expected: str) -> NoReturn:
    raise ValueError(
        f"{file}: tensor {quoted(name)} {got}; expected {expected}. Download the checkpoint again."
    )
