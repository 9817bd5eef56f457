"""KV caches in safetensors files: the stored bits of every layer, and what they belong to.

The metadata holds `format`, `version`, `fingerprint` (of the model), `start`, `max_tokens`,
`dtype`, `sliding`, `storage` (a list, one of "separate", "derived" or "shared" for each layer) and
`provenance`. The bytes are little endian, as the format demands and as this engine stores them.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

import numpy as np

from gemloupe import _core, strict_json
from gemloupe.errors import does_not_fit, format_shape, quoted
from gemloupe.safetensors_header import TensorInfo, read_header, read_metadata

if TYPE_CHECKING:
    from gemloupe.cache import KvCache
    from gemloupe.model import Model

_FORMAT = "gemloupe.kv_cache"
_VERSION = "1"
_MAX_PROVENANCE = 1 << 20
_FILE_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8"}
_ELEMENT_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1, "I32": 4}
# What decides what keys and values mean, and where they lie.
_LAYER_FIELDS = (
    "window", "num_kv_heads", "head_dim", "kv_source", "values_are_keys", "rope_theta",
    "rotary_pairs", "rope_factor",
)  # fmt: skip
_MODEL_FIELDS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps",
    "hidden_size_per_layer_input", "num_experts", "top_k_experts", "bidirectional",
)  # fmt: skip


def fingerprint(model: Model) -> str:
    """Returns what a model is, as JSON: its sizes, its layers, and a hash of its final norm.

    The final norm is stored in full precision in every format, and any training changes it.
    """
    text = model.config.text
    norm = np.ascontiguousarray(model.loaded_weights["norm.weight"], "<f4")
    fields: dict[str, Any] = {name: getattr(text, name) for name in _MODEL_FIELDS}
    fields["layers"] = [
        {name: getattr(layer, name) for name in _LAYER_FIELDS} for layer in text.layers
    ]
    fields["weights"] = hashlib.sha256(norm.tobytes()).hexdigest()
    return json.dumps(fields)


def save(cache: KvCache, path: str | os.PathLike[str]) -> None:
    target = Path(path)
    # A fork, so that header and layers are those of one moment.
    frozen = cache.fork()
    layers = [
        (i, frozen.layers[i].shape)
        for i in range(frozen.core.num_layers)
        if frozen.core.layer_source(i) == i
    ]
    tensors: list[tuple[str, str, tuple[int, ...]]] = [("tokens", "I32", (len(frozen),))]
    for i, shape in layers:
        tensors += _layer_tensors(frozen, i, shape[0])
    header = _header(tensors, _metadata(frozen))
    partial = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    try:
        with partial.open("xb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.write(frozen.tokens.astype("<i4").tobytes())
            for i, _shape in layers:
                _write_layer(file, frozen, i)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _layer_tensors(
    cache: KvCache, layer: int, count: int
) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, file dtype, shape) of what a layer stores, in the order of `read_bits`."""
    heads, head_dim, pairs = cache.core.layer_shape(layer)
    dtype = _FILE_DTYPES[cache.dtype]
    derived = cache.core.layer_storage(layer) == "derived"
    key_dims = 2 * pairs if derived else head_dim
    tensors: list[tuple[str, str, tuple[int, ...]]] = [
        (f"layers.{layer}.keys", dtype, (count, heads, key_dims)),
        (f"layers.{layer}.values", dtype, (count, heads, head_dim)),
    ]
    if cache.dtype == "int8":
        tensors += [
            (f"layers.{layer}.key_scales", "F32", (count, heads)),
            (f"layers.{layer}.value_scales", "F32", (count, heads)),
        ]
    if derived:
        tensors.append((f"layers.{layer}.key_weight", "F32", (head_dim,)))
    return tensors


def _metadata(cache: KvCache) -> dict[str, str]:
    return {
        "format": _FORMAT,
        "version": _VERSION,
        "fingerprint": cache.fingerprint,
        "start": str(cache.start),
        "max_tokens": str(cache.max_tokens),
        "dtype": cache.dtype,
        "sliding": cache.sliding,
        "storage": json.dumps(_storages(cache)),
        "provenance": json.dumps([[n.kind, n.detail, n.length] for n in cache.provenance]),
    }


def _storages(cache: KvCache) -> list[str]:
    core = cache.core
    return [
        core.layer_storage(i) if core.layer_source(i) == i else "shared"
        for i in range(core.num_layers)
    ]


def _header(tensors: list[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": metadata}
    begin = 0
    for name, dtype, shape in tensors:
        end = begin + _ELEMENT_BYTES[dtype] * int(np.prod(shape, dtype=np.int64))
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    return header + b" " * (-len(header) % 8)  # the data begins at a multiple of 8 bytes


def _write_layer(file: BinaryIO, cache: KvCache, layer: int) -> None:
    for array in cache.core.read_bits(layer):
        file.write(array.data)
    if cache.core.layer_storage(layer) == "derived":
        file.write(cache.core.layer_key_weight(layer).data)


def load(path: str | os.PathLike[str], model: Model) -> KvCache:
    from gemloupe.cache import CacheNote, KvCache  # which imports this module

    where = Path(path)
    if not where.is_file():
        raise FileNotFoundError(f"{where}: no such file; expected one that KvCache.save wrote")
    tensors = {tensor.name: tensor for tensor in read_header(where)}
    metadata = read_metadata(where)
    if metadata.get("format") != _FORMAT:
        raise ValueError(
            f"{where}: metadata format is {quoted(metadata.get('format'))}; expected "
            f"{quoted(_FORMAT)}. This is not a KV cache that KvCache.save wrote."
        )
    if metadata.get("version") != _VERSION:
        raise ValueError(
            f"{where}: version {quoted(metadata.get('version'))}; expected {_VERSION}. Read it "
            "with the gemloupe that wrote it."
        )
    same_weights = _check_model(where, metadata.get("fingerprint", ""), model)
    cache = _empty(where, metadata, model)
    storages = _set_storages(where, metadata, cache)
    tokens = _tokens(where, tensors, cache, model)
    first = _first_positions(where, tensors, cache, len(tokens))
    needed = sum(tensor.end - tensor.begin for tensor in tensors.values())
    if needed > (available := _core.available_memory()):
        raise does_not_fit(f"the KV cache in {where}", needed, available, [])
    cache.core.adopt(tokens.tolist(), first)
    with where.open("rb") as file:
        for layer, storage in enumerate(storages):
            if storage == "shared":
                continue
            count = cache.length - first[layer]
            read = {
                name.rsplit(".")[-1]: _read(where, file, tensors[name], shape)
                for name, _dtype, shape in _layer_tensors(cache, layer, count)
            }
            if storage == "derived":
                _check_key_weight(where, read["key_weight"], cache, layer)
            none = np.zeros(0, np.uint8)
            key_scales, value_scales = (
                read.get(name, none).view(np.float32) for name in ("key_scales", "value_scales")
            )
            cache.core.write_bits(layer, read["keys"], read["values"], key_scales, value_scales)
    notes = [CacheNote(*note) for note in _notes(where, metadata)]
    if not same_weights:
        warnings.warn(
            f"{where}: the cache was filled by a model with the same layers and other weights "
            f"than {model.checkpoint.source}",
            stacklevel=3,
        )
    return KvCache(cache.core, cache.fingerprint, notes)


def _refuse(where: Path, field: str, got: object, expected: str) -> NoReturn:
    raise ValueError(
        f"{where}: metadata {field} is {quoted(got)}; expected {expected}. The file is damaged, or "
        "KvCache.save did not write it."
    )


def _check_model(where: Path, text: str, model: Model) -> bool:
    """Whether the weights agree too; ValueError where the layers don't."""
    theirs = _json(where, "fingerprint", text)
    if not isinstance(theirs, dict):
        _refuse(where, "fingerprint", text, "an object")
    ours = json.loads(fingerprint(model))
    differing = [name for name in _MODEL_FIELDS if theirs.get(name) != ours[name]]
    if differing:
        name = differing[0]
        raise ValueError(
            f"{where}: belongs to a model whose {name} is {quoted(theirs.get(name))}; expected "
            f"{quoted(ours[name])}, as in {model.checkpoint.source}"
        )
    layers = theirs.get("layers")
    if not isinstance(layers, list) or len(layers) != len(ours["layers"]):
        _refuse(where, "fingerprint", layers, f"{len(ours['layers'])} layers")
    for i, (got, expected) in enumerate(zip(layers, ours["layers"], strict=True)):
        if got == expected:
            continue
        name = next((n for n in _LAYER_FIELDS if not isinstance(got, dict) or
                     got.get(n) != expected[n]), "layout")  # fmt: skip
        value = got.get(name) if isinstance(got, dict) else got
        raise ValueError(
            f"{where}: belongs to a model whose layer {i} has {name} {quoted(value)}; expected "
            f"{quoted(expected.get(name))}, as in {model.checkpoint.source}"
        )
    return theirs.get("weights") == ours["weights"]


def _check_key_weight(where: Path, bits: np.ndarray, cache: KvCache, layer: int) -> None:
    if bits.tobytes() != cache.core.layer_key_weight(layer).tobytes():
        raise ValueError(
            f"{where}: layer {layer} holds keys as a weight times the values, and this model's "
            "weight is another; expected the model that filled the cache. Save a cache made with "
            "new_cache(separate_keys=True) to read it with other weights."
        )


def _count(where: Path, metadata: dict[str, str], field: str, most: int) -> int:
    text = metadata.get(field, "")
    if not (text.isascii() and text.isdigit() and len(text) <= 12 and int(text) <= most):
        _refuse(where, field, text, f"a number from 0 to {most}")
    return int(text)


def _empty(where: Path, metadata: dict[str, str], model: Model) -> KvCache:
    positions = model.config.text.max_position_embeddings
    start = _count(where, metadata, "start", positions - 1)
    max_tokens = _count(where, metadata, "max_tokens", positions - start)
    dtype, sliding = metadata.get("dtype", ""), metadata.get("sliding", "")
    if dtype not in _FILE_DTYPES:
        _refuse(where, "dtype", dtype, "float32, float16, bfloat16 or int8")
    if sliding not in ("ring", "full"):
        _refuse(where, "sliding", sliding, "ring or full")
    if max_tokens == 0:
        _refuse(where, "max_tokens", max_tokens, "1 or more")
    most = None if max_tokens == positions - start else max_tokens
    return model.new_cache(most, dtype, sliding, start)


def _set_storages(where: Path, metadata: dict[str, str], cache: KvCache) -> list[str]:
    text = metadata.get("storage", "")
    storages = _json(where, "storage", text)
    expected = _storages(cache)
    if not isinstance(storages, list) or len(storages) != len(expected):
        _refuse(where, "storage", text, f"a list of {len(expected)}")
    for i, (storage, possible) in enumerate(zip(storages, expected, strict=True)):
        if storage == possible:
            continue
        if storage != "separate" or possible != "derived":
            _refuse(where, f"storage of layer {i}", storage, quoted(possible))
        cache.core.separate_keys(i)
    return storages


def _tensor(
    where: Path, tensors: dict[str, TensorInfo], name: str, dtype: str, rank: int
) -> TensorInfo:
    tensor = tensors.get(name)
    if tensor is None:
        raise ValueError(f"{where}: tensor {quoted(name)} is missing. The file is damaged.")
    if tensor.dtype != dtype or len(tensor.shape) != rank:
        raise ValueError(
            f"{where}: tensor {quoted(name)} is {tensor.dtype} {format_shape(tensor.shape)}; "
            f"expected {dtype} of {rank} dims. The file is damaged."
        )
    return tensor


def _read(where: Path, file: BinaryIO, tensor: TensorInfo, shape: tuple[int, ...]) -> np.ndarray:
    if tensor.shape != shape:
        raise ValueError(
            f"{where}: tensor {quoted(tensor.name)} has shape {format_shape(tensor.shape)}; "
            f"expected {format_shape(shape)}. The file is damaged."
        )
    file.seek(tensor.begin)
    data = np.fromfile(file, np.uint8, tensor.end - tensor.begin)
    if len(data) != tensor.end - tensor.begin:
        raise ValueError(f"{where}: the file ends inside tensor {quoted(tensor.name)}")
    return data


def _tokens(
    where: Path, tensors: dict[str, TensorInfo], cache: KvCache, model: Model
) -> np.ndarray:
    tensor = _tensor(where, tensors, "tokens", "I32", 1)
    if tensor.shape[0] > cache.max_tokens:
        raise ValueError(
            f"{where}: {tensor.shape[0]} tokens; expected at most max_tokens, {cache.max_tokens}"
        )
    with where.open("rb") as file:
        tokens = _read(where, file, tensor, tensor.shape).view("<i4")
    vocab = model.config.text.vocab_size
    outside = tokens[(tokens < 0) | (tokens >= vocab)]
    if len(outside):
        raise ValueError(f"{where}: token id {outside[0]}; expected 0 to {vocab - 1}")
    return tokens


def _first_positions(
    where: Path, tensors: dict[str, TensorInfo], cache: KvCache, count: int
) -> list[int]:
    """The first position that each layer holds; the tensors are exactly those of the layers."""
    core = cache.core
    end = cache.start + count
    first = []
    names = {"tokens"}
    for layer in range(core.num_layers):
        if core.layer_source(layer) != layer:
            first.append(cache.start)
            continue
        expected = _layer_tensors(cache, layer, 0)
        for name, dtype, shape in expected:
            tensor = _tensor(where, tensors, name, dtype, len(shape))
            names.add(tensor.name)
        held = tensors[expected[0][0]].shape[0]
        window = core.layer_window(layer)
        least = min(count, window - 1) if window and cache.sliding == "ring" else count
        if not least <= held <= count:
            raise ValueError(
                f"{where}: layer {layer} holds {held} positions; expected {least} to {count}. "
                "The file is damaged."
            )
        first.append(end - held)
        for name, _dtype, shape in _layer_tensors(cache, layer, held):
            if tensors[name].shape != shape:
                raise ValueError(
                    f"{where}: tensor {quoted(name)} has shape "
                    f"{format_shape(tensors[name].shape)}; expected {format_shape(shape)}"
                )
    if unknown := sorted(set(tensors) - names):
        raise ValueError(
            f"{where}: tensor {quoted(unknown[0])} is not part of this cache. The file is damaged."
        )
    return first


def _json(where: Path, field: str, text: str) -> Any:
    wrapped = b'{"_":' + text.encode("utf-8", "replace") + b"}"
    return strict_json.parse_object(wrapped, f"{where}, metadata {field}")["_"]


def _notes(where: Path, metadata: dict[str, str]) -> list[tuple[str, str, int]]:
    text = metadata.get("provenance", "")
    if len(text) > _MAX_PROVENANCE:
        _refuse(where, "provenance", text, f"at most {_MAX_PROVENANCE} characters")
    notes = _json(where, "provenance", text)
    fits = isinstance(notes, list) and all(
        isinstance(note, list)
        and len(note) == 3
        and isinstance(note[0], str)
        and isinstance(note[1], str)
        and isinstance(note[2], int)
        for note in notes
    )
    if not fits:
        _refuse(where, "provenance", text, "a list of [kind, detail, length]")
    return [(note[0], note[1], note[2]) for note in notes]
