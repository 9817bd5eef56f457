"""Looking into the audio tower and changing it; streams; what is refused."""

from __future__ import annotations

import base64
import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from safetensors.numpy import load_file, save_file

import gemloupe as gl
from gemloupe.media.mel import log_mel
from tiny_models import make_tiny, save_tiny, save_tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audio")
    save_tiny(make_tiny("e2b", towers="audio", media_ids=True), folder)
    return save_tiny_tokenizer(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> gl.Model:
    return gl.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def clip() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, 12_000).astype(np.float32)


def captured(tokens: Any) -> Any:
    return tokens.content.source.captured


def test_capturing_changes_no_bit(model: gl.Model, clip: np.ndarray) -> None:
    tokens = model.encode_audio(clip, capture="audio.*")

    np.testing.assert_array_equal(tokens, model.encode_audio(clip))
    np.testing.assert_array_equal(captured(tokens)["audio.soft_tokens"], tokens)


def test_edits_that_change_nothing_change_no_bit(model: gl.Model, clip: np.ndarray) -> None:
    plain = model.encode_audio(clip)

    for point in ("mel", "subsampled", "layers.*.ffn1.hidden", "layers.1.attn.q", "encoded"):
        edited = model.encode_audio(clip, edit={f"audio.{point}": lambda x: x})
        np.testing.assert_array_equal(edited, plain, err_msg=point)
    for point in ("layers.*.attn.scores", "layers.*.attn.pattern"):
        edited = model.encode_audio(clip, edit={f"audio.{point}": lambda x: x})
        np.testing.assert_allclose(edited, plain, atol=1e-5, err_msg=point)


def test_an_edit_is_what_later_computation_uses(model: gl.Model, clip: np.ndarray) -> None:
    edit = {"audio.layers.0.conv.out": gl.edits.zero()}

    tokens = model.encode_audio(clip, edit=edit, capture="audio.layers.0.*")

    values = captured(tokens)
    np.testing.assert_array_equal(
        values["audio.layers.0.resid_conv"], values["audio.layers.0.resid_mid"]
    )
    assert np.abs(tokens - model.encode_audio(clip)).max() > 0.01


def test_an_edited_pattern_gives_its_sum_of_values(model: gl.Model, clip: np.ndarray) -> None:
    def first_key_only(x: np.ndarray) -> np.ndarray:
        rows = np.arange(x.shape[1])
        x[:] = 0
        x[:, rows, rows] = 1
        return x

    tokens = model.encode_audio(
        clip,
        edit={"audio.layers.1.attn.pattern": first_key_only},
        capture=["audio.layers.1.attn.v", "audio.layers.1.attn.z"],
    )

    values = captured(tokens)
    np.testing.assert_array_equal(values["audio.layers.1.attn.z"], values["audio.layers.1.attn.v"])


def test_weight_beyond_the_window_is_refused(model: gl.Model, clip: np.ndarray) -> None:
    def look_back(x: np.ndarray) -> np.ndarray:
        x[0, 15, 2] = 1
        return x

    with pytest.raises(ValueError, match=r"query 15 got 1 for key 2, .*it sees \(4 to 15\)"):
        model.encode_audio(clip, edit={"audio.layers.0.attn.pattern": look_back})


def test_positions_are_those_of_soft_tokens(model: gl.Model, clip: np.ndarray) -> None:
    tokens = model.encode_audio(clip, capture={"audio.layers.2.resid_post": gl.at([0, -1])})
    whole = captured(model.encode_audio(clip, capture="audio.layers.2.resid_post"))

    got = captured(tokens)["audio.layers.2.resid_post"]

    np.testing.assert_array_equal(got, whole["audio.layers.2.resid_post"][[0, -1]])
    with pytest.raises(ValueError, match="positions 'user' are those of a prompt"):
        model.encode_audio(clip, capture={"audio.encoded": gl.at("user")})


def test_a_sound_knows_the_times_and_frames_of_its_tokens(
    model: gl.Model, clip: np.ndarray
) -> None:
    tokens = model.encode_audio(clip, capture="audio.mel")

    sound = tokens.content.source
    assert len(sound.times) == len(sound.frames) == len(tokens)
    np.testing.assert_allclose(sound.times[3], [0.12, 0.16])
    assert sound.frames[0].tolist() == [0, 3]
    assert sound.frames[-1][1] == len(sound.features) - 1
    np.testing.assert_array_equal(sound.captured["audio.mel"], sound.features)


def test_prompts_with_sounds_travel_between_processes(model: gl.Model, clip: np.ndarray) -> None:
    prompt = model.prepare("<|audio|>", audio=clip)

    copy = pickle.loads(pickle.dumps(prompt))

    medium = copy.media[0]
    np.testing.assert_array_equal(medium.soft_tokens, model.encode_audio(clip))
    np.testing.assert_array_equal(medium.content.source.features, log_mel(clip))


def test_an_encoder_free_model_shows_samples_and_soft_tokens(tmp_path: Path) -> None:
    save_tiny(make_tiny("12b", towers="audio", media_ids=True), tmp_path)
    model = gl.load(tmp_path, dtype="float32")
    sound = np.arange(50, dtype=np.float32) / 50

    tokens = model.encode_audio(sound, capture="audio.*")

    assert sorted(captured(tokens)) == ["audio.mel", "audio.soft_tokens"]
    samples = captured(tokens)["audio.mel"]
    np.testing.assert_array_equal(samples.ravel(), np.pad(sound, (0, 10)))
    assert {"audio.mel", "audio.soft_tokens"} == {
        name for name in gl.hook_points(model) if name.startswith("audio.")
    }


def test_edited_soft_tokens_are_what_the_text_model_reads(
    model: gl.Model, clip: np.ndarray
) -> None:
    edit = {"audio.layers.1.ffn2.out": gl.edits.scale(0.5)}
    tokens = model.encode_audio(clip, edit=edit)

    run = model.run("the <|audio|>", audio=tokens, capture="embed")

    np.testing.assert_array_equal(run["embed"][run.prompt.positions("audio")], tokens)
    assert run.media[0].content.source.times.shape == (len(tokens), 2)


def test_a_run_looks_into_the_tower_and_changes_it(model: gl.Model, clip: np.ndarray) -> None:
    edit = {"audio.layers.1.ffn2.out": gl.edits.scale(0.5)}
    points = ["audio.layers.1.attn.pattern", "audio.soft_tokens", "embed"]

    run = model.run("the <|audio|>", audio=clip, edit=edit, capture=points)

    tokens = model.encode_audio(clip, edit=edit, capture=points[:2])
    np.testing.assert_array_equal(run["audio.soft_tokens"], tokens)
    np.testing.assert_array_equal(run[points[0]], captured(tokens)[points[0]])
    np.testing.assert_array_equal(run["embed"][run.prompt.positions("audio")], tokens)


def test_several_sounds_give_a_capture_each(model: gl.Model, clip: np.ndarray) -> None:
    run = model.run("<|audio|><|audio|>", audio=[clip, clip[:5000]], capture="audio.encoded")

    assert [len(value) for value in run["audio.encoded"]] == [19, 8]


def test_a_run_without_a_sound_has_no_tower(model: gl.Model, clip: np.ndarray) -> None:
    with pytest.raises(ValueError, match="points of the audio tower, but there is no sound"):
        model.run("the", capture="audio.encoded")
    tokens = np.asarray(model.encode_audio(clip))
    with pytest.raises(ValueError, match="soft tokens of an unknown sound"):
        model.run("<|audio|>", audio=tokens, capture="audio.encoded")
    kept = model.run("<|audio|>", audio=clip, keep=True)
    with pytest.raises(ValueError, match="a repeated run encodes no image and no sound"):
        model.run(kept, capture="audio.encoded")


def test_hook_points_of_the_tower_are_listed(model: gl.Model) -> None:
    points = gl.hook_points(model)

    assert points["audio.layers.2.attn.pattern"].shape == "[N, T, S]"
    assert points["audio.soft_tokens"].transformers == "embed_audio"


def test_a_misspelt_point_gets_close_matches(model: gl.Model, clip: np.ndarray) -> None:
    with pytest.raises(KeyError, match=r"audio\.layers\.0\.ffn1\.out"):
        model.encode_audio(clip, capture="audio.layers.0.ffn1.outt")


@pytest.mark.parametrize("step", (1, 160, 999, 6400))
def test_streamed_tokens_are_those_of_the_whole(
    model: gl.Model, clip: np.ndarray, step: int
) -> None:
    clip = clip[:4000] if step == 1 else clip
    stream = model.audio_stream()

    parts = [stream.push(clip[i : i + step]) for i in range(0, len(clip), step)]
    rest = stream.finish()

    whole = model.encode_audio(clip)
    tokens = np.concatenate([*parts, rest])
    np.testing.assert_allclose(tokens, whole, rtol=0, atol=2e-5)
    assert stream.num_tokens == len(whole)
    assert len(rest) <= 1
    assert len(stream.finish()) == 0


def test_streams_resample(model: gl.Model) -> None:
    sound = np.random.default_rng(1).normal(0, 0.1, 22_050).astype(np.float32)
    stream = model.audio_stream(sampling_rate=22_050)

    parts = [stream.push(sound[i : i + 5000]) for i in range(0, len(sound), 5000)]

    tokens = np.concatenate([*parts, stream.finish()])
    np.testing.assert_allclose(tokens, model.encode_audio(sound, 22_050), rtol=0, atol=2e-5)


def test_a_stream_refuses_what_it_cannot_read_and_goes_on(
    model: gl.Model, clip: np.ndarray
) -> None:
    stream = model.audio_stream()
    first = stream.push(clip[:5000])

    with pytest.raises(ValueError, match="audio has nan at sample 5001"):
        stream.push([0.0, np.nan])
    with pytest.raises(ValueError, match="would have 31.31 s of sound; the model reads 30 s"):
        stream.push(np.zeros(31 * 16_000 - 1))

    rest = np.concatenate([stream.push(clip[5000:]), stream.finish()])
    np.testing.assert_allclose(
        np.concatenate([first, rest]), model.encode_audio(clip), rtol=0, atol=2e-5
    )
    with pytest.raises(ValueError, match="this stream has ended"):
        stream.push(clip)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (np.zeros(160, np.float32), "has 160 samples at 16 kHz; expected at least 161"),
        (np.zeros(0), "the sound is empty"),
        (np.full(1000, np.nan), "has nan at sample 0"),
    ],
)
def test_sounds_without_a_soft_token_are_refused(
    model: gl.Model, source: np.ndarray, problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        model.encode_audio(source)
    with pytest.raises(ValueError, match=r"audio\[0\]: .*" + problem):
        model.run("<|audio|>", audio=[source])


def test_a_prompt_takes_an_array_with_its_rate(model: gl.Model, clip: np.ndarray) -> None:
    for audio in ([(clip, 8000)], (clip, 8000)):
        run = model.run("<|audio|>", audio=audio)

        np.testing.assert_array_equal(run.media[0].soft_tokens, model.encode_audio(clip, 8000))


def test_parts_of_a_chat_bring_sounds_as_openais_do(model: gl.Model) -> None:
    samples = np.random.default_rng(2).integers(-3000, 3000, 4000).astype(np.int16)
    file = io.BytesIO()
    soundfile.write(file, samples, 16_000, format="WAV")
    data = base64.b64encode(file.getvalue()).decode()
    parts = [
        {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}},
        {"type": "audio", "audio": samples},
        {"type": "audio"},
    ]

    prompt = model.prepare([{"role": "user", "content": parts}], audio=file.getvalue())

    for medium in prompt.media:
        np.testing.assert_array_equal(medium.soft_tokens, model.encode_audio(samples))
    assert len(prompt.media) == 3


def test_silence_is_a_sound(model: gl.Model) -> None:
    tokens = model.encode_audio(np.zeros(8000, np.float32))

    assert tokens.shape[0] == 13
    assert np.isfinite(tokens).all()


def rewritten(folder: Path, target: Path, change: dict[str, object]) -> Path:
    """A copy of a checkpoint whose audio_config has other values."""
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((target / "config.json").read_text())
    config["audio_config"] |= change
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("hidden_act", "relu", "audio_config.hidden_act is 'relu'; expected 'silu'"),
        ("attention_context_right", 2, "attention_context_right is 2; expected 0"),
        ("attention_chunk_size", 7, "attention_chunk_size is 7; expected 12"),
        ("num_attention_heads", 5, "num_attention_heads is 5; expected a divisor"),
        ("subsampling_conv_channels", [64, 32], "channels is .64, 32., but .* 128 mel bands"),
        ("hidden_size", 48, "has shape .36.* expected .48"),
        ("num_hidden_layers", 9, r"layers\.3\..* is missing|no tensor"),
        ("conv_kernel_size", "5", "conv_kernel_size is '5'; expected an integer"),
    ],
)
def test_configs_that_do_not_fit_are_refused_when_the_tower_is_used(
    folder: Path, tmp_path: Path, name: str, value: object, problem: str
) -> None:
    model = gl.load(rewritten(folder, tmp_path, {name: value}))

    with pytest.raises((ValueError, FileNotFoundError), match=problem):
        model.encode_audio(np.zeros(1000, np.float32))


def test_a_bound_that_is_no_number_is_refused(folder: Path, tmp_path: Path) -> None:
    rewritten(folder, tmp_path, {})
    [path] = tmp_path.glob("*.safetensors")
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("q_proj.input_max"))
    tensors[name] = np.full_like(tensors[name], np.nan)
    save_file(tensors, path)

    with pytest.raises(ValueError, match="input_max is nan, expected a bound"):
        gl.load(tmp_path).encode_audio(np.zeros(1000, np.float32))


def test_a_packed_checkpoint_keeps_its_ears(folder: Path, tmp_path: Path, clip: np.ndarray) -> None:
    packed = gl.convert(folder, tmp_path / "packed", dtype="int8")

    tokens = gl.load(packed).encode_audio(clip)

    np.testing.assert_allclose(tokens, gl.load(folder).encode_audio(clip), rtol=0, atol=1e-5)
