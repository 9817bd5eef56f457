"""Folders with a quantization_config: W4A16 value for value, other methods refused by name."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import gemloupe as gl
from gemloupe.checkpoint import open_checkpoint

CONFIG: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "global_compression_ratio": None,
    "kv_cache_scheme": None,
    "ignore": ["lm_head", "re:.*vision_tower.*", "re:.*router.*"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "input_activations": None,
            "output_activations": None,
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": 32,
                "actorder": None,
                "dynamic": False,
                "observer": "minmax",
            },
        }
    },
}
IDS = np.arange(45) % 900
QUANTISED = re.compile(r"(self_attn|mlp)\.\w+_proj\.weight|per_layer_(input_gate|projection)\.w")


def pack(integers: torch.Tensor) -> torch.Tensor:
    """Eight integers in [-8, 7] an int32, each plus 8, from the lowest bits up."""
    unsigned = (integers.to(torch.int64) + 8).reshape(integers.shape[0], -1, 8)
    words = sum(unsigned[..., i] << (4 * i) for i in range(8))
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def quantise(
    folder: Path, scale_of: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, np.ndarray]:
    """Quantises a checkpoint's linear layers in place; returns name -> float32 values."""
    tensors = load_file(folder / "model.safetensors")
    values = {}
    for name in [name for name in tensors if QUANTISED.search(name)]:
        weight = tensors.pop(name).float()
        groups = weight.reshape(weight.shape[0], -1, 32)
        scale = scale_of(groups.abs().amax(-1)).to(torch.bfloat16)
        wide = scale.float()[..., None]
        integers = (groups / wide).round().clamp(-8, 7)
        stem = name.removesuffix(".weight")
        tensors[f"{stem}.weight_packed"] = pack(integers.reshape(weight.shape))
        tensors[f"{stem}.weight_scale"] = scale
        tensors[f"{stem}.weight_shape"] = torch.tensor(weight.shape)
        values[name] = (integers * wide).reshape(weight.shape).numpy()
    save_file(tensors, folder / "model.safetensors")
    write_config(folder, CONFIG)
    return values


def write_config(folder: Path, quantization: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(gl.load("demo:edge").checkpoint.folder, tmp_path / "w4a16")


def check_values(model: Any, expected: dict[str, np.ndarray], dtype: str) -> None:
    assert expected
    for name, values in expected.items():
        assert np.array_equal(model.weights[name], values), name
        assert model.weights.info(name).dtype == dtype


def test_w4a16_loads_value_for_value(folder: Path) -> None:
    expected = quantise(folder, lambda peak: peak / 7)
    model = gl.load(folder)
    check_values(model, expected, "int4")
    assert "layers.*.mlp.up_proj.weight" in str(model.explain()) and "w4a16" in str(model.explain())
    embedding = "embed_tokens.weight"  # Left alone by the quantisation, and so here.
    assert model.weights.info(embedding).dtype == "bfloat16"
    assert np.array_equal(model.weights[embedding], gl.load("demo:edge").weights[embedding])
    check_values(gl.load(folder, dtype="float32"), expected, "float32")
    # The int4 recipe quantises the rest, and keeps what has 4 bits already.
    small = gl.load(folder, dtype="int4")
    check_values(small, expected, "int4")
    assert small.weights.info(embedding).dtype == "int6"


def test_w4a16_gives_the_logits_of_its_values(folder: Path, tmp_path: Path) -> None:
    expected = quantise(folder, lambda peak: peak / 7)
    tensors = load_file(gl.load("demo:edge").checkpoint.files[0])
    for name, values in expected.items():
        tensors[name] = torch.from_numpy(values)
    same = shutil.copytree(gl.load("demo:edge").checkpoint.folder, tmp_path / "float32")
    save_file({k: v.float() for k, v in tensors.items()}, same / "model.safetensors")
    exact = gl.load(same, embed_scale="bfloat16", kv_dtype="float32")
    for arguments in ({"activations": "float32"}, {"dtype": "float32"}):
        model = gl.load(folder, kv_dtype="float32", embed_scale="bfloat16", **arguments)
        found, wanted = (m.run(IDS, logits="all").logits for m in (model, exact))
        assert np.abs(found - wanted).max() <= 2e-4 * np.abs(wanted).max()


def test_scales_that_float16_can_not_hold_give_float32(folder: Path) -> None:
    tiny = 2.0**-30  # bfloat16 has eight bits of exponent, float16 five.
    expected = quantise(folder, lambda peak: peak / 7 * tiny)
    model = gl.load(folder)
    check_values(model, expected, "float32")


def test_packed_folders_keep_the_values_of_w4a16(folder: Path, tmp_path: Path) -> None:
    expected = quantise(folder, lambda peak: peak / 7)
    made = gl.convert(folder, tmp_path / "packed", "auto")
    model = gl.load(made)
    check_values(model, expected, "int4")
    assert model.core.copied_bytes == 0
    assert "quantization_config" not in json.loads((made / "config.json").read_text())
    first, second = (gl.load(f).run(IDS, logits="all").logits for f in (folder, made))
    assert np.array_equal(first, second)


def test_scales_may_be_in_another_shard(folder: Path) -> None:
    expected = quantise(folder, lambda peak: peak / 7)
    tensors = load_file(folder / "model.safetensors")
    shards = {
        "model-00001-of-00002.safetensors": lambda name: not name.endswith("_scale"),
        "model-00002-of-00002.safetensors": lambda name: name.endswith("_scale"),
    }
    weight_map = {}
    for shard, belongs in shards.items():
        save_file({k: v for k, v in tensors.items() if belongs(k)}, folder / shard)
        weight_map |= {name: shard for name in tensors if belongs(name)}
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    check_values(gl.load(folder), expected, "int4")


def test_sizes_count_integers_and_scales(folder: Path) -> None:
    quantise(folder, lambda peak: peak / 7)
    checkpoint = open_checkpoint(folder)
    tensor = checkpoint.text_tensors["layers.0.mlp.up_proj.weight"]
    rows, cols = tensor.shape
    assert tensor.nbytes == rows * cols // 2 + rows * cols // 32 * 2
    model = gl.load(folder)
    vectors = sum(4 * t.shape[0] for t in checkpoint.text_tensors.values() if len(t.shape) == 1)
    held = model.core.copied_bytes + model.core.mapped_bytes + vectors
    part = max(t.nbytes for t in checkpoint.text_tensors.values() if t.pair)
    found = gl.estimate(folder, context=64)
    assert (found.weights, found.converting) == (held, part)


def group(**weights: Any) -> dict[str, Any]:
    groups = json.loads(json.dumps(CONFIG["config_groups"]))
    groups["group_0"]["weights"] |= weights
    return {**CONFIG, "config_groups": groups}


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantised with bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "quantised with GPTQ"),
        ({"quant_method": "awq", "bits": 4}, "quantised with AWQ"),
        ({"quant_method": "torchao", "quant_type": {}}, "quantised with torchao"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "ModelOpt .NVFP4, FP8."),
        ({"quant_method": "fp8"}, "quantised with FP8"),
        ({"quant_method": "mystery"}, "quantised with 'mystery'"),
        ({"bits": 4}, "an unnamed method"),
        ("4 bits", "is '4 bits'; expected an object"),
        ({**CONFIG, "format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized'"),
        ({**CONFIG, "format": "float-quantized"}, "format 'float-quantized'"),
        ({**CONFIG, "format": "int-quantized"}, "format 'int-quantized'"),
        ({**CONFIG, "config_groups": {}}, "has config_groups {}"),
        ({**CONFIG, "quantization_status": "frozen"}, "quantization_status 'frozen'"),
        ({**CONFIG, "sparsity_config": {"format": "sparse-24-bitmask"}}, "a sparsity_config"),
        ({**CONFIG, "transform_config": {"config_groups": {"u": {}}}}, "a transform_config"),
        (group(num_bits=8), "weights.num_bits 8; expected 4"),
        (group(group_size=128), "weights.group_size 128; expected 32"),
        (group(symmetric=False), "weights.symmetric False; expected True"),
        (group(strategy="channel"), "weights.strategy 'channel'; expected 'group'"),
        (group(type="float"), "weights.type 'float'; expected 'int'"),
        (
            {**CONFIG, "config_groups": {"g": {**CONFIG["config_groups"]["group_0"],
             "input_activations": {"num_bits": 8}}}},
            "config_groups.g quantises activations; expected weights alone",
        ),
    ],
)  # fmt: skip
def test_other_methods_are_refused_with_advice(
    folder: Path, quantization: Any, expected: str
) -> None:
    write_config(folder, quantization)
    with pytest.raises(ValueError, match=expected) as caught:
        gl.load(folder)
    text = str(caught.value)
    assert text.startswith(f"{folder}/config.json: quantization_config")
    assert "Load the checkpoint that this one was made from" in text and "GGUF" in text


def change(**tensors: torch.Tensor | None) -> Callable[[dict[str, torch.Tensor]], None]:
    """Replaces companions of layer 0's up_proj; None removes one."""

    def apply(stored: dict[str, torch.Tensor]) -> None:
        stem = "model.language_model.layers.0.mlp.up_proj."
        for name, value in tensors.items():
            if value is None:
                del stored[stem + name]
            else:
                stored[stem + name] = value

    return apply


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (change(weight_scale=None), "up_proj.weight_scale' is missing; expected .96, 3."),
        (change(weight_packed=None), "up_proj.weight is missing|is no tensor of this model"),
        (change(weight_scale=torch.zeros(96, 2)), "is F32 .96, 2.; expected BF16, F16 or F32"),
        (change(weight_scale=torch.zeros(96, 3, dtype=torch.int32)), "is I32 .96, 3."),
        (change(weight_packed=torch.zeros(96, 12)), "is F32 .96, 12.; expected I32"),
        (change(weight_packed=torch.zeros(96, 11, dtype=torch.int32)), "a multiple of 32"),
        (change(weight_shape=torch.tensor([96, 95])), r"holds \(96, 95\); expected \(96, 96\)"),
        (change(weight_shape=torch.tensor([96.0, 96.0])), "is F32 .2.; expected I64"),
        (change(weight_zero_point=torch.zeros(24, 3, dtype=torch.int32)), "symmetric weights"),
        (change(weight_g_idx=torch.zeros(96, dtype=torch.int32)), "in their own order"),
        (change(weight=torch.zeros(96, 96)), "stands beside .*up_proj.weight'; expected one"),
    ],
)
def test_companions_that_do_not_fit_are_refused(
    folder: Path, damage: Callable[[dict[str, torch.Tensor]], None], expected: str
) -> None:
    quantise(folder, lambda peak: peak / 7)
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=expected) as caught:
        gl.load(folder)
    assert str(folder) in str(caught.value)
