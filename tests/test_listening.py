"""Prompts whose sound is still coming: read behind the speaker, answered as if read whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gemloupe as gl
from adapter_files import write_adapter
from tiny_models import save_tiny_tokenizer

GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 6, "stop": (), "logprobs": 3}
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "what is it?"}]},
]


@pytest.fixture(scope="module", params=["e2b", "12b"])
def model(request: pytest.FixtureRequest, tiny: Callable) -> gl.Model:
    folder = tiny(request.param, towers="audio", media_ids=True)[1]
    save_tiny_tokenizer(folder)
    return gl.load(folder, dtype="float32", kv_dtype="float32")


def _sound(count: int = 30_000) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, count).astype(np.float32)


def _pushed(model: gl.Model, prompt: Any, clip: np.ndarray, step: int, **options: Any) -> Any:
    stream = model.audio_stream(prompt=prompt, **options)
    tokens = [stream.push(clip[i : i + step]) for i in range(0, len(clip), step)]
    assert sum(map(len, tokens)) == stream.num_tokens
    return stream


@pytest.mark.parametrize("prompt", [CHAT, "hear <|audio|> and say"], ids=["chat", "text"])
def test_a_sound_that_was_read_along_gives_the_answer_of_the_whole(
    model: gl.Model, prompt: Any
) -> None:
    clip = _sound() if model.audio_tower.config.has_encoder else _sound(900)
    whole = model.generate(prompt, audio=clip, **GREEDY)
    stream = _pushed(model, prompt, clip, 1600 if len(clip) > 1600 else 100)
    assert stream.cache.length > len(stream._before) + 20  # It did read behind the speaker.
    out = stream.generate(**GREEDY)
    assert stream.cache.tokens.tolist()[: len(whole.prompt)] == whole.prompt.ids.tolist()
    assert len(out.prompt) < len(whole.prompt) - 20
    assert out.ids.tolist() == whole.ids.tolist()
    for (mine, _), (theirs, _) in zip(out.logprobs, whole.logprobs, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)
    assert out.text == whole.text


def test_the_words_before_the_sound_are_read_before_it_comes(model: gl.Model) -> None:
    stream = model.audio_stream(prompt=CHAT)
    whole = model.prepare(CHAT, audio=_sound(4000))
    first = int(whole.media[0].positions[0])
    assert stream.cache.tokens.tolist() == whole.ids[:first].tolist()
    bare = model.audio_stream(prompt=[model.config.audio_token_id, 70])
    assert bare.cache.length == 0
    bare.push(_sound(4000))
    assert len(bare.generate(**GREEDY).ids) == 6


def test_an_answered_stream_goes_on_in_its_cache(model: gl.Model) -> None:
    stream = _pushed(model, CHAT, _sound(4000), 4000)
    out = stream.generate(**GREEDY)
    assert out.cache is stream.cache
    more = model.generate("and then?", cache=stream.cache, **GREEDY)
    assert len(more.ids) == 6
    with pytest.raises(ValueError, match="this stream has ended"):
        stream.push(_sound(100))
    with pytest.raises(ValueError, match="this stream was answered"):
        stream.generate()


def test_other_media_stand_before_and_after_the_sound(tiny: Callable) -> None:
    vision = {"position_embedding_size": 192}
    folder = tiny("e2b", towers="tiny", media_ids=True, vision=vision)[1]
    save_tiny_tokenizer(folder)
    model = gl.load(folder, dtype="float32", kv_dtype="float32")
    pictures = list(np.random.default_rng(1).integers(0, 256, (2, 2, 60, 3), np.uint8))
    text, media = "a <|image|> <|audio|> <|image|>?", {"images": pictures, "max_soft_tokens": 70}
    whole = model.generate(text, audio=_sound(), **media, **GREEDY)
    out = _pushed(model, text, _sound(), 5000, **media).generate(**GREEDY)
    assert out.ids.tolist() == whole.ids.tolist()
    assert out.logprobs[0][0] == pytest.approx(whole.logprobs[0][0], abs=1e-4)


def test_what_is_no_prompt_of_one_sound_is_said(model: gl.Model) -> None:
    with pytest.raises(ValueError, match="2 audio placeholders .*, but audio= has 1"):
        model.audio_stream(prompt="<|audio|><|audio|>")
    with pytest.raises(ValueError, match="0 audio placeholders"):
        model.audio_stream(prompt="words")
    with pytest.raises(ValueError, match="prompt is a batch; expected one text"):
        model.audio_stream(prompt=["<|audio|>", "<|audio|>"])
    with pytest.raises(ValueError, match="'thinking' belongs to a prompt; pass prompt=, too"):
        model.audio_stream(thinking=True)
    stream = model.audio_stream(prompt=CHAT)
    with pytest.raises(ValueError, match="cache= belongs to the prompt"):
        stream.generate(cache=model.new_cache())
    with pytest.raises(ValueError, match="no sound came; push at least one frame"):
        stream.generate()


def test_the_sound_is_heard_and_read_under_the_streams_adapter(
    tiny: Callable, tmp_path: Path
) -> None:
    folder = tiny("e2b", towers="audio", media_ids=True)[1]
    save_tiny_tokenizer(folder)
    model = gl.load(folder, dtype="float32", kv_dtype="float32")
    ends = ("q_proj.linear", "embedding_projection", "mlp.down_proj")
    model.load_adapter(write_adapter(tmp_path / "a", folder, end=ends))
    whole = model.generate(CHAT, audio=_sound(), adapter="a", **GREEDY)
    stream = _pushed(model, CHAT, _sound(), 5000, adapter="a")
    model.set_adapter({})
    out = stream.generate(**GREEDY)
    plain = model.generate(CHAT, audio=_sound(), **GREEDY)
    assert out.ids.tolist() == whole.ids.tolist()
    assert out.logprobs[0][0] == pytest.approx(whole.logprobs[0][0], abs=1e-4)
    assert abs(plain.logprobs[0][0] - whole.logprobs[0][0]) > 1e-3
