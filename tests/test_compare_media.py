"""Comparison of prompts with images, sounds and videos: towers are walked first, then the text."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gemloupe as gl
from adapter_files import write_adapter
from tiny_models import save_tiny, save_tiny_tokenizer

EXPLAINED = {"equal", "noise", "near tie"}
VISION = {"position_embedding_size": 192}
IMAGE, SOUND = "see <|image|> now", "hear <|audio|> now"


@pytest.fixture(scope="module")
def pair(tiny: Callable) -> Callable:
    def get(variant: str) -> tuple[Any, gl.Model]:
        vision = {"mm_posemb_size": 64} if variant == "12b" else VISION
        reference, folder = tiny(variant, towers="tiny", media_ids=True, vision=vision)
        save_tiny_tokenizer(folder)
        return reference, gl.load(folder, dtype="float32")

    return get


def _picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (2, 60, 3), np.uint8)


def _sound(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, 1300).astype(np.float32)


def _damaged(reference: Any, tmp_path: Path, tensor: str) -> gl.Model:
    other = copy.deepcopy(reference)
    other.file_dtype = "float32"
    with torch.no_grad():
        dict(other.named_parameters())[tensor].data[1] += 0.1
    save_tiny_tokenizer(save_tiny(other, tmp_path))
    return gl.load(tmp_path, dtype="float32")


@pytest.mark.parametrize("variant", ("e2b", "26b", "12b"))
def test_equal_models_do_not_diverge_on_media(pair: Callable, variant: str) -> None:
    reference, model = pair(variant)
    clip = gl.video(np.stack([_picture(i) for i in range(4)]), num_frames=1)
    text, media = "a <|image|> b <|video|> c", {"images": _picture(), "videos": clip}
    if variant != "26b":  # It has no ears.
        text, media = text + SOUND, {**media, "audio": _sound()}
    prompts = [model.prepare(text, **media, max_soft_tokens=70), model.prepare("only words")]
    report = gl.compare(model, reference, prompts)
    assert report.first_divergence is None
    assert {point.verdict for point in report.points} <= EXPLAINED
    compared = [point.name for point in report.points]
    expected = [n for n in gl.hook_points(model) if n in compared or n in report.not_compared]
    assert expected == list(gl.hook_points(model))
    assert not [name for name in report.not_compared if not name.startswith(("vision.", "audio."))]
    towers = [name for name in compared if name.startswith(("vision.", "audio."))]
    assert towers == compared[: len(towers)] and "vision.soft_tokens" in towers
    if variant == "e2b":
        assert len(towers) > 50 and "audio.layers.0.conv.out" in towers
        assert "vision layer 0" in str(report.table()) and "audio layer 0" in str(report.table())
    assert report.kl.max() < 1e-8 and len(report.kl) == sum(map(len, prompts))
    report.plot()


@pytest.mark.parametrize(
    ("tensor", "text", "first"),
    [
        ("model.vision_tower.encoder.layers.0.mlp.up_proj.linear.weight", IMAGE,
         "vision.layers.0.mlp.up"),
        ("model.audio_tower.layers.0.lconv1d.linear_end.linear.weight", SOUND,
         "audio.layers.0.conv.out"),
        ("model.embed_audio.embedding_projection.weight", SOUND, "audio.soft_tokens"),
    ],
)  # fmt: skip
def test_the_first_divergence_lies_in_the_damaged_layer_of_a_tower(
    pair: Callable, tmp_path: Path, tensor: str, text: str, first: str
) -> None:
    reference, _ = pair("e2b")
    model = _damaged(reference, tmp_path, tensor)
    media = {"images": _picture(), "max_soft_tokens": 70} if text == IMAGE else {"audio": _sound()}
    prompt = model.prepare(text, **media)
    report = gl.compare(model, reference, prompt, points=["vision.*", "audio.*", "embed"])
    found = report.first_divergence
    assert found is not None and found.name == first, found
    assert "they are not re-run in float64" in found.why
    # What the text model does with it is each side's own.
    assert report["embed"].verdict == "amplified"


def test_a_damaged_text_layer_is_located_behind_equal_towers(
    pair: Callable, tmp_path: Path
) -> None:
    reference, _ = pair("26b")
    name = "model.language_model.layers.1.mlp.down_proj.weight"
    model = _damaged(reference, tmp_path, name)
    chat = [
        {"role": "user", "content": [{"type": "image", "image": _picture(), "max_soft_tokens": 70}]}
    ]
    report = gl.compare(model, reference, chat)
    found = report.first_divergence
    assert found is not None and found.name == "layers.1.mlp.out"
    assert found.tensors == ("layers.1.mlp.down_proj.weight",) and found.side == "reference"


def test_a_bfloat16_reference_is_judged_by_its_own_error(pair: Callable, tmp_path: Path) -> None:
    reference, model = pair("e2b")
    half = copy.deepcopy(reference).to(torch.bfloat16)
    half.file_dtype = "bfloat16"
    save_tiny_tokenizer(save_tiny(half, tmp_path))
    model = gl.load(tmp_path, dtype="float32", embed_scale="bfloat16")
    loaded = type(reference).from_pretrained(
        tmp_path, dtype=torch.bfloat16, attn_implementation="eager"
    )
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    prompt = model.prepare(IMAGE + SOUND, images=_picture(), audio=_sound(), max_soft_tokens=70)
    report = gl.compare(model, loaded.eval(), prompt, points=["vision.*", "audio.*", "layers.1.*"])
    assert report.first_divergence is None
    ratios = {p.name: p.ratio for p in report.points if p.name.endswith(".resid_post")}
    assert len(ratios) == 4 and all(r is not None and r <= 1.5 for r in ratios.values()), ratios
    assert all(torch.equal(before[n], tensor) for n, tensor in loaded.state_dict().items())


def test_another_gemloupe_model_uses_its_own_towers(pair: Callable, tmp_path: Path) -> None:
    reference, model = pair("e2b")
    prompt = model.prepare(IMAGE + SOUND, images=_picture(), audio=_sound(), max_soft_tokens=70)
    same = gl.compare(model, model, prompt)
    assert {point.verdict for point in same.points} == {"equal"} and not same.not_compared
    other = _damaged(reference, tmp_path, "model.embed_vision.embedding_projection.weight")
    found = gl.compare(model, other, prompt).first_divergence
    assert found is not None and found.name == "vision.soft_tokens"


def test_soft_tokens_of_unknown_origin_are_given_to_both(pair: Callable) -> None:
    reference, model = pair("e2b")
    tokens = np.asarray(model.encode_image(_picture(), 70))
    report = gl.compare(model, reference, model.prepare(IMAGE, images=tokens))
    assert report.first_divergence is None
    assert not any(point.name.startswith("vision.") for point in report.points)


def test_references_without_towers_are_refused_in_words(
    pair: Callable, tiny: Callable, tmp_path: Path
) -> None:
    reference, model = pair("e2b")
    prompt = model.prepare(IMAGE, images=_picture(), max_soft_tokens=70)
    blind, folder = tiny("e2b")
    with pytest.raises(ValueError, match="reference has no vision part"):
        gl.compare(model, blind, prompt)
    with pytest.raises(ValueError, match="reference has no vision part.*expected the same"):
        gl.compare(model, gl.load(folder), prompt)
    text_only, _ = tiny("e2b", text_only=True)
    with pytest.raises(ValueError, match="ForCausalLM, which reads text alone, but the inputs ha"):
        gl.compare(model, text_only, prompt)
    with pytest.raises(ValueError, match="a prompt with media, which are not recorded"):
        gl.record_reference(reference, prompt, tmp_path / "reference.safetensors")
    with pytest.raises(KeyError, match="'vision.nothing' matches no hook point of the model's tow"):
        gl.compare(model, reference, prompt, points="vision.nothing")


def test_records_hold_the_rows_of_media(pair: Callable, tmp_path: Path) -> None:
    _, model = pair("e2b")
    chat = [
        {"role": "user", "content": [{"type": "image", "image": _picture(), "max_soft_tokens": 70}]}
    ]
    prompt = model.prepare(SOUND, audio=_sound())
    path = gl.record(model, [chat, prompt], "layers.1.resid_post", tmp_path / "a.safetensors")
    saved = gl.open_activations(path)
    rows = saved["layers.1.resid_post"][np.asarray(saved.input) == 1]
    run = model.run(SOUND, audio=_sound(), capture="layers.1.resid_post")
    np.testing.assert_array_equal(rows, run["layers.1.resid_post"])


def test_an_adapter_of_a_tower_is_a_divergence_there(
    tiny: Callable, pair: Callable, tmp_path: Path
) -> None:
    _, model = pair("e2b")
    ends = ("vision_tower.encoder.layers.0.self_attn.o_proj.linear",)
    model.load_adapter(write_adapter(tmp_path / "a", model.checkpoint.folder, end=ends))
    prompt = model.prepare(IMAGE, images=_picture(), max_soft_tokens=70)
    report = gl.compare(model, model, prompt, adapter="a", reference_adapter={})
    found = report.first_divergence
    assert found is not None and found.name == "vision.layers.0.attn.out"
    same = gl.compare(model, model, prompt, adapter="a", reference_adapter="a")
    assert same.first_divergence is None and {p.verdict for p in same.points} == {"equal"}
    model.delete_adapter("a")
