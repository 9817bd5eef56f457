"""What may be passed as `x`, and where things are in the resulting ids."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gemloupe.config import ModelConfig, parse_config
from gemloupe.prompt import Prompt, prepare
from gemloupe.tokenizer import Tokenizer
from snapshot_texts import assert_is_snapshot
from tiny_models import save_tiny_tokenizer

VOCAB_SIZE = 480
CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "one 🙂"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), VOCAB_SIZE)


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return parse_config(
        {
            "model_type": "gemma4",
            "bos_token_id": 2,
            "image_token_id": 60,
            "text_config": {"vocab_size": VOCAB_SIZE, "hidden_size_per_layer_input": 0},
        }
    )


@pytest.fixture
def tokenizer(folder: Path, config: ModelConfig) -> Tokenizer:
    return Tokenizer(folder, config)


def _prompt(x: Any, tokenizer: Tokenizer, **arguments: Any) -> Prompt:
    prompt = prepare(x, tokenizer, tokenizer.config, **arguments)
    assert isinstance(prompt, Prompt)
    return prompt


def _shown(prompt: Prompt, positions: np.ndarray) -> str:
    return prompt.tokenizer.decode(prompt.ids[positions], skip_special=False)


def test_text_ids_and_chats_become_prompts(tokenizer: Tokenizer) -> None:
    text = _prompt("the cat", tokenizer)
    assert (text.form, text.text, text.tokens[0]) == ("text", "<bos>the cat", "<bos>")
    assert text.ids.dtype == np.int32 and not text.ids.flags.writeable
    chat = _prompt(CHAT, tokenizer)
    assert chat.form == "chat" and chat.text.startswith("<bos><|turn>system\nbe kind<turn|>\n")
    assert _prompt(chat, tokenizer) is chat
    assert chat.media == ()


@pytest.mark.parametrize(
    "ids",
    [[5, 2, 7], (5, 2, 7), np.array([5, 2, 7], np.uint16), torch.tensor([5, 2, 7])],
    ids=["list", "tuple", "array", "torch"],
)
def test_ids_are_taken_as_given_and_load_nothing(tokenizer: Tokenizer, ids: Any) -> None:
    assert _prompt(ids, tokenizer).ids.tolist() == [5, 2, 7]
    assert not tokenizer.loaded


def test_a_batch_gives_a_list_of_what_each_row_gives_alone(tokenizer: Tokenizer) -> None:
    rows = ["the cat", CHAT, [5, 6], np.array([7]), _prompt("x", tokenizer)]
    prompts = prepare(rows, tokenizer, tokenizer.config)
    assert isinstance(prompts, list)
    alone = [_prompt(row, tokenizer).ids.tolist() for row in rows]
    assert [prompt.ids.tolist() for prompt in prompts] == alone
    two = prepare(np.array([[5, 6], [7, 8]]), tokenizer, tokenizer.config)
    assert isinstance(two, list) and two[1].ids.tolist() == [7, 8]


def test_bos_false_adds_none_to_text_and_chats(tokenizer: Tokenizer) -> None:
    assert 2 not in _prompt("a", tokenizer, bos=False).ids
    assert 2 not in _prompt(CHAT, tokenizer, bos=False).ids


def test_turns_are_found_by_role_and_index(tokenizer: Tokenizer) -> None:
    prompt = _prompt(CHAT, tokenizer)
    assert _shown(prompt, prompt.positions("system")) == "be kind"
    assert _shown(prompt, prompt.positions("user", 0)) == "one 🙂"
    assert _shown(prompt, prompt.positions("user", -1)) == "three"
    assert _shown(prompt, prompt.positions("user")) == "one 🙂three"
    assert _shown(prompt, prompt.positions("model", 0)) == "two"
    assert prompt.positions("audio").tolist() == []
    with pytest.raises(ValueError, match="index 2 is out of range: there are 2 user blocks"):
        prompt.positions("user", 2)
    with pytest.raises(ValueError, match=r"'usr' is not known.*Did you mean 'user'"):
        prompt.positions("usr")


def test_thoughts_tool_results_and_media_are_found(tokenizer: Tokenizer) -> None:
    text = "<|channel>thought\nwell<channel|>a<|tool_response>response:f{value:1}<tool_response|>"
    prompt = _prompt(tokenizer.encode(text), tokenizer)
    assert _shown(prompt, prompt.positions("thought")) == "well"
    assert _shown(prompt, prompt.positions("tool", 0)) == "response:f{value:1}"
    media = _prompt([2, 60, 60, 7, 60], tokenizer)
    assert media.positions("image").tolist() == [1, 2, 4]
    assert media.positions("image", 1).tolist() == [4]


def test_find_gives_the_tokens_that_a_text_touches(tokenizer: Tokenizer) -> None:
    prompt = _prompt("a €🙂 then the end", tokenizer)
    assert _shown(prompt, prompt.find("🙂")) == "🙂" and len(prompt.find("🙂")) == 4
    assert _shown(prompt, prompt.find("€")) == "€" and len(prompt.find("€")) == 3
    assert _shown(prompt, prompt.find("he", 1)) == " the"  # One token, touched.
    assert len(prompt.find("the")) == len(prompt.find("the", 0)) + len(prompt.find("the", 1))
    assert _shown(prompt, prompt.find("<bos>a")) == "<bos>a"
    with pytest.raises(ValueError, match=r"'Paris' does not occur .*print\(prompt.text\)"):
        prompt.find("Paris")


def test_find_works_beside_bytes_that_are_no_text(tokenizer: Tokenizer) -> None:
    broken = [tokenizer.id("<0xE2>"), tokenizer.id("<0x82>")]
    prompt = _prompt(
        [*tokenizer.encode("a"), *broken, *tokenizer.encode("cat", bos=False), *broken], tokenizer
    )
    assert _shown(prompt, prompt.find("cat")) == "cat"
    assert prompt.find("\ufffd", 3).tolist() == [len(prompt) - 1]


def test_a_str_given_to_a_chat_model_warns_once(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    tokenizer = Tokenizer(tmp_path)
    with pytest.warns(UserWarning) as caught:
        prepare(["a", "b"], tokenizer, None)
    assert_is_snapshot("prompt", "a str given to a chat model", str(caught[0].message))
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare("a", tokenizer, None)
        prepare("a", Tokenizer(folder), None)


@pytest.mark.parametrize(
    ("x", "error", "expected"),
    [
        ([], ValueError, "x is empty"),
        (["a", []], ValueError, r"x\[1\] is empty"),
        ([2, VOCAB_SIZE], ValueError, "id 480 at position 1; expected 0 to 479"),
        ([2, -1], ValueError, "id -1 at position 1"),
        ([2, 1.5], TypeError, r"x\[1\] is 1.5 \(float\)"),
        ([1.5], TypeError, r"x\[0\] is 1.5"),
        ([2, "a"], TypeError, r"x\[1\] is 'a' \(str\)"),
        ([2, True], TypeError, r"x\[1\] is True \(bool\)"),
        (np.zeros(3), TypeError, "dtype float64; expected integers"),
        (np.zeros((1, 1, 1), int), ValueError, "3 dimensions"),
        ({"role": "user", "content": "a"}, TypeError, r"one message; .* pass \[x\]"),
        (3.5, TypeError, "x must be a str, .* got float"),
        (None, TypeError, "got NoneType"),
        ([{"role": "king", "content": "a"}], ValueError, "the role 'king'"),
        (
            [{"role": "user", "content": [{"type": "image"}]}],
            ValueError,
            "has 1 image parts .*, but images= has 0",
        ),
    ],
)
def test_wrong_inputs_say_what_and_where(
    tokenizer: Tokenizer, x: Any, error: type[Exception], expected: str
) -> None:
    with pytest.raises(error, match=expected):
        prepare(x, tokenizer, tokenizer.config)


@pytest.mark.parametrize("x", ["text", [5, 6], ["text"]])
def test_thinking_and_tools_need_a_chat(tokenizer: Tokenizer, x: Any) -> None:
    with pytest.raises(ValueError, match="thinking=True needs a chat"):
        prepare(x, tokenizer, tokenizer.config, thinking=True)
    with pytest.raises(ValueError, match=r"tools= needs a chat.* use model.chat\(text\)"):
        prepare(x, tokenizer, tokenizer.config, tools=[{"name": "f"}])


WRONG = {
    "id out of vocabulary": [2, 480],
    "unknown role": [{"role": "king", "content": "a"}],
    "not a prompt": 3.5,
    "empty batch row": ["a", []],
    "one message": {"role": "user", "content": "a"},
    "picture": [{"role": "user", "content": [{"type": "image"}]}],
}


@pytest.mark.parametrize("name", WRONG)
def test_error_texts_end_with_what_to_do(tokenizer: Tokenizer, name: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        prepare(WRONG[name], tokenizer, tokenizer.config)
    assert_is_snapshot("prompt", name, str(caught.value))
