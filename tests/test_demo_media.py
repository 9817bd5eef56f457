"""demo:media captions drawn pictures, sounds and videos rightly, and as transformers does."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from transformers import Gemma4AudioFeatureExtractor
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

import gemloupe as gl

RED, GREEN, BLUE, YELLOW = (220, 30, 30), (30, 160, 50), (30, 60, 220), (245, 220, 40)
SHAPES = ("circle", "square", "triangle")


@pytest.fixture(scope="module")
def model() -> gl.Model:
    return gl.load("demo:media", dtype="float32")


def drawn(
    *shapes: tuple[str, tuple[int, int, int], float, float],
    size: tuple[int, int] = (160, 160),
    radius: int = 22,
) -> Image.Image:
    """A white picture with shapes: kind, colour and centre in parts of width and height."""
    picture = Image.new("RGB", size, (255, 255, 255))
    pen = ImageDraw.Draw(picture)
    for kind, colour, x, y in shapes:
        x, y = x * size[0], y * size[1]
        box = (x - radius, y - radius, x + radius, y + radius)
        if kind == "circle":
            pen.ellipse(box, fill=colour)
        elif kind == "square":
            pen.rectangle(box, fill=colour)
        else:
            pen.polygon([(x, box[1]), box[2:], (box[0], box[3])], fill=colour)
    return picture


def beeps(*hertz: float) -> np.ndarray:
    """Tones of 0.2 s after pauses of 0.2 s, at 16 kHz."""
    times = np.arange(3200) / 16_000
    fade = np.minimum(1, np.minimum(times, times[::-1]) / 0.01)
    parts = [np.zeros(3200)]
    for f in hertz:
        parts += [0.5 * fade * np.sin(2 * np.pi * f * times), np.zeros(3200)]
    return np.concatenate(parts).astype(np.float32)


def question(kind: str, text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": kind}, {"type": "text", "text": text}]}]


def answer(model: gl.Model, kind: str, text: str, **media: Any) -> str:
    return model.generate(question(kind, text), temperature=0, max_new_tokens=60, **media).text


PICTURES = {
    "A red circle at the top left.": [("circle", RED, 0.22, 0.22)],
    "A blue square at the bottom right.": [("square", BLUE, 0.78, 0.78)],
    "A yellow triangle in the middle.": [("triangle", YELLOW, 0.5, 0.5)],
    "An empty picture.": [],
}


@pytest.mark.parametrize("caption", PICTURES)
def test_drawn_pictures_are_described(model: gl.Model, caption: str) -> None:
    picture = drawn(*PICTURES[caption])
    assert answer(model, "image", "Describe the picture.", images=picture) == caption


@pytest.mark.parametrize("kind", SHAPES)
def test_a_shape_is_detected_where_it_was_drawn(model: gl.Model, kind: str) -> None:
    picture = drawn((kind, RED, 0.75, 0.25), size=(200, 150))
    reply = answer(model, "image", f"Detect the {kind}.", images=picture)
    (box,) = gl.parse_boxes(reply)
    assert box.label == kind
    middle = ((box.left + box.right) / 2, (box.top + box.bottom) / 2)
    assert math.dist(middle, (750, 250)) < 60  # in thousandths


TONES = {"low": 250, "middle": 750, "high": 2200}


@pytest.mark.parametrize("said", ["low", "high low middle", "low low high high"])
def test_beeps_are_written_down(model: gl.Model, said: str) -> None:
    sound = beeps(*(TONES[pitch] for pitch in said.split()))
    assert answer(model, "audio", "Transcribe the sound.", audio=sound) == said
    assert gl.transcribe(model, sound).text == said


def test_silence_is_heard_as_silence(model: gl.Model) -> None:
    silence = np.zeros(16_000, np.float32)
    assert answer(model, "audio", "Describe the sound.", audio=silence) == "Silence."


def test_the_motion_in_a_video_is_described(model: gl.Model) -> None:
    frames = [drawn(("circle", RED, x, 0.5)) for x in (0.2, 0.4, 0.6, 0.8)]
    clip = gl.video(frames, fps=1)
    expected = "A red circle moves to the right."
    assert answer(model, "video", "What happens?", videos=clip) == expected


def reference() -> Any:
    loaded = transformers.Gemma4ForConditionalGeneration.from_pretrained(
        gl.load("demo:media").checkpoint.folder, dtype=torch.float32, attn_implementation="eager"
    )
    return loaded.eval()


def test_greedy_tokens_are_those_of_transformers(model: gl.Model) -> None:
    theirs = reference()
    picture, sound = drawn(("circle", BLUE, 0.25, 0.75), size=(200, 150)), beeps(250, 2200)
    pixels = Gemma4ImageProcessorPil(max_soft_tokens=70)([picture], return_tensors="pt")
    heard = Gemma4AudioFeatureExtractor(feature_size=64)([sound], return_tensors="pt")
    cases: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
        (question("image", "Detect the circle."), {"images": picture}, pixels),
        (question("audio", "Describe the sound."), {"audio": sound}, heard),
    ]
    names = ("pixel_values", "image_position_ids", "input_features", "input_features_mask")
    for chat, media, processed in cases:
        out = model.generate(chat, temperature=0, max_new_tokens=60, **media)
        ids = torch.tensor(out.prompt.ids[None])
        inputs = {name: processed[name] for name in names if name in processed}
        with torch.no_grad():
            expected = theirs.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=60,
                **inputs,
            )[0, ids.shape[1] :]
        stop = [int(t) for t in theirs.generation_config.eos_token_id]
        assert [t for t in expected.tolist() if t not in stop] == [
            t for t in out.ids.tolist() if t not in stop
        ]


def test_bounds_of_clipped_layers_are_finite(model: gl.Model) -> None:
    tensors = load_file(model.checkpoint.files[0])
    bounds = [float(t) for name, t in tensors.items() if name.endswith(("put_min", "put_max"))]
    assert len(bounds) == 4 * (2 * 7 + 2 * 10) and np.isfinite(bounds).all()


def test_an_image_has_the_budget_that_the_checkpoint_names(model: gl.Model) -> None:
    picture = drawn(("circle", RED, 0.5, 0.5))
    assert len(model.encode_image(picture)) == 64
    prompt = model.prepare(question("image", "What?"), images=picture)
    assert len(prompt.positions("image")) == 64
    assert len(model.encode_image(picture, 280)) == 256
