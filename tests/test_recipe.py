"""Recipes: which dtype each weight gets, and how patterns override them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import gemloupe as gl
from gemloupe import recipe, sizes
from gemloupe.checkpoint import expected_text_tensors, open_checkpoint
from gemloupe.variants import VARIANTS as RELEASED


def stored(name: str, dtype: str = "bfloat16") -> dict[str, tuple[str, tuple[int, ...]]]:
    config = RELEASED[name].config.text
    return {key: (dtype, shape) for key, shape in expected_text_tensors(config).items()}


def test_int4_is_the_documented_recipe() -> None:
    found = recipe.targets("int4", stored("E2B"))
    assert found.pop("embed_tokens.weight") == "int6"
    assert found.pop("embed_tokens_per_layer.weight") == "q8_0"
    assert found.pop("per_layer_model_projection.weight") == "int8"
    for name, dtype in found.items():
        narrow = "per_layer_input_gate" in name or "per_layer_projection" in name
        assert dtype == ("int8" if narrow else "int4"), name
    moe = recipe.targets("int4", stored("26B-A4B"))
    assert moe["layers.3.router.proj.weight"] == "int8"
    assert moe["layers.3.experts.gate_up_proj"] == "int4"
    assert "layers.3.router.scale" not in moe and "norm.weight" not in moe


def test_int8_is_8_bits_everywhere() -> None:
    found = recipe.targets("int8", stored("26B-A4B"))
    assert set(found.values()) == {"int8"}
    assert recipe.targets("int8", stored("E2B"))["embed_tokens_per_layer.weight"] == "q8_0"


def test_later_patterns_win_over_earlier_ones_and_the_preset() -> None:
    dtype = {
        "default": "int4",
        "*.mlp.*": "bfloat16",
        "layers.3.mlp.down_proj.weight": "int8",
        "model.language_model.embed_tokens.weight": "auto",
    }
    found = recipe.targets(dtype, stored("E2B"), "model.language_model.")
    assert found["layers.3.mlp.down_proj.weight"] == "int8"
    assert found["layers.4.mlp.down_proj.weight"] == "bfloat16"
    assert found["layers.4.self_attn.q_proj.weight"] == "int4"
    assert found["embed_tokens.weight"] == "bfloat16"


def test_the_table_of_rows_gets_row_major_blocks() -> None:
    for asked, expected in (("int4", "q4_0"), ("int6", "q8_0"), ("bfloat16", "bfloat16")):
        found = recipe.targets({"default": "int4", recipe.TABLE: asked}, stored("E2B"))
        assert found[recipe.TABLE] == expected
    odd = {recipe.TABLE: ("bfloat16", (10, 33))}
    assert recipe.targets("int4", odd)[recipe.TABLE] == "bfloat16"  # No whole blocks of 32.


def test_quantised_tensors_keep_their_values_unless_fewer_bits_are_asked_for() -> None:
    name, shape = "layers.0.mlp.up_proj.weight", (64, 256)
    for dtype, expected in (
        ("q4_0", {"auto": "int4", "int4": "int4", "int8": "int4", "float32": "float32"}),
        ("q8_0", {"auto": "int8", "int8": "int8", "int4": "int4", "bfloat16": "bfloat16"}),
        ("q6_k", {"auto": "int6_k", "int8": "int6_k", "int4": "int4"}),
        ("w4a16", {"auto": "int4", "int4": "int4", "int8": "int4"}),
    ):
        for asked, target in expected.items():
            assert recipe.targets(asked, {name: (dtype, shape)}) == {name: target}, (dtype, asked)


def test_float32_reads_narrower_floats_as_they_are() -> None:
    assert set(recipe.targets("float32", stored("31B")).values()) == {"bfloat16"}
    assert set(recipe.targets("bfloat16", stored("31B", "float32")).values()) == {"bfloat16"}


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("int5", "dtype is 'int5'; expected 'auto', .* Did you mean 'int"),
        (4, "dtype is 4; expected .*mapping of name patterns"),
        ({"default": "int3"}, "dtype is 'int3'"),
        ({"*.down_proj.weight": "q4_0"}, "dtype of '.*down_proj.weight' is 'q4_0'; expected"),
        ({"*.mlp.dwn_proj.weight": "int8"}, "matches no tensor. Did you mean 'layers.*down_proj"),
        ({"*.input_layernorm.weight": "int8"}, "matches only vectors, such as 'layers.0.input"),
    ],
)
def test_unknown_dtypes_and_patterns_are_refused(dtype: object, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        gl.load("demo:edge", dtype=dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("name", ["edge", "moe"])
def test_a_model_holds_what_its_recipe_says(name: str, dtype: str) -> None:
    model = gl.load(f"demo:{name}", dtype=dtype)
    wanted = sizes.weight_targets(model.checkpoint, dtype)
    for tensor, info in model.weights.items():
        if len(info.shape) > 1:
            assert info.dtype == wanted[tensor], tensor
    held = sum(info.nbytes for _, info in model.weights.items() if len(info.shape) > 1)
    assert model.core.copied_bytes == held
    assert model.dtype == dtype and f" {dtype}," in repr(model)


def test_estimate_counts_what_a_model_holds() -> None:
    for dtype in ("auto", "bfloat16", "int8", "int4"):
        checkpoint = open_checkpoint("demo:moe")
        model = gl.load("demo:moe", dtype=dtype)
        vectors = sum(4 * t.shape[0] for t in checkpoint.text_tensors.values() if len(t.shape) == 1)
        held = model.core.copied_bytes + model.core.mapped_bytes + vectors
        part = max(t.nbytes for t in checkpoint.text_tensors.values())
        converts = dtype in ("int8", "int4")
        found = gl.estimate("demo:moe", dtype, context=64)
        assert (found.weights, found.converting) == (held, converts * part)


def test_a_model_that_fits_only_quantised_names_the_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = sizes.resident_bytes(open_checkpoint("demo:moe"), "int8")

    def machine_with(memory: int) -> None:
        monkeypatch.setattr(gl._core, "available_memory", lambda: memory)

    machine_with(needed)
    with pytest.raises(MemoryError, match='Use dtype="int8": it needs'):
        gl.load("demo:moe")
    gl.load("demo:moe", dtype="int8")
    machine_with(needed - 1)
    with pytest.raises(MemoryError, match='the model in int8 needs .* Use dtype="int4"'):
        gl.load("demo:moe", dtype="int8")


def test_weights_are_read_as_float32_without_being_kept(tiny: Callable) -> None:
    folder = tiny("26b", style="released", dtype="bfloat16")[1]
    model = gl.load(folder)
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in ("layers.1.experts.down_proj", "embed_tokens.weight", "layers.0.layer_scalar"):
            full = model.checkpoint.prefix + name
            expected = file.get_tensor(full).float().numpy()
            assert np.array_equal(model.weights[full], expected)
            assert np.array_equal(model.weights[name], expected)
            assert not model.weights[name].flags.writeable
    table = model.weights["embed_tokens.weight"]
    assert np.array_equal(
        model.weights.rows("embed_tokens.weight", [5, 6, 0, -1]), table[[5, 6, 0, -1]]
    )
    assert model.weights.rows("embed_tokens.weight", []).shape == (0, table.shape[1])
    experts = model.weights["layers.1.experts.down_proj"]
    flat = experts.reshape(-1, experts.shape[-1])
    rows = [experts.shape[1] * 2 + 3, experts.shape[1] - 1, experts.shape[1]]
    assert np.array_equal(model.weights.rows("layers.1.experts.down_proj", rows), flat[rows])
    with pytest.raises(KeyError, match="Did you mean 'layers.1.experts.down_proj'"):
        model.weights["layers.1.experts.dwn_proj"]
    with pytest.raises(IndexError, match="row 307 of 307"):
        model.weights.rows("embed_tokens.weight", [307])
    info = dict(model.weights.items())["embed_tokens.weight"]
    assert info == ((307, 50), "bfloat16", 307 * 50 * 2)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_quantised_weights_are_within_half_a_step(dtype: str) -> None:
    exact, model = gl.load("demo:edge").weights, gl.load("demo:edge", dtype=dtype).weights
    for name, info in model.items():
        if len(info.shape) < 2:
            assert np.array_equal(model[name], exact[name])
            continue
        # A scale is at most the group's largest weight over the largest integer; the least-squares
        # scale may clip, by less than one more step.
        levels = {"int8": 127, "q8_0": 127, "int6": 31, "int4": 7}[info.dtype]
        cols = info.shape[-1]
        groups = np.abs(exact[name]).reshape(-1, cols // 32, 32).max(-1) / levels
        error = np.abs(model[name] - exact[name]).reshape(-1, cols // 32, 32).max(-1)
        assert (error <= 1.5 * groups + 1e-8).all(), name
        assert error.max() > 0


def test_a_lattice_survives_value_for_value(tiny: Callable, tmp_path) -> None:
    """A bfloat16 checkpoint of weights d · u, as quantisation-aware training leaves it."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny("26b", style="released", dtype="bfloat16")[1], tmp_path / "qat")
    tensors = load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        if value.ndim < 2 or "language_model" not in name:
            continue
        # Powers of two: bfloat16 holds every product exactly.
        exponents = torch.randint(-8, -3, (*value.shape[:-1], 1))
        integers = torch.randint(-8, 8, value.shape).float()
        tensors[name] = (integers * 2.0**exponents).to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    exact, model = gl.load(folder).weights, gl.load(folder, dtype="int4").weights
    for name, info in model.items():
        assert np.array_equal(model[name], exact[name]), (name, info)


def test_resident_weights_give_the_same_bits() -> None:
    ids = np.arange(40) % 900
    mapped = gl.load("demo:edge").run(ids, logits="all").logits
    model = gl.load("demo:edge", residency="resident")
    assert np.array_equal(model.run(ids, logits="all").logits, mapped)
    # All but the table, of which only rows are read: it stays in its file.
    matrices = {name: info for name, info in model.weights.items() if len(info.shape) > 1}
    table = matrices.pop("embed_tokens_per_layer.weight")
    assert table.dtype == "bfloat16" and model.core.mapped_bytes == 0
    assert model.core.copied_bytes == sum(info.nbytes for info in matrices.values())


def test_float32_activations_differ_from_int8_ones_by_their_rounding() -> None:
    ids = np.arange(40) % 900
    model = gl.load("demo:edge", dtype="int4")
    exact = gl.load("demo:edge", dtype="int4", activations="float32")
    rounded, reference = (m.run(ids, logits="all").logits for m in (model, exact))
    assert not np.array_equal(rounded, reference)
    assert (
        np.abs(rounded - reference).mean()
        < 0.25 * np.abs(reference - gl.load("demo:edge").run(ids, logits="all").logits).mean()
    )


def test_a_wildcard_in_front_reaches_over_the_prefix() -> None:
    tensors = {
        "layers.0.mlp.up_proj.weight": ("bfloat16", (64, 64)),
        "layers.1.mlp.up_proj.weight": ("bfloat16", (64, 64)),
    }
    found = recipe.targets({"*.layers.0.*": "int8"}, tensors, "model.language_model.")
    assert list(found.values()) == ["int8", "bfloat16"]
