"""Thoughts stay within their budget, are ended as models end them, and leave the history."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gemloupe as gl
from fake_session import EOS, FakeModel, tokenizer_folder
from gemloupe.chat_template import DEFAULT_PATH, ChatTemplate
from gemloupe.generation import generate
from gemloupe.output import Output

THINKS = "<|channel>thought\nabcdef\n<channel|>Four.<eos>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def edge() -> Any:
    return gl.load("demo:edge", "float32")


def _written(model: FakeModel, x: Any = "hi", **arguments: Any) -> str:
    out = generate(model, x, **arguments)
    assert isinstance(out, Output)
    return model.tokenizer.decode(out.ids, skip_special=False)


# The script goes on where the forced tokens end: they take the place of its own.
@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (0, "<|channel>thought\n<channel|>bcdef\n<channel|>Four.<eos>"),
        (1, "<|channel>thought\na\n<channel|>def\n<channel|>Four.<eos>"),
        (3, "<|channel>thought\nabc\n<channel|>f\n<channel|>Four.<eos>"),
        (6, "<|channel>thought\nabcdef\n<channel|>Four.<eos>"),
        (7, THINKS),
        (99, THINKS),
    ],
)
def test_a_thought_ends_at_its_budget(folder: Path, limit: int, expected: str) -> None:
    assert _written(FakeModel(folder, THINKS), max_thinking_tokens=limit) == expected


def test_a_thought_that_stands_at_a_new_line_needs_none(folder: Path) -> None:
    model = FakeModel(folder, "<|channel>thought\na\nb\nc<channel|>x<eos>")
    written = _written(model, max_thinking_tokens=4)
    assert written == "<|channel>thought\na\nb\n<channel|><channel|>x<eos>"


def test_several_thoughts_share_one_budget(folder: Path) -> None:
    script = "<|channel>thought\nab\n<channel|>x<|channel>thought\ncdefg<channel|>y<eos>"
    written = _written(FakeModel(folder, script), max_thinking_tokens=5)
    assert written == (
        "<|channel>thought\nab\n<channel|>x<|channel>thought\ncd\n<channel|>g<channel|>y<eos>"
    )
    used_up = _written(FakeModel(folder, script), max_thinking_tokens=3)
    assert used_up.startswith("<|channel>thought\nab\n<channel|>x<|channel>thought\n<channel|>defg")


def test_a_thought_without_its_first_line_ends_too(folder: Path) -> None:
    model = FakeModel(folder, "<|channel>" + "abcdefgh" * 3 + "<channel|>x<eos>")
    written = _written(model, max_thinking_tokens=2)
    assert written.startswith("<|channel>abcdefghab\n<channel|>")


def test_a_thought_that_the_prompt_opened_counts_from_there(folder: Path) -> None:
    model = FakeModel(folder, "abcdef<channel|>x<eos>")
    prompt = model.tokenizer.encode("<|turn>model\n<|channel>thought\n")
    assert _written(model, prompt, max_thinking_tokens=2) == "ab\n<channel|>ef<channel|>x<eos>"


def test_the_answer_itself_has_no_budget(folder: Path) -> None:
    model = FakeModel(folder, "a long answer<eos>")
    assert _written(model, max_thinking_tokens=0) == "a long answer<eos>"


def test_rows_of_a_batch_have_budgets_of_their_own(folder: Path) -> None:
    outs = generate(FakeModel(folder, THINKS, THINKS), ["x", "y"], max_thinking_tokens=[1, None])
    assert isinstance(outs, list) and [out.reasoning for out in outs] == ["a", "abcdef"]


def test_the_model_goes_on_after_a_forced_end(edge: Any) -> None:
    free = edge.chat("What is 27 + 45?", thinking=True, temperature=0)
    limit = 3
    out = edge.chat(
        "What is 27 + 45?", thinking=True, temperature=0, max_thinking_tokens=limit, logprobs=1
    )
    header = edge.tokenizer.encode("<|channel>thought\n", bos=False)
    count = len(header) + limit
    assert len(free.reasoning) > len(out.reasoning) > 0
    assert out.ids[:count].tolist() == free.ids[:count].tolist()
    closed = edge.tokenizer.encode("\n<channel|>", bos=False)
    assert out.ids[count : count + len(closed)].tolist() == closed
    # What follows is what the model says after these very ids.
    x = [*out.prompt.ids.tolist(), *out.ids[: count + len(closed)].tolist()]
    assert edge.generate(x, temperature=0).text == out.text
    # Log-probabilities are those of the model, not of the budget.
    run = edge.run([*out.prompt.ids.tolist(), *out.ids.tolist()[:-1]], logits="all")
    logits = run.logits[len(out.prompt) - 1 :].astype(np.float64)
    chosen = logits[np.arange(len(out.ids)), out.ids]
    expected = chosen - np.log(np.exp(logits).sum(1))
    assert [pair[0] for pair in out.logprobs] == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_budget_changes_nothing_where_it_is_not_reached(edge: Any) -> None:
    options = {"thinking": True, "seed": 5, "max_new_tokens": 80}
    free = edge.chat("What is 27 + 45?", **options)
    limited = edge.chat("What is 27 + 45?", max_thinking_tokens=1000, **options)
    assert limited.ids.tolist() == free.ids.tolist()


def test_history_keeps_thoughts_only_between_the_calls_of_one_turn() -> None:
    template = ChatTemplate({"default": DEFAULT_PATH.read_text("utf-8")}, {"bos_token": "<bos>"})
    call = {"id": "1", "function": {"name": "f", "arguments": {}}}
    thought = {"role": "assistant", "content": "", "reasoning_content": "why", "tool_calls": [call]}
    asked = [{"role": "user", "content": "x"}, thought, {"role": "tool", "name": "f", "content": 1}]
    assert "why" in template.render(asked)
    answered = [*asked, {"role": "assistant", "content": "<|channel>thought\nwhy<channel|>so"}]
    later = template.render([*answered, {"role": "user", "content": "y"}])
    assert "why" not in later and "so<turn|>" in later


def test_a_negative_budget_and_a_model_without_channels_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="max_thinking_tokens is -1; expected 0 or more"):
        generate(FakeModel(folder, [EOS]), [5], max_thinking_tokens=-1)
    model = FakeModel(folder, [EOS])
    model.tokenizer.id = lambda piece: None  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="the tokenizer lacks <|channel>"):
        generate(model, [5], max_thinking_tokens=1)
