"""Sound through gemloupe and through transformers: soft tokens, every hook point, logits."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from media_reference import audio_inputs, audio_tokens, sound
from torch import nn
from transformers.models.gemma4 import modeling_gemma4

import gemloupe as gl
import tiny_models
from gemloupe import hooks

TOLERANCE = 1e-4
# Samples: one frame, one token and parts of one, beyond a chunk of 12 tokens, odd lengths.
LENGTHS = (161, 640, 800, 1001, 4321, 7_841, 8_001, 16_000, 33_333)


@functools.cache
def models(variant: str, dtype: str = "float32") -> tuple[nn.Module, gl.Model]:
    """A tiny random model with towers, and the same in gemloupe."""
    reference = tiny_models.make_tiny(variant, towers="audio", media_ids=True, dtype=dtype)
    folder = Path(tempfile.mkdtemp())
    tiny_models.save_tiny(reference, folder)
    tiny_models.save_tiny_tokenizer(folder)
    return reference, gl.load(folder, dtype="auto" if dtype != "float32" else "float32")


def assert_close(got: Any, expected: np.ndarray, name: str = "") -> None:
    got = np.asarray(got)
    assert got.shape == expected.shape, name
    bound = TOLERANCE * max(1.0, float(np.abs(expected).max(initial=0.0)))
    np.testing.assert_allclose(got, expected, rtol=0, atol=bound, err_msg=name)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("variant", ("e2b", "12b"))
def test_soft_tokens_of_any_length_are_those_of_transformers(variant: str, length: int) -> None:
    reference, model = models(variant)
    clip = sound(length, length)

    tokens = model.encode_audio(clip)

    assert_close(tokens, audio_tokens(reference, [clip])[0])


def test_thirty_seconds_are_750_tokens_and_more_is_cut_as_transformers_cuts_it() -> None:
    reference, model = models("e2b")
    clip = sound(30 * 16_000 + 12_345)

    with pytest.warns(UserWarning, match=r"30\.77 s long.* 30 s, and the last 0\.77"):
        tokens = model.encode_audio(clip)

    assert tokens.shape == (750, model.config.text.hidden_size)
    assert_close(tokens, audio_tokens(reference, [clip])[0])


@pytest.mark.parametrize("variant", ("e2b", "12b"))
def test_clips_that_transformers_pads_in_a_batch_have_the_same_tokens(variant: str) -> None:
    reference, model = models(variant)
    clips = [sound(4000, 1), sound(16_001, 2), sound(9999, 3)]

    expected = audio_tokens(reference, clips)

    for clip, tokens in zip(clips, expected, strict=True):
        assert_close(model.encode_audio(clip), tokens)


def test_bfloat16_weights_give_the_tokens_of_the_same_weights_in_float32() -> None:
    reference, model = models("e4b", "bfloat16")
    clip = sound(20_000)

    tokens = model.encode_audio(clip)

    expected = audio_tokens(reference, [clip])[0]
    # Long products may round activations to bfloat16, too: eight bits, some dozen products deep.
    error = np.abs(np.asarray(tokens) - expected).max() / np.abs(expected).max()
    assert error < 0.06, error


def test_an_invariant_model_streams_the_very_bits_of_the_whole(tmp_path: Path) -> None:
    reference, _ = models("e2b")
    tiny_models.save_tiny(reference, tmp_path)
    model = gl.load(tmp_path, dtype="float32", invariant=True)
    clip = sound(31_234)

    stream = model.audio_stream()
    parts = [stream.push(clip[i : i + 3333]) for i in range(0, len(clip), 3333)]
    parts.append(stream.finish())

    np.testing.assert_array_equal(np.concatenate(parts), model.encode_audio(clip))


@contextlib.contextmanager
def recording(reference: nn.Module) -> Iterator[dict[str, np.ndarray]]:
    """Values of one clip at the modules that the table of hook points names, in transformers."""
    values: dict[str, np.ndarray] = {}
    handles = []
    points = hooks.hook_points(models("e2b")[1].audio_tower.config)

    def keep(name: str, value: Any) -> None:
        values[name] = value.detach()[0].clone().numpy()

    for name, point in points.items():
        path = point.transformers
        if not path:
            continue
        module = reference.model.get_submodule(path.removesuffix(".input"))
        if path.endswith(".input"):
            handles.append(
                module.register_forward_pre_hook(
                    lambda _m, args, kwargs, name=name: keep(
                        name, args[0] if args else next(iter(kwargs.values()))
                    ),
                    with_kwargs=True,
                )
            )
        else:
            handles.append(
                module.register_forward_hook(
                    lambda _m, _args, out, name=name: keep(
                        name, out[0] if isinstance(out, tuple) else out
                    )
                )
            )
    glu, softmax = nn.functional.glu, modeling_gemma4.F.softmax
    gated: list[torch.Tensor] = []
    patterns: list[torch.Tensor] = []

    def recorded_glu(*args: Any, **kwargs: Any) -> torch.Tensor:
        gated.append(glu(*args, **kwargs))
        return gated[-1]

    def recorded_softmax(*args: Any, **kwargs: Any) -> torch.Tensor:
        patterns.append((args[0].clone(), softmax(*args, **kwargs)))
        return patterns[-1][1]

    try:
        with (
            mock.patch.object(nn.functional, "glu", recorded_glu),
            mock.patch.object(modeling_gemma4.F, "softmax", recorded_softmax),
        ):
            yield values
    finally:
        for handle in handles:
            handle.remove()
    for layer, value in enumerate(gated):
        keep(f"audio.layers.{layer}.conv.gated", value)
    for layer, (scores, pattern) in enumerate(patterns):
        values[f"audio.layers.{layer}.attn.scores"] = _unblocked(scores[0], -np.inf)
        values[f"audio.layers.{layer}.attn.pattern"] = _unblocked(pattern[0], 0.0)


def _unblocked(blocks: torch.Tensor, nothing: float) -> np.ndarray:
    """[N, blocks, 12, 24] of the chunked attention as [N, T, T], what is masked as `nothing`."""
    heads, count, chunk, context = blocks.shape
    total = count * chunk
    whole = np.full((heads, total, total), nothing, np.float32)
    for block in range(count):
        for row in range(chunk):
            t = block * chunk + row
            for column in range(context):
                key = block * chunk - chunk + column
                if max(0, t - 11) <= key <= t:
                    whole[:, t, key] = blocks[:, block, row, column].numpy()
    return whole


def test_every_hook_point_of_the_tower_is_what_transformers_computes() -> None:
    reference, model = models("e2b")
    clip = sound(16_000)

    tokens = model.encode_audio(clip, capture="audio.*")

    features = audio_inputs(reference, [clip])
    with recording(reference) as values, torch.no_grad():
        reference.model.get_audio_features(
            features["input_features"], features["input_features_mask"]
        )
    captured = tokens.content.source.captured
    count = len(tokens)
    missing = []
    for name in captured:
        got = captured[name]
        if name not in values:
            missing.append(name.split(".", 3)[-1])
            continue
        expected = values[name]
        if name.endswith((".scores", ".pattern")):
            expected = expected[:, :count, :count]
        elif name == "audio.mel":
            expected = expected[: len(got)]
        else:
            expected = expected[:count].reshape(got.shape)
        finite = np.isfinite(expected)
        np.testing.assert_array_equal(np.isfinite(got), finite, err_msg=name)
        assert_close(np.where(finite, got, 0), np.where(finite, expected, 0), name)
    # Scaled queries and keys, which no module gives; scores and z prove them.
    assert sorted({*missing}) == ["attn.k", "attn.q"]


@pytest.mark.parametrize("variant", ("e2b", "e4b", "12b"))
def test_logits_of_prompts_with_sounds_are_those_of_transformers(variant: str) -> None:
    reference, model = models(variant)
    clips = [sound(5000, 1), sound(12_345, 2)]

    run = model.run("the <|audio|> in <|audio|>then", audio=clips, logits="all")

    features = audio_inputs(reference, clips)
    inputs = {"input_ids": torch.tensor(run.prompt.ids[None].astype(np.int64)), **features}
    kinds = (inputs["input_ids"] == model.config.audio_token_id).long() * 3
    if variant == "12b":
        inputs["mm_token_type_ids"] = kinds
    with torch.no_grad():
        expected = reference(**inputs).logits[0].numpy()
    assert run.logits is not None
    np.testing.assert_allclose(run.logits, expected, rtol=0, atol=TOLERANCE)
    assert (np.flatnonzero(kinds[0]) == run.prompt.positions("audio")).all()


def test_greedy_tokens_after_a_sound_are_those_of_transformers() -> None:
    reference, model = models("e2b")
    clip = sound(9000, 4)

    out = model.generate("say <|audio|>:", audio=clip, temperature=0, max_new_tokens=6, stop=())

    features = audio_inputs(reference, [clip])
    ids = torch.tensor(out.prompt.ids[None].astype(np.int64))
    with torch.no_grad():
        for _ in range(len(out.ids)):
            logits = reference(input_ids=ids, **features).logits[0, -1]
            ids = torch.cat([ids, logits.argmax().reshape(1, 1)], dim=1)
    assert ids[0, len(out.prompt.ids) :].tolist() == list(out.ids)
