"""Pictures and sounds, and what transformers makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image as PilImage
from transformers import Gemma4AudioFeatureExtractor, Gemma4UnifiedAudioFeatureExtractor
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

from gemloupe.media.images import read_image
from tiny_models import MEDIA_IDS

PATCH = 4
"""Pixels of a patch's side in tiny models."""


def picture(width: int, height: int, seed: int = 0) -> PilImage.Image:
    """Smooth shapes and some noise: what bicubic sees of real pictures."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(width, height)
    waves = [np.sin(rng.uniform(3, 30) * x + rng.uniform(3, 30) * y) for _ in range(3)]
    noise = rng.normal(size=(height, width, 3)) * 0.1
    values = (np.stack(waves, axis=-1) + noise + 1.3) / 2.6
    return PilImage.fromarray((np.clip(values, 0, 1) * 255).astype(np.uint8))


def sound(length: int, seed: int = 0) -> np.ndarray:
    """Tones with an envelope, and noise."""
    rng = np.random.default_rng(seed)
    t = np.arange(length) / 16_000
    tones = sum(np.sin(2 * np.pi * hertz * t) for hertz in rng.uniform(80, 4000, 4))
    return (0.1 * tones * np.sin(3 * t) + rng.normal(0, 0.02, length)).astype(np.float32)


def processed(pictures: Sequence[PilImage.Image], budget: int, patch: int) -> dict[str, Any]:
    """What transformers' image processor gives."""
    processor = Gemma4ImageProcessorPil(patch_size=patch, max_soft_tokens=budget)
    return dict(processor(list(pictures), return_tensors="pt"))


def is_unified(reference: Any) -> bool:
    return "Unified" in type(reference).__name__


def image_inputs(
    reference: Any, pictures: Sequence[PilImage.Image], budget: int
) -> dict[str, torch.Tensor]:
    """pixel_values and image_position_ids for a tiny model."""
    if not is_unified(reference):
        inputs = processed(pictures, budget, PATCH)
        return {name: inputs[name] for name in ("pixel_values", "image_position_ids")}
    images = [read_image(p, "image", 3 * PATCH, budget) for p in pictures]
    values = torch.zeros(len(images), budget, 3 * (3 * PATCH) ** 2)
    positions = torch.full((len(images), budget, 2), -1)
    for i, image in enumerate(images):
        count, columns = image.soft_tokens, image.grid[1]
        values[i, :count] = torch.from_numpy(image.patches(3 * PATCH))
        at = torch.arange(count)
        positions[i, :count] = torch.stack([at % columns, at // columns], dim=-1)
    return {"pixel_values": values, "image_position_ids": positions}


def audio_inputs(reference: Any, clips: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
    """input_features and input_features_mask for a tiny model."""
    config = reference.config.audio_config
    if hasattr(config, "audio_embed_dim"):
        width = config.audio_embed_dim
        extractor = Gemma4UnifiedAudioFeatureExtractor(width, audio_samples_per_token=width)
    else:
        extractor = Gemma4AudioFeatureExtractor()
    return dict(extractor(list(clips), return_tensors="pt"))


def image_tokens(
    reference: Any, pictures: Sequence[PilImage.Image], budget: int
) -> list[np.ndarray]:
    """The soft tokens of each picture."""
    with torch.no_grad():
        features = reference.model.get_image_features(**image_inputs(reference, pictures, budget))
    return [tokens.numpy() for tokens in features.pooler_output]


def audio_tokens(reference: Any, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The soft tokens of each sound."""
    features = audio_inputs(reference, clips)
    with torch.no_grad():
        out = reference.model.get_audio_features(
            features["input_features"], features["input_features_mask"], return_dict=True
        )
    return [
        tokens[mask].numpy()
        for tokens, mask in zip(out.pooler_output, out.attention_mask, strict=True)
    ]


def logits(
    reference: Any,
    ids: Sequence[int],
    pictures: Sequence[PilImage.Image] = (),
    clips: Sequence[np.ndarray] = (),
    *,
    budget: int = 70,
) -> np.ndarray:
    """float32 [T, V] of ids with the placeholders of pictures and sounds."""
    tensor = torch.tensor([list(ids)])
    types = (tensor == MEDIA_IDS["image_token_id"]).long()
    types += 3 * (tensor == MEDIA_IDS["audio_token_id"]).long()
    inputs = {"input_ids": tensor, "mm_token_type_ids": types}
    if pictures:
        inputs |= image_inputs(reference, pictures, budget)
    if clips:
        inputs |= audio_inputs(reference, clips)
    if is_unified(reference):  # See test_media_parity.
        embeds = torch.zeros(1, len(ids), reference.config.text_config.hidden_size)
        ones, at = torch.ones(1, len(ids)), torch.arange(len(ids))[None]
        inputs["attention_mask"] = reference.create_masks_for_generate(
            reference.config, embeds, ones, None, at, types
        )
    with torch.no_grad():
        return reference(**inputs, use_cache=False).logits[0].numpy()
