"""Pieces join to the output, never split a character or a stop string, and can be stopped."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from fake_session import EOS, FakeModel, tokenizer_folder
from gemloupe.generation import generate
from gemloupe.output import Output
from gemloupe.stream import Piece, Stream


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))


def _stream(model: FakeModel, x: Any = "hi", **arguments: Any) -> Stream:
    stream = generate(model, x, stream=True, **arguments)
    assert isinstance(stream, Stream)
    return stream


def _joined(pieces: list[Piece], row: int = 0) -> tuple[str, str, list[int]]:
    mine = [piece for piece in pieces if piece.row == row]
    ids = [token for piece in mine for token in piece.ids]
    return "".join(p.text for p in mine), "".join(p.reasoning for p in mine), ids


def test_pieces_join_to_the_result(folder: Path) -> None:
    text = "<|channel>thought\n a €\n\n b \n<channel|>yes 🙂<|channel>x\nc<channel|> no<eos>"
    stream = _stream(FakeModel(folder, text), logprobs=1)
    pieces = list(stream)
    out = stream.result
    assert isinstance(out, Output)
    assert _joined(pieces) == (out.text, out.reasoning, out.ids.tolist())
    assert (out.text, out.reasoning) == ("yes 🙂 no", "a €\n\n b\nc")
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["stop"]
    assert [entry for piece in pieces for entry in piece.logprobs or []] == out.logprobs


def test_no_piece_has_part_of_a_character(folder: Path) -> None:
    pieces = list(_stream(FakeModel(folder, "é🙂€ ü<eos>")))
    assert _joined(pieces)[0] == "é🙂€ ü"
    assert not any("\ufffd" in piece.text for piece in pieces)


def test_the_end_releases_a_broken_character(folder: Path) -> None:
    model = FakeModel(folder)
    model.scripts = [[model.tokenizer.id("<0xF0>"), model.tokenizer.id("<0x9F>"), EOS]]
    stream = _stream(model)
    assert _joined(list(stream))[0] == "\ufffd\ufffd"
    assert isinstance(stream.result, Output) and stream.result.text == "\ufffd\ufffd"


def test_the_beginning_of_a_stop_string_is_held_back(folder: Path) -> None:
    pieces = list(_stream(FakeModel(folder, "a, b. STOPPED"), stop="STOP"))
    assert [piece.text for piece in pieces[-5:]] == [" ", "", "", "", ""]
    assert _joined(pieces)[0] == "a, b. " and pieces[-1].finish_reason == "stop"


def test_what_was_held_back_comes_when_no_stop_string_follows(folder: Path) -> None:
    stream = _stream(FakeModel(folder, "a STO<eos>"), stop=["STOP", "TOX"])
    assert _joined(list(stream))[0] == "a STO"


@pytest.mark.parametrize("seed", range(20))
def test_the_first_complete_stop_string_cuts(folder: Path, seed: int) -> None:
    generator = random.Random(seed)
    text = "".join(generator.choices("ab", k=40))
    stops = ["".join(generator.choices("ab", k=generator.randrange(2, 7))) for _ in range(2)]
    stream = _stream(FakeModel(folder, text + "<eos>"), stop=stops)
    shown = _joined(list(stream))[0]
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    read = text[: min(ends)] if ends else text
    begins = [read.find(stop) for stop in stops if stop in read]
    assert shown == (read[: min(begins)] if begins else read)
    assert isinstance(stream.result, Output) and stream.result.text == shown


def test_rows_of_a_batch_come_interleaved_and_apart(folder: Path) -> None:
    stream = _stream(FakeModel(folder, "abc<eos>", "de<eos>"), ["x", "y"])
    pieces = list(stream)
    assert (_joined(pieces, 0)[0], _joined(pieces, 1)[0]) == ("abc", "de")
    result = stream.result
    assert isinstance(result, list) and [out.text for out in result] == ["abc", "de"]


def test_close_ends_the_rows_and_keeps_what_came(folder: Path) -> None:
    model = FakeModel(folder, "abcdef", "abc<eos>")
    with _stream(model, ["x", "y"]) as stream:
        for piece in stream:
            if piece.text == "b":
                break
    assert model.session is not None and model.session.active == 0
    rest = list(stream)
    assert {piece.finish_reason for piece in rest if piece.row == 0} == {"cancelled"}
    result = stream.result
    assert isinstance(result, list)
    assert (result[0].text, result[0].finish_reason) == ("ab", "cancelled")


def test_result_generates_what_was_not_iterated_over(folder: Path) -> None:
    stream = _stream(FakeModel(folder, "abc<eos>"))
    first = next(stream)
    result = stream.result
    assert isinstance(result, Output) and result.text == "abc"
    assert _joined([first, *stream])[0] == "abc"


def test_ctrl_c_ends_the_rows_and_the_model_goes_on(folder: Path) -> None:
    model = FakeModel(folder, [7, 8, KeyboardInterrupt()])
    stream = _stream(model)
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    assert model.session is not None and model.session.active == 0
    result = stream.result
    assert isinstance(result, Output)
    assert (result.ids.tolist(), result.finish_reason) == ([7, 8], "cancelled")
    model.scripts = [[7, EOS]]
    again = generate(model, "hi")
    assert isinstance(again, Output) and again.finish_reason == "stop"
