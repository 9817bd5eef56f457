"""Long speech is cut at silences, and each piece is asked for as the model card says."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile

import gemloupe as gl
from gemloupe.transcription import pieces, quiet_place
from tiny_models import make_tiny, save_tiny, save_tiny_tokenizer

RATE = 16_000


def speech(*parts: tuple[float, float]) -> np.ndarray:
    """Noise: (seconds, loudness) one after the other."""
    rng = np.random.default_rng(0)
    return np.concatenate(
        [rng.normal(0, loudness, round(seconds * RATE)) for seconds, loudness in parts]
    ).astype(np.float32)


class Listener:
    """A model that answers each call with the next text."""

    def __init__(self, *answers: str) -> None:
        self.answers = iter(answers)
        self.calls: list[tuple[str, int, dict[str, Any]]] = []
        ears = SimpleNamespace(num_tokens=lambda clip: len(clip) // 640)
        self.audio_tower = SimpleNamespace(ears=ears)

    def chat(self, prompt: str, *, audio: list[Any], **arguments: Any) -> Any:
        self.calls.append((prompt, len(audio[0]), arguments))
        return SimpleNamespace(text=next(self.answers), finish_reason="stop")


def test_a_piece_ends_in_the_middle_of_a_pause() -> None:
    sound = speech((12, 0.1), (0.6, 0.0), (12, 0.1), (0.5, 0.0), (14, 0.1))

    cut = list(pieces([sound]))

    assert len(cut) == 2
    assert abs(len(cut[0]) / RATE - 24.85) < 0.2
    np.testing.assert_array_equal(np.concatenate(cut), sound)


def test_pieces_do_not_depend_on_how_the_sound_comes() -> None:
    sound = speech((25, 0.1), (0.4, 0.001), (25, 0.1), (1, 0.0), (9, 0.1))

    whole = list(pieces([sound]))
    parts = list(pieces(sound[i : i + 7777] for i in range(0, len(sound), 7777)))

    assert [len(piece) for piece in whole] == [len(piece) for piece in parts]
    assert max(len(piece) for piece in whole) <= 30 * RATE


def test_a_pause_before_the_shortest_piece_is_not_taken() -> None:
    sound = speech((2, 0.1), (1, 0.0), (20, 0.1), (0.5, 0.01), (6.5, 0.1))

    assert quiet_place(sound, 10 * RATE) > 22 * RATE


def test_a_short_sound_is_one_piece() -> None:
    assert [len(piece) for piece in pieces([speech((3, 0.1))])] == [3 * RATE]


def test_no_sound_is_refused() -> None:
    with pytest.raises(ValueError, match="the sound is empty"):
        list(pieces([]))


def test_segments_have_the_times_of_their_pieces() -> None:
    sound = speech((20, 0.1), (1, 0.0), (15, 0.1))
    model = Listener("one two", "three")

    transcript = gl.transcribe(model, sound, language="English")  # type: ignore[arg-type]

    assert str(transcript) == transcript.text == "one two three"
    first, second = transcript.segments
    assert first.begin == 0
    assert first.end == second.begin
    assert abs(first.end - 20.5) < 0.3
    assert second.end == 36.0
    prompt, length, arguments = model.calls[0]
    assert prompt.startswith("Transcribe the following speech segment in English into English text")
    assert length == round(first.end * RATE)
    assert arguments == {"temperature": 0, "max_new_tokens": 512}


def test_silence_is_not_given_to_the_model() -> None:
    transcript = gl.transcribe(Listener(), np.zeros(40 * RATE, np.float32))  # type: ignore[arg-type]

    assert transcript.text == ""
    assert len(transcript.segments) == 2
    assert transcript.translation is None


def test_translations_stand_beside_what_was_said() -> None:
    model = Listener("Guten Tag.\nEnglish: Good day.")

    transcript = gl.transcribe(
        model,  # type: ignore[arg-type]
        speech((2, 0.1)),
        language="German",
        translate_to="English",
    )

    assert transcript.text == "Guten Tag."
    assert transcript.translation == "Good day."
    assert "then translate it into English" in model.calls[0][0]


@pytest.mark.parametrize("name", ("language", "translate_to"))
@pytest.mark.parametrize("value", ("", " ", 3))
def test_what_is_no_language_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} is .*; expected a language's name"):
        gl.transcribe(Listener(), np.zeros(10), **{name: value})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(make_tiny("e2b", towers="tiny", media_ids=True), folder)
    return save_tiny_tokenizer(folder)


def test_a_file_is_transcribed_by_a_real_model(folder: Path, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "speech.flac", speech((3, 0.1)), RATE)
    model = gl.load(folder)

    with pytest.warns(UserWarning, match="reached max_new_tokens"):
        transcript = gl.transcribe(model, tmp_path / "speech.flac", max_new_tokens=4)

    expected = model.chat(
        "Transcribe the following speech segment in its original language into the same language "
        "text. Follow these specific instructions for formatting the answer:\n"
        "* Only output the transcription, with no newlines.\n"
        "* When transcribing numbers, write the digits, i.e. write 1.7 and not one point seven, "
        "and write 3 instead of three.",
        audio=[tmp_path / "speech.flac"],
        temperature=0,
        max_new_tokens=4,
    )
    assert transcript.segments[0].text == " ".join(expected.text.split())
    assert transcript.segments[0].end == 3.0


def test_the_command_line_prints_a_transcript(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soundfile.write(tmp_path / "speech.wav", speech((1, 0.1)), RATE)
    command = ["transcribe", str(tmp_path / "speech.wav"), "--model", str(folder)]

    from gemloupe import cli

    assert cli.main([*command, "--max-new-tokens", "3"]) == 0
    plain = capsys.readouterr().out
    assert cli.main([*command, "--max-new-tokens", "3", "--times"]) == 0
    timed = capsys.readouterr().out

    assert timed.strip() == f"[0:00.0 - 0:01.0] {plain.strip()}".strip()


def test_a_model_without_ears_says_so(tmp_path: Path) -> None:
    save_tiny(make_tiny("31b", towers="tiny"), tmp_path)

    with pytest.raises(ValueError, match="has no audio part"):
        gl.transcribe(gl.load(tmp_path), np.zeros(RATE, np.float32))
