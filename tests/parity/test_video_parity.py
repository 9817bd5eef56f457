"""Videos through gemloupe and through transformers: frames, soft tokens, logits, greedy tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PilImage
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import VideoMetadata

import gemloupe as gl
from gemloupe.media.images import read_image
from gemloupe.media.videos import read_video, sampled
from tiny_models import save_tiny_tokenizer

PATCH = 4
KINDS = {"image": 1, "video": 2}


def _frames(count: int, seed: int = 0, size: tuple[int, int] = (24, 36)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3), np.uint8)


@pytest.mark.parametrize("total", [1, 5, 31, 32, 33, 100, 997])
def test_frames_are_those_that_transformers_samples(total: int) -> None:
    metadata = VideoMetadata(total_num_frames=total, fps=24.0)
    processor = SimpleNamespace(num_frames=32, fps=None)
    count = min(32, total)  # It refuses more than there are.
    expected = BaseVideoProcessor.sample_frames(processor, metadata, num_frames=count)
    assert sampled(total, 32) == expected.tolist()


def test_frames_become_the_patches_of_transformers_images() -> None:
    frames = _frames(3, size=(90, 160))
    video = read_video(frames, "videos[0]", 48)
    pictures = [PilImage.fromarray(frame) for frame in frames]
    expected = Gemma4ImageProcessorPil(patch_size=16, max_soft_tokens=70)(pictures)
    for frame, patches in zip(video.frames, expected["pixel_values"], strict=True):
        mine = frame.patches(16)
        assert np.array_equal(np.asarray(patches)[: len(mine)], mine)


@pytest.fixture(params=["e2b", "26b", "12b"])
def loaded(request: pytest.FixtureRequest, tiny: Callable) -> tuple[Any, gl.Model]:
    table = "mm_posemb_size" if request.param == "12b" else "position_embedding_size"
    reference, folder = tiny(request.param, towers="tiny", media_ids=True, vision={table: 192})
    save_tiny_tokenizer(folder)
    return reference, gl.load(folder, dtype="float32")


def _features(reference: Any, pictures: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches and their places, padded to one length, as the processors give them."""
    side = 3 * PATCH if "Unified" in type(reference).__name__ else PATCH
    most = 70 * (1 if side != PATCH else 9)
    values = torch.zeros(len(pictures), most, 3 * side**2)
    places = torch.full((len(pictures), most, 2), -1)
    for i, picture in enumerate(pictures):
        image = read_image(picture, "x", 3 * PATCH, 70)
        patches, columns = image.patches(side), image.pixels.shape[1] // side
        at = torch.arange(len(patches))
        values[i, : len(patches)] = torch.from_numpy(patches)
        places[i, : len(patches)] = torch.stack([at % columns, at // columns], dim=-1)
    return values, places


def _video_inputs(reference: Any, videos: list[np.ndarray]) -> dict[str, torch.Tensor]:
    values, places = _features(reference, [frame for video in videos for frame in video])
    counts = torch.tensor([len(video) for video in videos])
    return {
        "pixel_values_videos": values,
        "video_position_ids": places,
        "num_frames_per_video": counts,
    }


def _reference_logits(
    reference: Any, model: gl.Model, ids: list[int], inputs: dict[str, torch.Tensor]
) -> np.ndarray:
    tensor = torch.tensor([ids])
    types = sum(
        (tensor == getattr(model.config, f"{kind}_token_id")).long() * number
        for kind, number in KINDS.items()
    )
    more: dict[str, Any] = {"mm_token_type_ids": types}
    if "Unified" in type(reference).__name__:  # See test_media_parity.
        embeds = torch.zeros(1, len(ids), reference.config.text_config.hidden_size)
        ones, at = torch.ones(1, len(ids)), torch.arange(len(ids))[None]
        more["attention_mask"] = reference.create_masks_for_generate(
            reference.config, embeds, ones, None, at, types
        )
    with torch.no_grad():
        return reference(input_ids=tensor, **more, **inputs, use_cache=False).logits[0].numpy()


def test_soft_tokens_of_videos_are_those_of_transformers(loaded: tuple[Any, gl.Model]) -> None:
    reference, model = loaded
    frames = _frames(3)
    inputs = _video_inputs(reference, [frames])
    with torch.no_grad():
        features = reference.model.get_video_features(**inputs, return_dict=True).pooler_output
    expected = torch.cat(list(features)).numpy()
    tokens = np.asarray(model.encode_video(frames))
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(tokens, expected.reshape(tokens.shape), rtol=0, atol=1e-4 * scale)


def test_prompts_with_videos_and_images_give_transformers_logits_and_tokens(
    loaded: tuple[Any, gl.Model],
) -> None:
    reference, model = loaded
    picture = _frames(1, seed=7, size=(20, 50))[0]
    videos = [_frames(2, seed=1), _frames(1, seed=2, size=(40, 20))]
    text = "first <|video|> then <|image|> then <|video|> end"
    arguments: dict[str, Any] = {"images": picture, "videos": videos, "max_soft_tokens": 70}
    run = model.run(text, **arguments, logits="all")
    values, places = _features(reference, [picture])
    inputs = {"pixel_values": values, "image_position_ids": places}
    inputs |= _video_inputs(reference, videos)
    ids = run.prompt.ids.tolist()
    expected = _reference_logits(reference, model, ids, inputs)
    scale = max(1.0, math.ceil(float(np.abs(expected).max())))
    np.testing.assert_allclose(run.logits, expected, rtol=0, atol=1e-4 * scale)
    out = model.generate(text, **arguments, temperature=0, max_new_tokens=3, stop=())
    for token in out.ids.tolist():
        logits = _reference_logits(reference, model, ids, inputs)[-1]
        assert logits[token] > logits.max() - 1e-5
        ids.append(token)
