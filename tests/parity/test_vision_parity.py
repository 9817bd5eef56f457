"""Pictures give the patches, soft tokens and logits of transformers, with towers of every kind."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import media_reference
import numpy as np
import pytest
import torch
from media_reference import PATCH
from media_reference import picture as _picture
from media_reference import processed as _processed
from PIL import Image as PilImage

import gemloupe as gl
from gemloupe.media.images import BUDGETS, read_image
from tiny_models import MEDIA_IDS, VOCAB_SIZE, save_tiny_tokenizer

# Encoder with clipped linears, encoder with standardised features, encoder-free.
KINDS = ("e2b", "26b", "12b")
SIZES = [(40, 30), (31, 97), (200, 200), (7, 150), (301, 64)]
IMAGE = MEDIA_IDS["image_token_id"]


@pytest.mark.parametrize(
    ("size", "budget"),
    [
        *(((640, 480), budget) for budget in BUDGETS),
        *(((33, 1000), budget) for budget in BUDGETS),
        ((1024, 768), 280),
        ((1280, 720), 70),
        ((50, 50), 140),
        ((3000, 5), 280),
        ((9, 9), 560),
    ],
)
def test_pictures_become_the_patches_of_transformers(size: tuple[int, int], budget: int) -> None:
    picture = _picture(*size)
    expected = _processed([picture], budget, 16)
    image = read_image(picture, "image", 48, budget)
    patches = image.patches(16)
    assert np.array_equal(expected["pixel_values"][0, : len(patches)].numpy(), patches)
    assert not expected["pixel_values"][0, len(patches) :].any()
    assert [image.soft_tokens] == list(expected["num_soft_tokens_per_image"])
    columns = image.pixels.shape[1] // 16
    at = expected["image_position_ids"][0, : len(patches)].numpy()
    assert np.array_equal(at[:, 1] * columns + at[:, 0], np.arange(len(patches)))
    # The patches of the encoder-free model: 3 x 3 of these as one square.
    rows = image.pixels.shape[0] // 16
    grid = patches.reshape(rows // 3, 3, columns // 3, 3, 16, 16, 3)
    squares = grid.transpose(0, 2, 1, 4, 3, 5, 6).reshape(image.soft_tokens, -1)
    assert np.array_equal(image.patches(48), squares)


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "P", "CMYK", "1"])
def test_every_mode_becomes_the_rgb_of_transformers(mode: str) -> None:
    picture = _picture(90, 70).convert("RGBA")
    picture.putalpha(PilImage.linear_gradient("L").resize(picture.size))
    if mode != "RGBA":
        picture = picture.convert("RGB").convert(mode) if mode != "LA" else picture.convert("LA")
    expected = _processed([picture], 70, 16)["pixel_values"][0].numpy()
    patches = read_image(picture, "image", 48, 70).patches(16)
    assert np.array_equal(expected[: len(patches)], patches)


@pytest.fixture(params=KINDS)
def loaded(request: pytest.FixtureRequest, tiny: Callable) -> tuple[Any, gl.Model]:
    # Tables as long as thin pictures need them.
    table = "mm_posemb_size" if request.param == "12b" else "position_embedding_size"
    reference, folder = tiny(
        request.param, towers="tiny", media_ids=True, vision={table: 3400}, seed=2
    )
    save_tiny_tokenizer(folder)
    return reference, gl.load(folder, dtype="float32")


def _close(ours: np.ndarray, theirs: np.ndarray) -> None:
    scale = max(1.0, float(np.abs(theirs).max()))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("budget", BUDGETS[:3])
def test_soft_tokens_are_those_of_transformers(loaded: tuple[Any, gl.Model], budget: int) -> None:
    reference, model = loaded
    sizes = SIZES if budget == 70 else SIZES[1:3]
    pictures = [_picture(*size, seed=i) for i, size in enumerate(sizes)]
    expected = media_reference.image_tokens(reference, pictures, budget)
    for picture, theirs in zip(pictures, expected, strict=True):
        tokens = model.encode_image(picture, max_soft_tokens=budget)
        _close(np.asarray(tokens), theirs)


@pytest.mark.parametrize("budget", BUDGETS[3:])
def test_soft_tokens_of_the_largest_budgets(tiny: Callable, budget: int) -> None:
    # One head: the reference holds its scores whole, [10080, 10080] each.
    vision = {"num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 1}
    vision["position_embedding_size"] = 256
    reference, folder = tiny("e4b", towers="tiny", media_ids=True, vision=vision)
    picture = _picture(300, 200)
    image = read_image(picture, "image", 3 * PATCH, budget)
    columns = image.pixels.shape[1] // PATCH
    at = torch.arange(9 * image.soft_tokens)
    with torch.no_grad():
        features = reference.model.get_image_features(
            torch.from_numpy(image.patches(PATCH))[None],
            torch.stack([at % columns, at // columns], dim=-1)[None],
        )
    tokens = gl.load(folder, dtype="float32").encode_image(picture, max_soft_tokens=budget)
    _close(np.asarray(tokens), features.pooler_output[0].numpy())


def _ids(lengths: list[int]) -> list[int]:
    rng = np.random.default_rng(5)
    begin, end = MEDIA_IDS["boi_token_id"], MEDIA_IDS["eoi_token_id"]
    ids = [2]
    for length in lengths:
        ids += [*rng.integers(60, VOCAB_SIZE, 4).tolist(), begin, *[IMAGE] * length, end]
    return [*ids, *rng.integers(60, VOCAB_SIZE, 5).tolist()]


@pytest.mark.parametrize("count", [1, 3])
def test_logits_and_greedy_tokens_are_those_of_transformers(
    loaded: tuple[Any, gl.Model], count: int
) -> None:
    reference, model = loaded
    pictures = [_picture(*size, seed=9) for size in SIZES[:count]]
    lengths = [len(model.encode_image(picture, 70)) for picture in pictures]
    ids = _ids(lengths)
    run = model.run(ids, images=pictures, max_soft_tokens=70, logits="all")
    _close(run.logits, media_reference.logits(reference, ids, pictures))
    out = model.generate(ids, images=pictures, max_soft_tokens=70, max_new_tokens=4, temperature=0)
    for token in out.ids.tolist():
        logits = media_reference.logits(reference, ids, pictures)[-1]
        assert logits[token] > logits.max() - 1e-5
        ids.append(token)


def test_soft_tokens_stand_for_their_image_in_other_prompts(loaded: tuple[Any, gl.Model]) -> None:
    _reference, model = loaded
    picture = _picture(40, 30)
    tokens = model.encode_image(picture, max_soft_tokens=140)
    for text in ("what <|image|>?", "<|image|> a cat"):
        given = model.run(text, images=picture, max_soft_tokens=140)
        reused = model.run(text, images=tokens)
        assert np.array_equal(given.logits, reused.logits)
        assert reused.media[0].content.source.soft_tokens == len(tokens)


def test_converted_checkpoints_see_the_same(tiny: Callable, tmp_path: Path) -> None:
    folder = tiny("e2b", towers="tiny", media_ids=True, dtype="bfloat16")[1]
    save_tiny_tokenizer(folder)
    packed = gl.load(gl.convert(folder, tmp_path / "packed", "int8"))
    model = gl.load(folder, dtype="int8")
    picture = _picture(40, 30)
    assert np.array_equal(packed.encode_image(picture, 70), model.encode_image(picture, 70))
    runs = [m.run("<|image|>?", images=picture, max_soft_tokens=70) for m in (packed, model)]
    assert np.array_equal(runs[0].logits, runs[1].logits)


def test_budgets_are_of_a_call_an_image_a_row_or_a_part(tiny: Callable) -> None:
    folder = tiny("12b", towers="tiny", media_ids=True, vision={"mm_posemb_size": 64})[1]
    save_tiny_tokenizer(folder)
    model = gl.load(folder, dtype="float32")
    picture = _picture(40, 30)
    expected = {budget: len(model.encode_image(picture, budget)) for budget in BUDGETS}

    def lengths(prompt: Any) -> list[int]:
        return [len(medium.positions) for medium in prompt.media]

    two = model.prepare("<|image|><|image|>", images=[picture] * 2, max_soft_tokens=[140, 560])
    assert lengths(two) == [expected[140], expected[560]]
    sweep = model.run(
        ["<|image|>"] * len(BUDGETS), images=[picture] * len(BUDGETS), max_soft_tokens=list(BUDGETS)
    )
    assert [lengths(run) for run in sweep] == [[expected[budget]] for budget in BUDGETS]
    parts = [
        {"type": "image", "image": picture, "max_soft_tokens": 1120},
        {"type": "image"},
        {"type": "text", "text": "?"},
    ]
    chat = model.prepare([{"role": "user", "content": parts}], images=picture, max_soft_tokens=70)
    assert lengths(chat) == [expected[1120], expected[70]]
    out = model.chat("what?", images=picture, max_soft_tokens=70, max_new_tokens=1)
    assert lengths(out.prompt) == [expected[70]] and "what?" in out.prompt.text
    with pytest.raises(ValueError, match="max_soft_tokens has 3 entries for 1 images"):
        model.prepare("<|image|>", images=picture, max_soft_tokens=[70, 70, 70])
    with pytest.raises(ValueError, match="max_soft_tokens is 100; expected one of"):
        model.prepare("<|image|>", images=picture, max_soft_tokens=100)


def test_runs_with_images_travel_between_processes(loaded: tuple[Any, gl.Model]) -> None:
    _reference, model = loaded
    run = model.run("<|image|>", images=_picture(40, 30), max_soft_tokens=70, capture="embed")
    copy = pickle.loads(pickle.dumps(run))
    assert np.array_equal(copy.media[0].soft_tokens, run.media[0].soft_tokens)
    assert np.array_equal(copy.media[0].content.source.pixels, run.media[0].content.source.pixels)
    assert np.array_equal(model.run(copy.prompt).logits, run.logits)


def test_threads_and_invariance_change_no_soft_token_by_much(tiny: Callable) -> None:
    _reference, folder = tiny("e2b", towers="tiny", media_ids=True)
    picture = _picture(40, 40)
    one, two = (
        gl.load(folder, dtype="float32", threads=threads, invariant=True).encode_image(picture, 70)
        for threads in (1, 2)
    )
    assert np.array_equal(one, two)
    _close(np.asarray(one), np.asarray(gl.load(folder, dtype="float32").encode_image(picture, 70)))
