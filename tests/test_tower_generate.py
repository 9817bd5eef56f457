"""Points of the towers in generate: what is seen and changed there is what the answer reads."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gemloupe as gl
from adapter_files import write_adapter
from tiny_models import save_tiny_tokenizer

GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 4, "stop": ()}
POINTS = ["vision.layers.0.resid_post", "audio.layers.0.attn.pattern", "layers.1.resid_post"]
TEXT = "a <|image|> b <|audio|> c"


@pytest.fixture(scope="module")
def model(tiny: Callable) -> gl.Model:
    vision = {"position_embedding_size": 64}
    folder = tiny("e2b", towers="tiny", media_ids=True, vision=vision)[1]
    save_tiny_tokenizer(folder)
    return gl.load(folder, dtype="float32")


def _media(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    picture = rng.integers(0, 256, (40 + 20 * seed, 60, 3), np.uint8)
    return {"images": picture, "audio": rng.normal(0, 0.1, 5000 + 2000 * seed)}


def test_generate_sees_in_the_towers_what_run_sees(model: gl.Model) -> None:
    out = model.generate(TEXT, **_media(), max_soft_tokens=70, capture=POINTS, **GREEDY)
    run = model.run(TEXT, **_media(), max_soft_tokens=70, capture=POINTS)
    assert list(out.captured) == POINTS
    for name in POINTS[:2]:
        np.testing.assert_array_equal(out.captured[name], run[name])
        np.testing.assert_array_equal(out.captured.positions_of(name), run.positions_of(name))
    rows = len(out.prompt) + len(out.ids) - 1
    assert out.captured[POINTS[2]].shape[0] == rows
    alone = model.generate(
        TEXT, **_media(), max_soft_tokens=70, capture=POINTS[:2], routing=False, **GREEDY
    )
    assert list(alone.captured) == POINTS[:2]
    plain = model.generate(TEXT, **_media(), max_soft_tokens=70, **GREEDY)
    assert plain.ids.tolist() == out.ids.tolist() == alone.ids.tolist()


def test_an_edit_in_a_tower_changes_the_answer_and_nothing_remains(model: gl.Model) -> None:
    edit = {
        "vision.soft_tokens": gl.edits.scale(-3.0),
        "audio.layers.0.ffn2.out": gl.edits.zero(),
        "layers.0.mlp.out": gl.edits.scale(0.9),
    }
    arguments: dict[str, Any] = {"max_soft_tokens": 70, "logprobs": 5, **GREEDY}
    plain = model.generate(TEXT, **_media(), **arguments)
    cache = model.new_cache()
    edited = model.generate(
        TEXT, **_media(), **arguments, edit=edit, cache=cache,
        capture=["vision.soft_tokens", "audio.soft_tokens"],
    )  # fmt: skip
    seen, heard = (edited.captured[f"{tower}.soft_tokens"] for tower in ("vision", "audio"))
    given = model.generate(
        TEXT, images=seen, audio=heard, edit={"layers.0.mlp.out": gl.edits.scale(0.9)}, **arguments
    )
    assert edited.ids.tolist() == given.ids.tolist()
    assert edited.logprobs == given.logprobs and edited.logprobs != plain.logprobs
    notes = str(cache.provenance)
    assert "vision.soft_tokens: scale" in notes and "audio.layers.0.ffn2.out: zero" in notes
    again = model.generate(TEXT, **_media(), **arguments)
    assert again.logprobs == plain.logprobs


def test_rows_of_a_batch_have_media_edits_and_captures_of_their_own(model: gl.Model) -> None:
    rows: list[int] = []

    def note(x: np.ndarray, at: Any) -> None:
        rows.append(at.row)

    first, second = _media(0), _media(1)
    images, sounds = [first["images"], second["images"]], [first["audio"], second["audio"]]
    edits = [
        {"vision.pooled": note, "audio.encoded": note},
        [{"vision.soft_tokens": gl.edits.zero()}, {"audio.encoded": note}],
    ]
    outs = model.generate(
        [TEXT, TEXT], images=images, audio=sounds, max_soft_tokens=70, edit=edits,
        capture=["vision.soft_tokens", "audio.soft_tokens"], **GREEDY,
    )  # fmt: skip
    assert rows == [0, 0, 1]
    assert not outs[1].captured["vision.soft_tokens"].any()
    for out, media in zip(outs, (first, second), strict=True):
        alone = model.encode_audio(media["audio"])
        np.testing.assert_array_equal(out.captured["audio.soft_tokens"], alone)
    picture = model.encode_image(first["images"], 70)
    np.testing.assert_array_equal(outs[0].captured["vision.soft_tokens"], picture)


def test_a_stream_sees_the_towers_too(model: gl.Model) -> None:
    stream = model.generate(
        "<|image|>", images=_media()["images"], max_soft_tokens=70, stream=True,
        capture="vision.soft_tokens", **GREEDY,
    )  # fmt: skip
    assert len(list(stream)) == 4
    tokens = model.encode_image(_media()["images"], 70)
    np.testing.assert_array_equal(stream.result.captured["vision.soft_tokens"], tokens)


def test_what_generate_can_not_see_is_said(model: gl.Model) -> None:
    with pytest.raises(KeyError, match="vision tower; did you mean 'vision.soft_tokens'"):
        model.generate("<|image|>", images=_media()["images"], capture="vision.soft_token")
    with pytest.raises(KeyError, match="audio.encoded"):
        model.generate("<|audio|>", audio=_media()["audio"], capture="audio.encodet")
    cache = model.new_cache()
    with pytest.raises(ValueError, match="there is no image"):
        model.generate("a", cache=cache, edit={"vision.soft_tokens": gl.edits.zero()})
    with pytest.raises(ValueError, match="there is no sound"):
        model.generate("a", cache=cache, capture="audio.encoded")
    assert cache.length == 0 and not cache.provenance


def test_soft_tokens_of_adapters_that_stayed_behind_are_not_encoded_anew(
    model: gl.Model, tmp_path: Path
) -> None:
    folder = model.checkpoint.folder
    ends = ("embed_vision.embedding_projection", "embed_audio.embedding_projection")
    model.load_adapter(write_adapter(tmp_path / "eyes", folder, end=ends), name="eyes")
    try:
        run = model.run(TEXT, **_media(), max_soft_tokens=70, adapter="eyes", routing=False)
        travelled = pickle.loads(pickle.dumps(run.prompt))
        again = model.run(travelled, adapter="eyes", routing=False)
        np.testing.assert_array_equal(again.logits, run.logits)
        for point, name in zip(POINTS, ("image 0", "audio 0"), strict=False):
            with pytest.raises(ValueError, match=f"{name} came from another process"):
                model.generate(travelled, capture=point, adapter="eyes", **GREEDY)
    finally:
        model.delete_adapter("eyes")
    plain = pickle.loads(pickle.dumps(model.prepare(TEXT, **_media(), max_soft_tokens=70)))
    assert POINTS[0] in model.generate(plain, capture=POINTS[0], **GREEDY).captured
