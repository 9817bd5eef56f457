"""llama.cpp's mmproj files: soft tokens of the checkpoint that they were made from, or an error."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import gemloupe as gl
import made_adapters
from gemloupe import cli, inspect
from gguf_files import all_of, write_gguf
from mmproj_files import write_mmproj
from tiny_models import MEDIA_IDS, make_tiny, save_tiny, save_tiny_tokenizer

# Clipped linears and a conformer; standardised features; no encoders.
KINDS = ("e2b", "26b", "12b")
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 52, 3), dtype=np.uint8))
SOUND = np.random.default_rng(1).normal(0, 0.1, 9000).astype(np.float32)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder per kind: "hf" and "model.gguf", whose rows are whole blocks of 32 in the towers."""
    folders: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in folders:
            folder = folders[kind] = tmp_path_factory.mktemp(kind)
            vision: dict[str, Any] = {} if kind == "12b" else {"num_key_value_heads": 2}
            if kind != "12b":
                vision |= {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
                vision |= {"num_attention_heads": 2}
            size = {"hidden_size": 64} if kind == "12b" else {}
            model = make_tiny(kind, towers="tiny", media_ids=True, vision=vision, **size)
            save_tiny(model, folder / "hf")
            save_tiny_tokenizer(folder / "hf")
            write_gguf(
                folder / "model.gguf", folder / "hf", all_of(Type.F32), tokenizer=folder / "hf"
            )
        return folders[kind]

    return get


def loaded(folder: Path, mmproj: Path | None) -> gl.Model:
    return gl.load(folder / "model.gguf", dtype="float32", mmproj=mmproj)


def assert_same_tokens(model: gl.Model, reference: gl.Model) -> None:
    """Bit for bit, but for the conformer, whose scales went through softplus and back."""
    if reference.vision is not None:
        expected = np.asarray(reference.encode_image(PICTURE, 70))
        assert np.array_equal(np.asarray(model.encode_image(PICTURE, 70)), expected)
    if reference.config.raw.get("audio_config"):
        expected = np.asarray(reference.encode_audio(SOUND))
        got = np.asarray(model.encode_audio(SOUND))
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
        if not reference.audio_tower.config.has_encoder:
            assert np.array_equal(got, expected)


@pytest.mark.parametrize("wanted", [Type.F32, Type.F16, Type.BF16, Type.Q8_0])
@pytest.mark.parametrize("kind", KINDS)
def test_soft_tokens_are_those_of_the_checkpoint(
    made: Callable, tmp_path: Path, kind: str, wanted: Type
) -> None:
    folder = made(kind)
    sizes = {"mm.a.input_projection.weight": Type.F16}  # Rows of 20 or 28 have no whole blocks.
    types = sizes if wanted is Type.Q8_0 else None
    held = write_mmproj(tmp_path / "towers.gguf", folder / "hf", wanted, types=types)
    shutil.copytree(folder / "hf", tmp_path / "same")
    for file in (tmp_path / "same").glob("*.safetensors"):
        tensors = load_file(file)
        tensors |= {name: torch.from_numpy(held[name].copy()) for name in held if name in tensors}
        save_file(tensors, file)
    reference = gl.load(tmp_path / "same", dtype="float32")
    assert_same_tokens(loaded(folder, tmp_path / "towers.gguf"), reference)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_with_pictures_give_the_logits_of_the_checkpoint(
    made: Callable, tmp_path: Path, kind: str
) -> None:
    folder = made(kind)
    write_mmproj(tmp_path / "towers.gguf", folder / "hf")
    model = loaded(folder, tmp_path / "towers.gguf")
    reference = gl.load(folder / "hf", dtype="float32")
    count = len(reference.encode_image(PICTURE, 70))
    ids = [2, 70, MEDIA_IDS["boi_token_id"], *[MEDIA_IDS["image_token_id"]] * count]
    ids += [MEDIA_IDS["eoi_token_id"], 80, 90]
    runs = [m.run(ids, images=[PICTURE], max_soft_tokens=70) for m in (model, reference)]
    np.testing.assert_allclose(runs[0].logits, runs[1].logits, rtol=0, atol=1e-5)
    assert model.config.image_token_id == MEDIA_IDS["image_token_id"]


@pytest.mark.parametrize("wanted", [Type.F32, Type.F16])
def test_adapters_read_the_weights_of_the_checkpoint(
    made: Callable, tmp_path: Path, wanted: Type
) -> None:
    folder = made("e2b")
    held = write_mmproj(tmp_path / "towers.gguf", folder / "hf", wanted)
    base = loaded(folder, tmp_path / "towers.gguf").adapters.base
    for name in ("patch_embedder.input_proj.weight", "encoder.layers.1.mlp.up_proj.linear.weight"):
        expected = held[f"model.vision_tower.{name}"]
        rows = base.rows(f"vision_tower.{name}", range(3, 9))
        assert np.array_equal(rows, expected[3:9])


def beside(made: Callable, tmp_path: Path, *names: str) -> Path:
    """A folder with a model and these copies of its towers' file."""
    folder = made("e2b")
    shutil.copy(folder / "model.gguf", tmp_path / "model.gguf")
    for name in names:
        write_mmproj(tmp_path / name, folder / "hf")
    return tmp_path


def test_the_only_file_beside_a_model_is_found_and_named(made: Callable, tmp_path: Path) -> None:
    folder = beside(made, tmp_path, "mmproj-tiny-F32.gguf")
    model = gl.load(folder / "model.gguf", dtype="float32")
    assert_same_tokens(model, gl.load(made("e2b") / "hf", dtype="float32"))
    assert "with mmproj-tiny-F32.gguf" in repr(model)
    text = str(model.explain())
    assert "towers of          mmproj-tiny-F32.gguf" in text
    assert "vision encoder" in text
    assert "audio projection" in text
    without = gl.load(folder / "model.gguf", dtype="float32", mmproj=None)
    assert "mmproj" not in repr(without)
    with pytest.raises(ValueError, match=r"no vision part.*mmproj-tiny-F32.gguf' beside it"):
        without.encode_image(PICTURE)


def test_of_several_files_none_is_guessed(made: Callable, tmp_path: Path) -> None:
    folder = beside(made, tmp_path, "mmproj-BF16.gguf", "mmproj-F16.gguf")
    model = gl.load(folder / "model.gguf")
    with pytest.raises(ValueError, match=r"no audio part.*pass mmproj=.*'mmproj-BF16.gguf'"):
        model.encode_audio(SOUND)


def test_a_file_that_is_found_and_does_not_fit_is_left_out(made: Callable, tmp_path: Path) -> None:
    folder = beside(made, tmp_path)
    write_mmproj(tmp_path / "mmproj-other.gguf", made("26b") / "hf")
    with pytest.warns(UserWarning, match=r"mmproj-other.gguf lies beside.*projection_dim is 50"):
        model = gl.load(folder / "model.gguf")
    assert model.checkpoint.mmproj is None


def test_the_command_line_takes_the_file(
    made: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = made("26b")
    path = tmp_path / "towers.gguf"
    write_mmproj(path, folder / "hf")
    assert cli.main(["inspect", str(folder / "model.gguf"), "--mmproj", str(path)]) == 0
    assert "towers.gguf" in capsys.readouterr().out
    assert cli.main(["inspect", str(folder / "model.gguf"), "--mmproj", "none"]) == 0
    assert "vision encoder" not in capsys.readouterr().out
    for command in ("generate", "chat", "serve", "transcribe"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        assert "--mmproj FILE" in capsys.readouterr().out


MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": (
        {"metadata": {"general.architecture": "llava"}},
        "general.architecture is 'llava'; expected 'clip'",
    ),
    "another projector": (
        {"metadata": {"clip.vision.projector_type": "gemma3"}},
        "clip.vision.projector_type is 'gemma3'; expected 'gemma4v' or 'gemma4uv'",
    ),
    "projectors of two models": (
        {"metadata": {"clip.audio.projector_type": "gemma4ua"}},
        "the projectors are 'gemma4v' and 'gemma4ua'; expected both of one model",
    ),
    "no towers": (
        {"metadata": {"clip.has_vision_encoder": False, "clip.has_audio_encoder": False}},
        "clip.has_vision_encoder is False; expected true, or clip.has_audio_encoder",
    ),
    "another width": (
        {"metadata": {"clip.audio.projection_dim": 45}},
        "clip.audio.projection_dim is 45; expected 44, the width of model.gguf",
    ),
    "no size": (
        {"metadata": {"clip.vision.patch_size": None}},
        "clip.vision.patch_size is missing; expected an integer from 1 to 1024",
    ),
    "a flag of another type": (
        {"metadata": {"clip.has_vision_encoder": 1}},
        "clip.has_vision_encoder is 1; expected true or false",
    ),
    "heads that do not divide": (
        {"metadata": {"clip.vision.attention.head_count": 3}},
        "clip.vision.attention.head_count is 3; expected a divisor of the 64 rows",
    ),
    "another eps": (
        {"metadata": {"clip.audio.attention.layer_norm_epsilon": 0.01}},
        "clip.audio.attention.layer_norm_epsilon is 0.0",
    ),
    "a missing tensor": (
        {"tensors": {"v.blk.1.ffn_up.weight": None}},
        "v.blk.1.ffn_up.weight is missing; expected [96, 64]",
    ),
    "a missing bound": (
        {"tensors": {"a.blk.0.conv_pw1.input_max": None}},
        "a.blk.0.conv_pw1.input_max is missing; expected [1]",
    ),
    "no position table": (
        {"tensors": {"v.position_embd.weight": None}},
        "the tensor v.position_embd.weight is missing; expected 3 axes",
    ),
    "an unknown tensor": (
        {"tensors": {"v.blk.0.attn_qq.weight": np.zeros((2, 2), np.float32)}},
        "'v.blk.0.attn_qq.weight' is no tensor of these towers. Did you mean",
    ),
    "another shape": (
        {"tensors": {"v.blk.0.ln1.weight": np.ones(63, np.float32)}},
        "v.blk.0.ln1.weight: shape is [63]; expected [64]",
    ),
    "a quantised table": (
        {"types": {"v.position_embd.weight": Type.Q8_0}},
        "v.position_embd.weight: type is q8_0; expected 'float32', 'float16' or 'bfloat16'",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_is_listed(made: Callable, tmp_path: Path, case: str) -> None:
    arguments, expected = MISFITS[case]
    path = tmp_path / "towers.gguf"
    write_mmproj(path, made("e2b") / "hf", **arguments)
    with pytest.raises(ValueError) as error:
        loaded(made("e2b"), path)
    assert expected in str(error.value)
    assert str(path) in str(error.value)


def test_scales_that_no_softplus_gave_are_refused(made: Callable, tmp_path: Path) -> None:
    path = tmp_path / "towers.gguf"
    bad = {"a.blk.0.per_dim_scale.weight": np.array([1, 1, -1, 1, 1, 1, 1, 1], np.float32)}
    write_mmproj(path, made("e2b") / "hf", tensors=bad)
    model = loaded(made("e2b"), path)
    with pytest.raises(ValueError, match=r"per_dim_scale holds -1.0; expected positive numbers"):
        model.encode_audio(SOUND)


def test_the_towers_of_another_kind_of_model_are_refused(made: Callable, tmp_path: Path) -> None:
    # An encoder-free projector of the right width beside a model with per-layer inputs.
    narrow = make_tiny("12b", towers="tiny", hidden_size=44)
    save_tiny(narrow, tmp_path / "hf")
    write_mmproj(tmp_path / "towers.gguf", tmp_path / "hf")
    with pytest.raises(ValueError, match=r"mmproj of Gemma 4 12B.*is another model"):
        loaded(made("e2b"), tmp_path / "towers.gguf")


def test_damaged_files_are_refused(made: Callable, tmp_path: Path) -> None:
    path = tmp_path / "towers.gguf"
    write_mmproj(path, made("e2b") / "hf")
    whole = path.read_bytes()
    for size in (0, 3, 20, 400, len(whole) // 20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="towers.gguf"):
            loaded(made("e2b"), path)
    with pytest.raises(FileNotFoundError, match=r"nothing.gguf: no such file; expected an mmproj"):
        loaded(made("e2b"), tmp_path / "nothing.gguf")


def test_a_folder_takes_no_file_of_towers(made: Callable, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder, which holds its own towers"):
        gl.load(made("e2b") / "hf", mmproj="mmproj-F16.gguf")
    with pytest.raises(ValueError, match="give this one as mmproj="):
        write_mmproj(tmp_path / "towers.gguf", made("e2b") / "hf")
        gl.load(tmp_path / "towers.gguf")


def test_reports_count_the_towers_of_the_file(made: Callable, tmp_path: Path) -> None:
    path = tmp_path / "towers.gguf"
    for kind in KINDS:
        write_mmproj(path, made(kind) / "hf")
        report = inspect.describe(made(kind) / "model.gguf", path)
        assert report.parameters == inspect.describe(made(kind) / "hf").parameters


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_towers_fit_the_towers_of_a_file(
    made: Callable, tmp_path: Path, kind: str
) -> None:
    folder = made(kind)
    write_mmproj(folder / "towers.gguf", folder / "hf")
    reference = gl.load(folder / "hf", dtype="float32")
    peft = made_adapters.make(
        AutoModelForImageTextToText.from_pretrained(folder / "hf"),
        r=2,
        use_dora=True,
        target_modules=r".*(vision|audio|embed).*(q_proj\.linear|\.input_proj|patch_dense|g_projection)",
    )
    adapter = made_adapters.save(peft, tmp_path / "adapter")
    model = loaded(folder, folder / "towers.gguf")
    plain = np.asarray(model.encode_image(PICTURE, 70))
    ours, theirs = model.load_adapter(adapter), reference.load_adapter(adapter)
    model.set_adapter(ours)
    reference.set_adapter(theirs)
    assert_same_tokens(model, reference)
    assert not np.allclose(model.encode_image(PICTURE, 70), plain, atol=1e-3)
    norms = [[one.base_norm for one in a.report().changes] for a in (ours, theirs)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6) and len(norms[0]) > 1
