"""Checkpoint folders: what is found in them, and what is refused."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gemloupe import checkpoint, hub
from gemloupe.checkpoint import open_checkpoint
from gemloupe.safetensors_header import read_header
from snapshot_texts import assert_is_snapshot
from tiny_models import VARIANTS, text_model


@pytest.fixture
def folder(tiny: Callable, tmp_path: Path) -> Path:
    """A copy of a small released-style checkpoint, to be damaged."""
    return shutil.copytree(tiny("e2b", style="released")[1], tmp_path / "model")


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refusal(folder: Path, error: type[Exception] = ValueError) -> str:
    with pytest.raises(error) as caught:
        open_checkpoint(folder)
    return str(caught.value)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("style", ["transformers", "released"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_of_the_text_decoder_is_found(
    tiny: Callable, variant: str, style: str, shards: int
) -> None:
    model, path = tiny(variant, style=style, shards=shards, towers="tiny", dtype="bfloat16")
    opened = open_checkpoint(path)
    state = text_model(model).state_dict()
    assert {name: t.shape for name, t in opened.text_tensors.items()} == {
        name: tuple(value.shape) for name, value in state.items()
    }
    for name, tensor in opened.text_tensors.items():
        assert tensor.dtype == "bfloat16"
        stored = np.fromfile(
            opened.files[tensor.file], np.uint16, state[name].numel(), offset=tensor.begin
        )
        expected = state[name].to(torch.bfloat16).view(torch.uint16).numpy()
        assert np.array_equal(stored, expected.ravel())
    assert len(opened.files) == shards


def test_towers_stay_unread_and_keys_of_sharing_layers_are_ignored(tiny: Callable) -> None:
    path = tiny("e2b", style="released", towers="tiny")[1]
    opened = open_checkpoint(path)
    assert set(opened.towers) == {"vision_tower", "audio_tower", "embed_vision", "embed_audio"}
    assert len(opened.ignored) == 15
    assert all(".self_attn." in name for name in opened.ignored)
    count = len(opened.text_tensors) + len(opened.ignored)
    assert count + sum(map(len, opened.towers.values())) == len(opened.tensors)


@pytest.mark.parametrize("prefix", ["model.language_model.", "model.", "language_model.model.", ""])
def test_the_prefix_of_the_names_does_not_matter(folder: Path, prefix: str) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[prefix + name.removeprefix("model.language_model.")] = tensors.pop(name)

    before = open_checkpoint(folder)
    rewrite(folder, rename)
    after = open_checkpoint(folder)
    assert (before.prefix, after.prefix) == ("model.language_model.", prefix)
    assert after.text_tensors.keys() == before.text_tensors.keys()


def test_types_may_be_mixed_and_the_commonest_is_the_dtype(folder: Path) -> None:
    def mix(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].to(torch.float16 if "norm" in name else torch.bfloat16)

    rewrite(folder, mix)
    opened = open_checkpoint(folder)
    assert opened.dtype == "bfloat16"
    assert opened.text_tensors["norm.weight"].dtype == "float16"


def test_a_stored_head_equal_to_the_embedding_is_ignored(folder: Path) -> None:
    def add_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"].clone()

    rewrite(folder, add_head)
    assert "lm_head.weight" in open_checkpoint(folder).ignored


def test_generation_config_is_read_and_may_be_absent(folder: Path) -> None:
    values = {"eos_token_id": [1, 106, 50], "temperature": 1.0, "top_k": None}
    (folder / "generation_config.json").write_text(json.dumps(values))
    assert open_checkpoint(folder).generation_config == values
    (folder / "generation_config.json").unlink()
    assert open_checkpoint(folder).generation_config == {}


def test_a_path_object_a_string_and_a_home_path_are_folders(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.chdir(folder.parent)
    for source in (folder, str(folder), "~/model", "model", "./model"):
        assert checkpoint.resolve(source).resolve() == folder.resolve()


def test_a_hub_id_is_downloaded_config_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def snapshot_download(repo_id: str, allow_patterns: list[str]) -> str:
        calls.append((repo_id, allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert open_checkpoint("someone/some-model").source == "someone/some-model"
    assert calls[0] == ("someone/some-model", ["config.json"])
    assert "*.safetensors" in calls[1][1]
    assert not any(pattern.endswith((".bin", ".py")) for pattern in calls[1][1])


def test_a_folder_does_not_hide_a_released_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "google" / "gemma-4-E4B-it").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    assert checkpoint.resolve("google/gemma-4-E2B-it") == tmp_path


def test_a_model_of_another_family_is_refused_before_its_weights_are_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gemma3"}')
    calls = []

    def snapshot_download(repo_id: str, allow_patterns: list[str]) -> str:
        calls.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(ValueError, match="Gemma 3 checkpoint"):
        open_checkpoint("google/gemma-3-4b-it")
    assert calls == [["config.json"]]


@pytest.mark.parametrize(
    ("text", "is_id"),
    [
        ("google/gemma-4-E2B-it", True),
        ("a/b.c_d-e", True),
        ("gemma-4", False),
        ("a/b/c", False),
        ("../model", False),
        ("/abs", False),
        ("a b/c", False),
        ("a/b\n", False),
    ],
)
def test_hub_ids_are_told_from_paths(text: str, is_id: bool) -> None:
    assert hub.is_id(text) == is_id


# --- tensors that do not match the config


def test_wrong_tensors_are_listed_with_file_name_expected_and_got(folder: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        p = "model.language_model."
        del tensors[p + "norm.weight"]
        tensors[p + "layers.0.mlp.up_proj.weight"] = torch.zeros(5, 44)
        tensors[p + "layers.0.layer_scalar"] = torch.zeros((), dtype=torch.float32)
        tensors[p + "layers.1.mlp.up_proj.weight"] = torch.zeros(53, 44, dtype=torch.int8)
        tensors[p + "layers.1.mlp.upproj.weight"] = torch.zeros(2)
        tensors["somewhere.else"] = torch.zeros(2)

    rewrite(folder, damage)
    assert_is_snapshot("checkpoint", "wrong tensors", refusal(folder), folder=folder)


def test_long_lists_of_wrong_tensors_are_cut(folder: Path) -> None:
    layers = open_checkpoint(folder).config.text.num_hidden_layers
    rewrite(folder, lambda tensors: [tensors.pop(n) for n in list(tensors) if ".mlp." in n])
    message = refusal(folder)
    assert message.count("is missing") == 10
    assert f"… and {3 * layers - 10} more" in message


def test_a_config_of_another_size_is_seen_in_the_shapes(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    raw["text_config"]["intermediate_size"] += 1
    (folder / "config.json").write_text(json.dumps(raw))
    assert "mlp.gate_proj.weight: shape is [53, 44]; expected [54, 44]" in refusal(folder)


def test_a_head_of_its_own_is_refused(folder: Path) -> None:
    def add_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"] + 1

    rewrite(folder, add_head)
    assert_is_snapshot("checkpoint", "an untied head", refusal(folder), folder=folder)


def test_a_folder_without_a_text_model_is_refused(folder: Path) -> None:
    rewrite(folder, lambda t: [t.pop(n) for n in list(t) if n.endswith("embed_tokens.weight")])
    assert_is_snapshot("checkpoint", "no text model", refusal(folder), folder=folder)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": "hot"},
        {"top_k": 1.5},
        {"top_k": True},
        {"eos_token_id": "</s>"},
        {"eos_token_id": [1, -1]},
        {"eos_token_id": [1, True]},
        {"suppress_tokens": 3},
        {"do_sample": 1},
    ],
    ids=str,
)
def test_a_bad_generation_config_names_the_field(folder: Path, values: dict[str, Any]) -> None:
    (folder / "generation_config.json").write_text(json.dumps(values))
    message = refusal(folder)
    assert message.startswith(f"{folder}/generation_config.json: {next(iter(values))} is ")


# --- damaged files


def header_of(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def write_file(path: Path, header: bytes, data: bytes, length: int | None = None) -> Path:
    length = len(header) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + header + data)
    return path


def two_tensors(**second: Any) -> bytes:
    first = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    second = {"dtype": "BF16", "shape": [2, 1], "data_offsets": [8, 12], **second}
    return json.dumps({"a": first, "b": second}).encode()


DAMAGED: dict[str, tuple[bytes, bytes, int | None]] = {
    "shorter than a length": (b"", b"", None),
    "header cut off": (two_tensors(), b"", 5000),
    "absurd header length": (two_tensors(), bytes(12), 1 << 60),
    "empty header": (b"", bytes(12), None),
    "header that is no object": (b"[]", bytes(12), None),
    "header that is not JSON": (b"{oops", bytes(12), None),
    "a tensor twice": (
        two_tensors().replace(b'"b"', b'"a"'),
        bytes(12),
        None,
    ),
    "data cut off": (two_tensors(), bytes(11), None),
    "data too long": (two_tensors(), bytes(13), None),
    "overlap": (two_tensors(data_offsets=[4, 8]), bytes(12), None),
    "hole": (two_tensors(data_offsets=[12, 16]), bytes(16), None),
    "offsets that run backwards": (two_tensors(data_offsets=[12, 8]), bytes(12), None),
    "negative offset": (two_tensors(data_offsets=[-4, 0]), bytes(12), None),
    "three offsets": (two_tensors(data_offsets=[8, 10, 12]), bytes(12), None),
    "wrong length": (two_tensors(shape=[3]), bytes(12), None),
    "negative size": (two_tensors(shape=[-2, -1]), bytes(12), None),
    "fractional size": (two_tensors(shape=[2.0]), bytes(12), None),
    "boolean size": (two_tensors(shape=[True, 2]), bytes(12), None),
    "sizes that overflow": (two_tensors(shape=[2**62, 2**62, 4]), bytes(12), None),
    "too many dimensions": (two_tensors(shape=[1] * 40), bytes(12), None),
    "unknown type": (two_tensors(dtype="F31"), bytes(12), None),
    "type that is no string": (two_tensors(dtype=["F32"]), bytes(12), None),
    "metadata that is no text": (b'{"__metadata__": {"a": 1}}', b"", None),
    "an entry that is no object": (b'{"a": 3}', b"", None),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_headers_are_refused(case: str, tmp_path: Path) -> None:
    header, data, length = DAMAGED[case]
    path = tmp_path / "model.safetensors"
    write_file(path, header, data, length)
    if case == "shorter than a length":
        path.write_bytes(b"\0\0\0")
    with pytest.raises(ValueError, match="model.safetensors") as error:
        read_header(path)
    assert_is_snapshot("headers", case, str(error.value), folder=tmp_path)


def test_a_whole_header_is_read_in_file_order(tmp_path: Path) -> None:
    header = two_tensors() + b"   "
    tensors = read_header(write_file(tmp_path / "f", header, bytes(12)))
    assert [(t.name, t.dtype, t.shape, t.elements) for t in tensors] == [
        ("a", "F32", (2,), 2),
        ("b", "BF16", (2, 1), 2),
    ]
    start = 8 + len(header)
    assert [(t.begin, t.end) for t in tensors] == [(start, start + 8), (start + 8, start + 12)]


def test_changed_header_bytes_give_value_errors_only(tmp_path: Path, folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    generator = random.Random(3)
    path = tmp_path / "changed.safetensors"
    refused = 0
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(generator.randint(1, 3)):
            data[generator.randrange(end)] = generator.choice(b'0129-."{}[],:\x00\xff e')
        path.write_bytes(data)
        try:
            read_header(path)
        except ValueError:
            refused += 1
    assert refused > 100


# --- shards


@pytest.fixture
def sharded(tiny: Callable, tmp_path: Path) -> Path:
    return shutil.copytree(tiny("31b", style="released", shards=3)[1], tmp_path / "sharded")


def change_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


FIRST = "model.language_model.embed_tokens.weight"


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", "a.bin", 7, ""]
)
def test_an_index_that_leaves_the_folder_is_refused(sharded: Path, name: object) -> None:
    change_index(sharded, lambda weight_map: weight_map.update({FIRST: name}))
    assert "expected the name of a .safetensors file in this folder" in refusal(sharded)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    message = refusal(sharded, FileNotFoundError)
    assert_is_snapshot("checkpoint", "a missing shard", message, folder=sharded)


def test_an_index_that_contradicts_the_files_is_refused(sharded: Path) -> None:
    other = "model-00003-of-00003.safetensors"
    change_index(sharded, lambda weight_map: weight_map.update({FIRST: other}))
    message = refusal(sharded)
    assert_is_snapshot("checkpoint", "a tensor in another shard", message, folder=sharded)


def test_a_tensor_that_only_the_index_has_is_refused(sharded: Path) -> None:
    other = "model-00003-of-00003.safetensors"
    change_index(sharded, lambda weight_map: weight_map.update({"ghost": other}))
    message = refusal(sharded)
    assert_is_snapshot("checkpoint", "a tensor that is not there", message, folder=sharded)


def test_an_index_without_a_weight_map_is_refused(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text('{"weight_map": []}')
    assert "weight_map is []" in refusal(sharded)


def test_a_header_of_very_many_tensors_is_refused(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"tensor {i}": entry for i in range(100_001)}).encode()
    with pytest.raises(ValueError, match="lists 100001 tensors; expected at most 100000"):
        read_header(write_file(tmp_path / "f", header, b""))
