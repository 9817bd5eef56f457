"""From arguments to the session and from its tokens to outputs; the session is scripted."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fake_session import EOS, VOCAB_SIZE, FakeCache, FakeModel, tokenizer_folder
from gemloupe.generation import chat, generate
from gemloupe.output import Output

THINKS = "<|channel>thought\nWell,\n so. \n<channel|>Four.<turn|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))


def _generate(model: FakeModel, x: Any = "hi", **arguments: Any) -> Output:
    out = generate(model, x, **arguments)
    assert isinstance(out, Output)
    return out


def _sampling(model: FakeModel, **arguments: Any) -> Any:
    generate(model, [5], **arguments)
    return model.requests[0].sampling


def test_text_ids_and_reason_come_out(folder: Path) -> None:
    model = FakeModel(folder, [*FakeModel(folder, "hello 🙂").scripts[0], EOS])
    out = _generate(model, "say")
    assert (str(out), out.text, out.finish_reason) == ("hello 🙂", "hello 🙂", "stop")
    assert out.ids[-1] == EOS and out.ids.dtype == np.int32 and not out.ids.flags.writeable
    assert out.prompt.text == "<bos>say"
    assert (out.reasoning, out.tool_calls, out.logprobs, out.routing) == ("", [], None, None)
    assert "say" not in repr(out) and "hello" in repr(out) and "finish_reason  stop" in repr(out)


def test_max_new_tokens_ends_with_length(folder: Path) -> None:
    out = _generate(FakeModel(folder, "hello"), max_new_tokens=2)
    assert (out.text, out.finish_reason, len(out.ids)) == ("hel", "length", 2)


def test_thoughts_go_to_reasoning(folder: Path) -> None:
    model = FakeModel(folder, THINKS, eos_token_id=[EOS])
    out = _generate(model, [5], stop=model.tokenizer.id("<turn|>"))
    assert (out.reasoning, out.text, out.finish_reason) == ("Well,\n so.", "Four.", "stop")


def test_a_thought_that_the_prompt_opened_goes_on(folder: Path) -> None:
    model = FakeModel(folder, "So<channel|>Four.")
    prompt = model.tokenizer.encode("<|turn>model\n<|channel>thought\n")
    out = _generate(model, prompt, max_new_tokens=len(model.scripts[0]))
    assert (out.reasoning, out.text) == ("So", "Four.")
    closed = model.tokenizer.encode("<|channel>thought\n<channel|>")
    assert _generate(FakeModel(folder, "So"), closed, max_new_tokens=2).text == "So"


def test_chat_wraps_a_message_in_the_template(folder: Path) -> None:
    model = FakeModel(folder, [EOS])
    out = chat(model, "Hi", thinking=True)
    assert isinstance(out, Output)
    assert out.prompt.text == (
        "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nHi<turn|>\n<|turn>model\n"
    )


def test_ids_need_no_tokenizer(tmp_path: Path) -> None:
    out = _generate(FakeModel(tmp_path, [7, EOS]), [5, 6])
    assert out.ids.tolist() == [7, EOS] and "[7, 1]" in repr(out)
    with pytest.raises(FileNotFoundError, match="pass token ids"):
        print(out)


def test_a_batch_gives_each_row_its_own_arguments(folder: Path) -> None:
    model = FakeModel(folder, "aaaa", "bbbb")
    arguments = {"max_new_tokens": [1, 3], "temperature": [0, None], "seed": [1, 2]}
    outs = generate(model, ["x", [5]], **arguments)
    assert isinstance(outs, list) and [out.text for out in outs] == ["a", "bbb"]
    sampled = [request.sampling for request in model.requests]
    assert [(row.temperature, row.seed) for row in sampled] == [(0.0, 1), (1.0, 2)]


def test_stop_of_each_row_in_a_batch(folder: Path) -> None:
    model = FakeModel(folder, "abcd", "abcd")
    outs = generate(model, ["x", "y"], max_new_tokens=4, stop=[["b"], ["d", "c"]])
    assert isinstance(outs, list)
    assert [(out.text, out.finish_reason) for out in outs] == [("a", "stop"), ("ab", "stop")]
    assert model.session is not None and model.session.active == 0


def test_stop_strings_cut_the_text_and_ids_keep_what_was_read(folder: Path) -> None:
    model = FakeModel(folder, "one END two")
    out = _generate(model, stop="END")
    assert (out.text, out.finish_reason) == ("one ", "stop")
    assert model.tokenizer.decode(out.ids) == "one END"


def test_stop_strings_are_not_looked_for_in_thoughts(folder: Path) -> None:
    model = FakeModel(folder, "<|channel>thought\nstop<channel|>a stop", eos_token_id=EOS)
    out = _generate(model, [5], stop="stop")
    assert (out.reasoning, out.text) == ("stop", "a ")


def test_stop_ids_join_the_end_ids_of_generation_config(folder: Path) -> None:
    model = FakeModel(folder, [7], eos_token_id=[1, 106, 9999])
    _generate(model, [5], stop=[7, 8])
    assert model.requests[0].stop_ids == [1, 106, 7, 8]
    plain = FakeModel(folder, [EOS])
    _generate(plain, [5])
    assert plain.requests[0].stop_ids == [EOS]


def test_sampling_comes_from_arguments_then_file_then_defaults(folder: Path) -> None:
    model = FakeModel(folder, [EOS])
    default = _sampling(model)
    assert (default.temperature, default.top_p, default.top_k) == (1.0, 0.95, 64)
    assert (default.min_p, default.repetition_penalty, default.suppress) == (0.0, 1.0, [])
    tuned = FakeModel(folder, [EOS], temperature=0.7, top_p=0.5, top_k=9, suppress_tokens=[8, 9999])
    sampling = _sampling(tuned, top_k=3, seed=11)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.7, 0.5, 3)
    assert (sampling.seed, sampling.suppress) == (11, [8])


def test_do_sample_false_is_greedy_unless_the_caller_samples(folder: Path) -> None:
    model = FakeModel(folder, [EOS], do_sample=False)
    assert _sampling(model).temperature == 0.0
    assert _sampling(model, seed=3).temperature == 0.0
    assert _sampling(model, top_k=3).temperature == 1.0
    assert _sampling(FakeModel(folder, [EOS], do_sample=True), temperature=0).temperature == 0.0


def test_without_a_seed_one_is_drawn_and_reported(folder: Path) -> None:
    model = FakeModel(folder, [EOS], [EOS])
    outs = generate(model, [[5], [5]])
    assert isinstance(outs, list) and outs[0].seed != outs[1].seed
    assert [request.sampling.seed for request in model.requests] == [out.seed for out in outs]
    same = generate(model, [[5], [5]], seed=4)
    assert isinstance(same, list) and [out.seed for out in same] == [4, 4]


def test_logprobs_of_new_and_prompt_tokens(folder: Path) -> None:
    model = FakeModel(folder, [7, EOS])
    out = _generate(model, [5, 6, 7], logprobs=2, prompt_logprobs=1)
    assert out.logprobs == [(-0.5, [(7, -0.5)] * 2), (-0.5, [(EOS, -0.5)] * 2)]
    assert out.prompt_logprobs == [None, (-0.5, [(7, -0.5)]), (-0.5, [(7, -0.5)])]
    _generate(model, [5])
    assert (model.requests[0].logprobs, model.requests[0].prompt_logprobs) == (-1, -1)


def test_a_cache_is_continued_without_a_second_bos(folder: Path) -> None:
    model = FakeModel(folder, "ab")
    cache = FakeCache([2, 5])
    out = _generate(model, "x", cache=cache, max_new_tokens=2)
    assert 2 not in out.prompt.ids and out.cache is cache
    assert cache.tokens == [2, 5, *out.prompt.ids, out.ids[0]]
    fresh = _generate(model, "x", cache=FakeCache(), max_new_tokens=1)
    assert fresh.prompt.ids[0] == 2


def test_if_the_call_raises_caches_are_as_before(folder: Path) -> None:
    caches = [FakeCache([2, 5]), FakeCache([2, 6, 7])]
    model = FakeModel(folder, [7, EOS], [7, 7, KeyboardInterrupt()])
    with pytest.raises(KeyboardInterrupt):
        generate(model, [[8], [9]], cache=caches)
    assert [cache.tokens for cache in caches] == [[2, 5], [2, 6, 7]]
    assert model.session is not None and model.session.active == 0


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_long_prompt_shows_a_bar_on_a_terminal(
    folder: Path,
    is_terminal: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal)
    _generate(FakeModel(folder, [EOS]), [5] * 2100)
    assert ("reading the prompt" in capsys.readouterr().err) == is_terminal


@pytest.mark.parametrize(("value", "expected"), [("config", None), (None, 0.0), (20, 20.0)])
def test_softcap_reaches_the_session(folder: Path, value: Any, expected: float | None) -> None:
    model = FakeModel(folder, [EOS])
    _generate(model, [5], softcap=value)
    assert model.requests[0].softcap == expected


def test_timings_count_tokens(folder: Path) -> None:
    out = _generate(FakeModel(folder, "abc"), [5] * 9, max_new_tokens=3)
    times = out.timings
    assert (times.prefill_tokens, times.decode_tokens) == (9, 2)
    assert 0 < times.prefill_seconds <= times.time_to_first_token
    assert times.tokens_per_second == times.decode_tokens / times.decode_seconds


@pytest.mark.parametrize(
    ("arguments", "error", "expected"),
    [
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens is 0; expected 1 or more"),
        ({"max_new_tokens": 2.5}, TypeError, "max_new_tokens must be an int, got 2.5"),
        ({"temperature": -1}, ValueError, "temperature is -1; expected 0 .greedy. or more"),
        ({"temperature": float("nan")}, ValueError, "temperature is nan"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number, got 'hot'"),
        ({"temperature": [1, 1]}, TypeError, "temperature is a list.* x is a single prompt"),
        ({"top_p": 0}, ValueError, "top_p is 0; expected above 0 and at most 1"),
        ({"top_k": -1}, ValueError, "top_k is -1; expected 0 or more"),
        ({"min_p": 1.5}, ValueError, "min_p is 1.5; expected from 0 to 1"),
        ({"repetition_penalty": 0}, ValueError, "repetition_penalty is 0"),
        ({"seed": -1}, ValueError, "seed is -1; expected from 0 to"),
        ({"stop": ""}, ValueError, "stop has an empty string"),
        ({"stop": [1.5]}, TypeError, "stop must be a str or an int, got 1.5"),
        ({"stop": [VOCAB_SIZE]}, ValueError, "stop is 480; expected from 0 to 479"),
        ({"logprobs": True}, TypeError, "logprobs must be an int, got True"),
        ({"softcap": -3}, ValueError, 'softcap is -3; expected "config", None, or a number'),
        ({"cache": [None]}, TypeError, "cache is a list, but x is a single prompt"),
        (
            {"images": ["a.png"]},
            ValueError,
            r"images.0. is a str, but this model does not read image",
        ),
        ({"adapter": "a"}, KeyError, "no adapter 'a'"),
        (
            {"routing": "some"},
            ValueError,
            "routing is .some.; expected .full. or .experts., or False",
        ),
    ],
)
def test_wrong_arguments_say_what_was_expected(
    folder: Path, arguments: dict[str, Any], error: type[Exception], expected: str
) -> None:
    with pytest.raises(error, match=expected):
        generate(FakeModel(folder, [EOS]), [5], **arguments)


def test_wrong_arguments_of_a_batch(folder: Path) -> None:
    model = FakeModel(folder, [EOS], [EOS])
    cache = FakeCache([2])
    with pytest.raises(ValueError, match="temperature has 3 values for 2 rows"):
        generate(model, [[5], [6]], temperature=[1, 1, 1])
    with pytest.raises(ValueError, match="one cache can't serve 2 rows"):
        generate(model, [[5], [6]], cache=cache)
    with pytest.raises(ValueError, match="two rows share one cache"):
        generate(model, [[5], [6]], cache=[cache, cache])


def test_the_arguments_are_those_of_the_contract() -> None:
    names = set(inspect.signature(generate).parameters)
    assert names >= {
        "max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed",
        "stop", "logprobs", "prompt_logprobs", "adapter", "cache", "capture", "edit", "routing",
        "softcap", "thinking", "max_thinking_tokens", "tools", "max_tool_rounds",
        "response_format", "images", "audio", "videos", "drafter", "stream",
    }  # fmt: skip
