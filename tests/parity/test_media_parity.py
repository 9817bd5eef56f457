"""Soft tokens in a prompt give transformers' logits: merged embeddings, per-layer ids and masks."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import gemloupe as gl
from tiny_models import MEDIA_IDS, VARIANTS, VOCAB_SIZE, save_tiny_tokenizer

IMAGE, BEGIN, END = (MEDIA_IDS[f"{name}_token_id"] for name in ("image", "boi", "eoi"))
PLACEHOLDERS = [MEDIA_IDS[f"{kind}_token_id"] for kind in ("image", "audio", "video")]
LENGTHS = (9, 4)


def _image(length: int) -> list[int]:
    return [BEGIN, *[IMAGE] * length, END]


def _ids() -> list[int]:
    rng = np.random.default_rng(3)
    words = rng.integers(60, VOCAB_SIZE, 30).tolist()
    return [2, *words[:12], *_image(LENGTHS[0]), *words[12:15], *_image(LENGTHS[1]), *words[15:]]


def _soft_tokens(width: int) -> list[np.ndarray]:
    rng = np.random.default_rng(4)
    return [rng.normal(size=(length, width)).astype(np.float32) for length in LENGTHS]


def _hf_inputs(reference: Any, ids: list[int], images: list[np.ndarray]) -> dict[str, Any]:
    tensor = torch.tensor([ids])
    inputs = {
        "input_ids": tensor,
        "pixel_values": torch.zeros(1),
        "mm_token_type_ids": (tensor == IMAGE).long(),
    }
    if "Unified" in type(reference).__name__:
        # The masks that its generate() makes for static caches, and Gemma 4 for all: in its plain
        # forward images see themselves whole in full layers, too.
        inputs["attention_mask"] = reference.create_masks_for_generate(
            reference.config,
            torch.zeros(1, len(ids), reference.config.text_config.hidden_size),
            torch.ones(1, len(ids)),
            None,
            torch.arange(len(ids))[None],
            inputs["mm_token_type_ids"],
        )
    return inputs


def _with_features(reference: Any, images: list[np.ndarray]) -> Any:
    features = SimpleNamespace(pooler_output=[torch.from_numpy(image) for image in images])
    return mock.patch.object(reference.model, "get_image_features", lambda *a, **k: features)


def _reference_logits(reference: Any, ids: list[int], images: list[np.ndarray]) -> np.ndarray:
    with torch.no_grad(), _with_features(reference, images):
        output = reference(**_hf_inputs(reference, ids, images), use_cache=False)
    return output.logits[0].numpy()


@pytest.fixture(params=VARIANTS)
def loaded(request: pytest.FixtureRequest, tiny: Callable) -> tuple[Any, gl.Model]:
    reference, folder = tiny(request.param, towers="tiny", media_ids=True, seed=2)
    save_tiny_tokenizer(folder)
    return reference, gl.load(folder, dtype="float32")


def test_images_give_the_logits_of_transformers(loaded: tuple[Any, gl.Model]) -> None:
    reference, model = loaded
    images = _soft_tokens(model.config.text.hidden_size)
    expected = _reference_logits(reference, _ids(), images)
    run = model.run(_ids(), images=images, logits="all", capture="embed")
    np.testing.assert_allclose(run.logits, expected, rtol=0, atol=1e-4)
    assert [medium.kind for medium in run.media] == ["image", "image"]
    for medium, image in zip(run.media, images, strict=True):
        assert np.array_equal(run["embed"][medium.positions], image)
    without = model.run(_ids(), logits="all")
    assert np.abs(without.logits - expected).max() > 0.1


@pytest.mark.parametrize("chunk", [1, 5, 14, 20])
def test_no_chunk_changes_what_images_give(loaded: tuple[Any, gl.Model], chunk: int) -> None:
    _reference, model = loaded
    images = _soft_tokens(model.config.text.hidden_size)
    whole = model.run(_ids(), images=images, logits="all")
    cut = model.run(_ids(), images=images, logits="all", chunk=chunk)
    np.testing.assert_allclose(cut.logits, whole.logits, rtol=0, atol=1e-4)


def test_greedy_tokens_after_images_are_those_of_transformers(
    loaded: tuple[Any, gl.Model],
) -> None:
    reference, model = loaded
    images = _soft_tokens(model.config.text.hidden_size)
    ids = _ids()
    for token in model.generate(ids, images=images, max_new_tokens=8, temperature=0).ids:
        assert token not in PLACEHOLDERS  # transformers would look them up as padding
        logits = _reference_logits(reference, ids, images)[-1]
        assert logits[token] > logits.max() - 1e-5
        ids.append(int(token))


def test_a_repeated_run_begins_where_an_image_does(loaded: tuple[Any, gl.Model]) -> None:
    _reference, model = loaded
    images = _soft_tokens(model.config.text.hidden_size)
    kept = model.run(_ids(), images=images, keep=True)
    inside = int(kept.media[0].positions[4])
    edit = {"layers.1.resid_post": gl.edits.zero(positions=[inside])}
    again = model.run(kept, edit=edit)
    anew = model.run(_ids(), images=images, edit=edit)
    np.testing.assert_allclose(again.logits, anew.logits, rtol=0, atol=1e-4)
    assert np.abs(anew.logits - kept.logits).max() > 1e-3


def test_images_go_on_in_a_cache(loaded: tuple[Any, gl.Model]) -> None:
    _reference, model = loaded
    images = _soft_tokens(model.config.text.hidden_size)
    cut = _ids().index(END) + 1
    cache = model.new_cache()
    model.run(_ids()[:cut], images=images[:1], cache=cache)
    second = model.run(_ids()[cut:], images=images[1:], cache=cache)
    whole = model.run(_ids(), images=images)
    np.testing.assert_allclose(second.logits, whole.logits, rtol=0, atol=1e-4)


def test_rows_of_a_batch_have_their_own_images(loaded: tuple[Any, gl.Model]) -> None:
    _reference, model = loaded
    first, second = _soft_tokens(model.config.text.hidden_size)
    rows = [[2, *_image(9), 70], [2, 71, 72], [2, 73, *_image(4)]]
    alone = [
        model.generate(row, images=image, max_new_tokens=4, temperature=0).ids.tolist()
        for row, image in zip(rows, [first, None, second], strict=True)
    ]
    outs = model.generate(rows, images=[[first], None, second], max_new_tokens=4, temperature=0)
    assert [out.ids.tolist() for out in outs] == alone
