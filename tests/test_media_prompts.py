"""Where images and sounds stand in prompts: placeholders, message parts, counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gemloupe.config import parse_config
from gemloupe.media import Reader
from gemloupe.prompt import Prompt, prepare
from gemloupe.tokenizer import Tokenizer
from tiny_models import MEDIA_IDS, save_tiny_tokenizer

WIDTH = 6


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    text = {"vocab_size": 480, "hidden_size": WIDTH, "hidden_size_per_layer_input": 0}
    config = parse_config(
        {"model_type": "gemma4", "bos_token_id": 2, "text_config": text, **MEDIA_IDS}
    )
    return Tokenizer(save_tiny_tokenizer(tmp_path_factory.mktemp("t"), 480), config)


def _soft(length: int) -> np.ndarray:
    return np.full((length, WIDTH), length, np.float32)


def _prepared(tokenizer: Tokenizer, x: Any, **arguments: Any) -> Any:
    return prepare(x, tokenizer, tokenizer.config, reader=Reader(WIDTH), **arguments)


def test_placeholders_become_runs_of_soft_tokens_in_order(tokenizer: Tokenizer) -> None:
    text = "a <|image|> b <|audio|><|image|>"
    prompt = _prepared(tokenizer, text, images=[_soft(3), _soft(2)], audio=_soft(4))
    assert prompt.text == (
        "<bos>a <|image><|image|><|image|><|image|><image|> b "
        "<|audio><|audio|><|audio|><|audio|><|audio|><audio|><|image><|image|><|image|><image|>"
    )
    assert [(m.kind, m.index, len(m.positions)) for m in prompt.media] == [
        ("image", 0, 3), ("audio", 0, 4), ("image", 1, 2),
    ]  # fmt: skip
    for medium in prompt.media:
        assert prompt.positions(medium.kind, medium.index).tolist() == medium.positions.tolist()
        assert (medium.soft_tokens == len(medium.positions)).all()
        assert not medium.soft_tokens.flags.writeable


def test_parts_of_messages_take_the_contents_of_the_call_or_bring_their_own(
    tokenizer: Tokenizer,
) -> None:
    def chat(*parts: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [*parts, {"type": "text", "text": "what?"}]}]

    prompt = _prepared(
        tokenizer,
        chat({"type": "image"}, {"type": "image", "image": _soft(2)}, {"type": "image"}),
        images=[_soft(1), _soft(3)],
    )
    assert [len(medium.positions) for medium in prompt.media] == [1, 2, 3]
    assert "what?" in prompt.text
    with pytest.raises(ValueError, match="has 1 image parts .*, but images= has 2; pass as many"):
        _prepared(tokenizer, chat({"type": "image"}), images=[_soft(1), _soft(3)])
    with pytest.raises(ValueError, match=r"messages\[0\].content\[0\] is a part of type 'smell'"):
        _prepared(tokenizer, chat({"type": "smell"}))
    with pytest.raises(ValueError, match="0 audio parts"):
        _prepared(tokenizer, chat({"type": "image", "image": _soft(1)}), audio=_soft(2))


def test_ids_hold_runs_that_fit_the_contents(tokenizer: Tokenizer) -> None:
    ids = [2, 10, 12, 12, 11, 40, 10, 12, 11]
    prompt = _prepared(tokenizer, ids, images=[_soft(2), _soft(1)])
    assert [medium.positions.tolist() for medium in prompt.media] == [[2, 3], [7]]
    with pytest.raises(ValueError, match="1 blocks of 3 soft tokens, .* 2 runs of 2, 1 image"):
        _prepared(tokenizer, ids, images=_soft(3))
    assert _prepared(tokenizer, ids).media == ()  # taken as given


@pytest.mark.parametrize(
    ("x", "arguments", "expected"),
    [
        ("<|image|> a", {}, r"1 image placeholders \(<\|image\|>\), but images= has 0"),
        ("a", {"images": _soft(2)}, "0 image placeholders .*, but images= has 1"),
        ("<|image|>", {"images": [_soft(2)] * 2}, "1 image placeholders .* images= has 2"),
        ("<|image|>", {"audio": _soft(2)}, "images= has 0"),
        ("<|image|>", {"images": "cat.png"}, r"images\[0\] is a str, but this model does not read"),
        ("<|image|>", {"images": _soft(0)}, r"images\[0\] has no soft tokens"),
        ("<|image|>", {"images": _soft(2) * np.nan}, "holds NaN or infinity"),
        ("<|video|>", {"videos": [_soft(2)]}, "expected video, or what encode_video returned"),
        (["<|image|>", "b"], {"images": _soft(2)}, "images= is a ndarray, but the batch has 2"),
        (["<|image|>", "b"], {"images": [_soft(2)]}, "images= is 1 entries, but the batch has 2"),
    ],
)
def test_wrong_media_name_both_counts(
    tokenizer: Tokenizer, x: Any, arguments: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ValueError, match=expected):
        _prepared(tokenizer, x, **arguments)


def test_a_prepared_prompt_takes_no_more_media(tokenizer: Tokenizer) -> None:
    prompt = _prepared(tokenizer, "<|image|>", images=_soft(2))
    assert isinstance(prompt, Prompt) and _prepared(tokenizer, prompt) is prompt
    with pytest.raises(ValueError, match="x is prepared already"):
        _prepared(tokenizer, prompt, images=_soft(2))
