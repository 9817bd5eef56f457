"""KV caches in files: bit for bit, for every storage; damaged and foreign files are refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import gemloupe as gl
from cache_helpers import DTYPES, LONG, filled, load, same, sources
from gemloupe.cache import CacheNote
from tiny_models import VARIANTS, random_ids


@pytest.mark.parametrize("sliding", ["ring", "full"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_cache_comes_back_bit_for_bit(
    tiny: Callable, tmp_path: Path, variant: str, dtype: str, sliding: str
) -> None:
    model = load(tiny, variant)
    cache = filled(model, dtype=dtype, sliding=sliding, max_tokens=500, start=3)
    edited = cache.layers[0]
    edited.set(keys=2 * edited.keys[-2:], positions=[-2, -1])
    cache.save(tmp_path / "cache.safetensors")
    # Another process has another model object: model_id plays no part.
    other = load(tiny, variant)
    back = gl.KvCache.load(tmp_path / "cache.safetensors", other)
    assert same(back, cache)
    for index in sources(cache):
        for got, want in zip(back.core.read_bits(index), cache.core.read_bits(index), strict=True):
            assert got.tobytes() == want.tobytes()
        assert back.layers[index].storage == cache.layers[index].storage
        assert np.array_equal(back.layers[index].positions, cache.layers[index].positions)
    for field in ("start", "length", "max_tokens", "dtype", "sliding", "provenance"):
        assert getattr(back, field) == getattr(cache, field)
    assert np.array_equal(back.tokens, cache.tokens)
    got, want = model.run([5], cache=cache).logits, other.run([5], cache=back).logits
    assert np.array_equal(got, want)
    assert os.listdir(tmp_path) == ["cache.safetensors"]


@pytest.mark.parametrize("variant", ["e2b", "31b"])
def test_layers_with_set_entries_and_derived_ones_keep_their_storage(
    tiny: Callable, tmp_path: Path, variant: str
) -> None:
    model = load(
        tiny,
        variant,
        layer_types=["full_attention", "sliding_attention"] * 2 + ["full_attention"],
        **({"num_kv_shared_layers": 2} if variant == "e2b" else {}),
    )
    cache = filled(model, 70, dtype="float16")
    cache.layers[0].set(values=cache.layers[0].values)
    cache.save(tmp_path / "c")
    back = gl.KvCache.load(tmp_path / "c", model)
    derived = "derived" if variant == "31b" else "separate"
    assert [back.layers[i].storage for i in (0, 2)] == ["separate", derived]
    assert same(back, cache)


def test_an_empty_cache_and_one_of_one_token_come_back(tiny: Callable, tmp_path: Path) -> None:
    model = load(tiny, "26b")
    for count in (0, 1):
        cache = model.new_cache()
        if count:
            model.run([2], cache=cache)
        cache.save(tmp_path / "c")
        back = gl.KvCache.load(tmp_path / "c", model)
        assert len(back) == count and same(back, cache)
        assert back.max_tokens == cache.max_tokens


def test_other_libraries_read_the_file(tiny: Callable, tmp_path: Path) -> None:
    cache = filled(load(tiny, "31b"), dtype="float16")
    path = tmp_path / "c.safetensors"
    cache.save(path)
    tensors = load_file(path)
    layer = cache.layers[5]
    assert np.array_equal(tensors["layers.5.values"].astype(np.float32), layer.values)
    assert tensors["layers.5.keys"].shape == (LONG, 1, 4)  # two rotated pairs of 11
    assert np.array_equal(tensors["tokens"], cache.tokens)


def test_a_save_that_fails_leaves_the_old_file(
    tiny: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = filled(load(tiny, "e2b"), 20)
    path = tmp_path / "c.safetensors"
    cache.save(path)
    before = path.read_bytes()

    def fail(_descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    cache.truncate(10)
    with pytest.raises(OSError, match="no space"):
        cache.save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def rewrite(path: Path, change: Callable[[dict], None]) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def metadata(**fields: str) -> Callable[[dict], None]:
    return lambda header: header["__metadata__"].update(fields)


def rename(old: str, new: str) -> Callable[[dict], None]:
    return lambda header: header.update({new: header.pop(old)})


def reshape(name: str, shape: list[int]) -> Callable[[dict], None]:
    return lambda header: header[name].update(shape=shape)


DAMAGES = {
    "format": (metadata(format="pt"), "not a KV cache that KvCache.save wrote"),
    "version": (metadata(version="2"), "version '2'; expected 1"),
    "fingerprint text": (metadata(fingerprint="{"), "not JSON"),
    "fingerprint kind": (metadata(fingerprint="[]"), "expected an object"),
    "fingerprint depth": (metadata(fingerprint="[" * 100_000), "JSON|nested"),
    "start": (metadata(start="-1"), "start is '-1'"),
    "start beyond": (metadata(start="9999999"), "start is '9999999'"),
    "max_tokens": (metadata(max_tokens="0"), "max_tokens is 0"),
    "too many tokens": (metadata(max_tokens="19"), "20 tokens; expected at most max_tokens, 19"),
    "dtype": (metadata(dtype="float16"), "is F32 .*; expected F16"),
    "unknown dtype": (metadata(dtype="int4"), "dtype is 'int4'"),
    "sliding": (metadata(sliding="spiral"), "sliding is 'spiral'"),
    "storage": (metadata(storage='["derived"]'), "a list of 6"),
    "impossible storage": (
        metadata(storage=json.dumps(["derived"] * 6)),
        "storage of layer 0 is 'derived'; expected 'separate'",
    ),
    "other storage": (metadata(storage=json.dumps(["separate"] * 6)), "has shape"),
    "provenance": (metadata(provenance="[[1, 2, 3]]"), "list of .kind, detail, length."),
    "surrogate": (metadata(provenance='["\ud800"]'), "list of .kind, detail, length."),
    "missing tensor": (rename("layers.2.values", "layers.9.values"), "'layers.2.values' is miss"),
    "heads": (reshape("layers.0.keys", [20, 2, 24]), "shape .20, 2, 24.; expected .20, 4, 12."),
    "positions": (reshape("layers.0.keys", [40, 4, 6]), "holds 40 positions; expected 11 to 20"),
    "bytes": (reshape("layers.0.keys", [19, 4, 12]), "bytes"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_hostile_file_is_a_value_error(
    tiny: Callable, tmp_path: Path, damage: str
) -> None:
    model = load(tiny, "31b")
    path = tmp_path / "c.safetensors"
    filled(model, 20).save(path)
    change, message = DAMAGES[damage]
    rewrite(path, change)
    with pytest.raises(ValueError, match=message):
        gl.KvCache.load(path, model)


@pytest.mark.filterwarnings("ignore:.*other weights")
def test_a_cut_or_foreign_file_is_a_value_error(tiny: Callable, tmp_path: Path) -> None:
    _torch_model, folder = tiny("31b")
    model = load(tiny, "31b")
    path = tmp_path / "c.safetensors"
    filled(model, 20).save(path)
    data = path.read_bytes()
    for cut in (0, 7, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(ValueError):
            gl.KvCache.load(path, model)
    path.write_bytes(data + b"\0")
    with pytest.raises(ValueError, match="follow the last tensor"):
        gl.KvCache.load(path, model)
    generator = np.random.default_rng(0)
    length = int.from_bytes(data[:8], "little")
    for _ in range(300):  # any byte of the header may be anything
        changed = bytearray(data)
        changed[int(generator.integers(0, 8 + length))] = int(generator.integers(0, 256))
        path.write_bytes(changed)
        try:
            gl.KvCache.load(path, model)
        except (ValueError, MemoryError):
            pass
    with pytest.raises(ValueError, match="not a KV cache"):
        gl.KvCache.load(folder / "model.safetensors", model)
    with pytest.raises(FileNotFoundError, match="no such file"):
        gl.KvCache.load(tmp_path / "absent", model)
    with pytest.raises(FileNotFoundError, match="no such file"):
        gl.KvCache.load(tmp_path, model)


def test_token_ids_outside_the_vocabulary_are_refused(tiny: Callable, tmp_path: Path) -> None:
    model = load(tiny, "e2b")
    path = tmp_path / "c"
    filled(model, 20).save(path)
    data = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    data[begin : begin + 4] = (400).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(ValueError, match="token id 400; expected 0 to 306"):
        gl.KvCache.load(path, model)


def test_a_cache_of_another_model_is_refused_by_name(tiny: Callable, tmp_path: Path) -> None:
    path = tmp_path / "c"
    filled(load(tiny, "31b"), 20).save(path)
    with pytest.raises(ValueError, match="hidden_size is 52; expected 50"):
        gl.KvCache.load(path, load(tiny, "26b"))
    with pytest.raises(ValueError, match="layer 0 has window 12; expected 13"):
        gl.KvCache.load(path, load(tiny, "31b", sliding_window=13))


def test_a_cache_of_other_weights_warns_or_is_refused(tiny: Callable, tmp_path: Path) -> None:
    path = tmp_path / "c"
    model, other = load(tiny, "31b"), load(tiny, "31b", seed=5)
    cache = filled(model, 20, separate_keys=True)
    cache.note("adapter", "poet")
    cache.save(path)
    with pytest.warns(UserWarning, match="other weights"):
        back = gl.KvCache.load(path, other)
    assert same(back, cache)
    assert back.provenance == (CacheNote("adapter", "poet", 20),)
    other.run(random_ids(3), cache=back)
    filled(model, 20).save(path)  # its keys are the other model's weight times the values
    with pytest.raises(ValueError, match="layer 5 holds keys as a weight.*separate_keys=True"):
        gl.KvCache.load(path, other)
