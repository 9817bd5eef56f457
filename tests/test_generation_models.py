"""Generation on real weights: equal to transformers, alone or in a batch, stopped or continued."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import gemloupe as gl
from gemloupe.conversation import Conversation
from tiny_models import random_ids, save_tiny_tokenizer

pytestmark = pytest.mark.core  # repeated for every instruction set

RAGGED = [random_ids(n, seed=n) for n in (3, 40, 1, 17, 9, 5, 28, 12)]


@pytest.fixture(scope="module", params=["e2b", "26b"])
def pair(tiny: Callable, request: pytest.FixtureRequest) -> tuple[Any, gl.Model]:
    """(transformers' model, gemloupe's) of one checkpoint."""
    model, folder = tiny(request.param, text_only=True)
    save_tiny_tokenizer(folder)
    return model, gl.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def demo() -> gl.Model:
    return gl.load("demo:edge")


def _output(model: gl.Model, x: Any, **arguments: Any) -> gl.Output:
    out = model.generate(x, **arguments)
    assert isinstance(out, gl.Output)
    return out


def _theirs(model: Any, ids: list[int], **arguments: Any) -> list[int]:
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": 1, **arguments}
    with torch.no_grad():
        return model.generate(torch.tensor([ids]), **settings)[0, len(ids) :].tolist()


def test_greedy_tokens_equal_transformers(pair: tuple[Any, gl.Model]) -> None:
    ids = random_ids(20)
    out = _output(pair[1], ids, temperature=0, max_new_tokens=24)
    assert out.ids.tolist() == _theirs(pair[0], ids, max_new_tokens=24)


def test_penalty_and_suppressed_ids_equal_transformers(
    pair: tuple[Any, gl.Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, ours = pair
    ids = random_ids(20, seed=3)
    free = _output(ours, ids, temperature=0, max_new_tokens=16).ids
    suppressed = sorted({int(free[0]), int(free[5])})
    monkeypatch.setitem(ours.checkpoint.generation_config, "suppress_tokens", suppressed)
    out = _output(ours, ids, temperature=0, max_new_tokens=16, repetition_penalty=1.3)
    expected = _theirs(
        theirs, ids, max_new_tokens=16, repetition_penalty=1.3, suppress_tokens=suppressed
    )
    assert out.ids.tolist() == expected and not set(suppressed) & set(out.ids.tolist())


def test_logprobs_are_those_of_transformers(pair: tuple[Any, gl.Model]) -> None:
    theirs, ours = pair
    ids = random_ids(30)
    out = _output(ours, ids, max_new_tokens=5, seed=1, logprobs=3, prompt_logprobs=2, stop=())
    everything = [*ids, *out.ids.tolist()]
    with torch.no_grad():
        logits = theirs(torch.tensor([everything])).logits[0].double()
    expected = torch.log_softmax(logits, -1).numpy()
    assert out.prompt_logprobs is not None and out.prompt_logprobs[0] is None
    assert out.logprobs is not None and len(out.logprobs) == len(out.ids)
    reported = [*out.prompt_logprobs[1:], *out.logprobs]
    for position, entry in enumerate(reported):
        assert entry is not None
        chosen, top = entry
        row = expected[position]
        assert abs(chosen - row[everything[position + 1]]) < 1e-3
        best = np.sort(row)[::-1][: len(top)]
        np.testing.assert_allclose([value for _, value in top], best, atol=1e-3)
        np.testing.assert_allclose(row[[token for token, _ in top]], best, atol=1e-3)


def test_a_row_gives_the_same_tokens_alone_and_in_a_batch(pair: tuple[Any, gl.Model]) -> None:
    outs = pair[1].generate(RAGGED, seed=7, max_new_tokens=20, temperature=1.5)
    assert isinstance(outs, list)
    for ids, out in zip(RAGGED, outs, strict=True):
        alone = _output(pair[1], ids, seed=7, max_new_tokens=20, temperature=1.5)
        assert alone.ids.tolist() == out.ids.tolist()
        assert alone.finish_reason == out.finish_reason


def test_more_rows_than_a_pass_takes_all_end(pair: tuple[Any, gl.Model]) -> None:
    rows = [random_ids(5, seed=n) for n in range(19)]
    outs = pair[1].generate(rows, temperature=0, max_new_tokens=6)
    assert isinstance(outs, list)
    for ids, out in zip(rows, outs, strict=True):
        assert out.ids.tolist() == _theirs(pair[0], ids, max_new_tokens=6)


def test_different_seeds_give_different_texts(pair: tuple[Any, gl.Model]) -> None:
    texts = {
        tuple(_output(pair[1], [2, 9], seed=seed, max_new_tokens=20, temperature=2.0).ids.tolist())
        for seed in range(6)
    }
    assert len(texts) == 6


def test_pieces_join_to_what_the_call_gives(pair: tuple[Any, gl.Model]) -> None:
    arguments: dict[str, Any] = {"seed": 3, "max_new_tokens": 40, "temperature": 2.0}
    out = _output(pair[1], "the cat", **arguments)
    stream = pair[1].generate("the cat", stream=True, **arguments)
    assert isinstance(stream, gl.Stream)
    pieces = list(stream)
    assert "".join(piece.text for piece in pieces) == out.text
    assert [token for piece in pieces for token in piece.ids] == out.ids.tolist()


def test_generation_continues_on_a_cache(pair: tuple[Any, gl.Model]) -> None:
    ids = random_ids(30)
    whole = _output(pair[1], ids, temperature=0, max_new_tokens=12)
    first = _output(pair[1], ids, temperature=0, max_new_tokens=5)
    assert first.cache.tokens.tolist() == [*ids, *first.ids.tolist()[:-1]]
    rest = _output(pair[1], first.ids[-1:], cache=first.cache, temperature=0, max_new_tokens=12 - 5)
    assert rest.cache is first.cache
    assert [*first.ids.tolist(), *rest.ids.tolist()] == whole.ids.tolist()


def test_the_end_of_the_context_ends_the_row(tiny: Callable) -> None:
    _, folder = tiny("31b", text_only=True, max_position_embeddings=40)
    model = gl.load(folder)
    out = _output(model, random_ids(36), max_new_tokens=100, seed=1, temperature=2.0)
    # The last token is never read, so it needs no position.
    assert out.finish_reason in ("stop", "length") and len(out.ids) <= 5
    assert len(_output(model, random_ids(40), seed=1).ids) == 1
    with pytest.raises(ValueError, match="40"):
        model.generate(random_ids(41))


def test_two_threads_share_a_model(pair: tuple[Any, gl.Model]) -> None:
    prompts = RAGGED[1:3]
    expected = [_output(pair[1], x, seed=2, max_new_tokens=30).ids.tolist() for x in prompts]
    got: dict[int, list[int]] = {}

    def work(index: int) -> None:
        out = _output(pair[1], prompts[index], seed=2, max_new_tokens=30)
        got[index] = out.ids.tolist()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[0], got[1]] == expected


def _interrupt_soon() -> threading.Timer:
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    return timer


def test_ctrl_c_leaves_the_model_and_the_cache_usable(
    pair: tuple[Any, gl.Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pair[1]
    monkeypatch.setitem(model.checkpoint.generation_config, "eos_token_id", [])  # Never ends.
    cache = model.new_cache()
    before = _output(model, random_ids(9), cache=cache, temperature=0, max_new_tokens=3)
    held = cache.tokens.tolist()
    timer = _interrupt_soon()
    with pytest.raises(KeyboardInterrupt):
        model.generate([5], cache=cache, max_new_tokens=200_000)
    timer.join()
    assert cache.tokens.tolist() == held
    again = _output(model, random_ids(9), temperature=0, max_new_tokens=3)
    assert again.ids.tolist() == before.ids.tolist()


def test_a_closed_stream_keeps_what_was_computed(pair: tuple[Any, gl.Model]) -> None:
    with pair[1].generate([2, 9], stream=True, max_new_tokens=1000, temperature=0) as stream:
        first = next(stream)
    result = stream.result
    assert isinstance(result, gl.Output)
    assert result.ids.tolist() == list(first.ids) and result.finish_reason in ("cancelled", "stop")
    assert result.cache.tokens.tolist() == [2, 9]


def test_the_demo_model_chats(demo: gl.Model) -> None:
    out = demo.chat("What is 27 + 45?", temperature=0)
    assert isinstance(out, gl.Output)
    assert out.finish_reason == "stop" and out.text and out.ids[-1] in demo.config.eos_token_ids
    thought = demo.chat("What is 27 + 45?", temperature=0, thinking=True)
    assert isinstance(thought, gl.Output)
    shown = demo.tokenizer.decode(thought.ids, skip_special=False)
    assert shown.startswith("<|channel>thought\n") and thought.reasoning in shown
    assert thought.text and thought.text not in thought.reasoning


def test_stop_strings_on_a_real_model(demo: gl.Model) -> None:
    whole = demo.chat("What is 27 + 45?", temperature=0)
    assert isinstance(whole, gl.Output)
    stop = whole.text[2:4]
    out = demo.chat("What is 27 + 45?", temperature=0, stop=stop)
    assert isinstance(out, gl.Output)
    assert out.text == whole.text[: whole.text.index(stop)] and out.finish_reason == "stop"


@pytest.mark.parametrize("thinking", [False, True])
def test_a_conversation_says_what_reading_it_anew_says(
    demo: gl.Model, thinking: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    monkeypatch.setattr(gl.Model, "run", _counting(gl.Model.run, read))
    chat = Conversation(demo, "Be brief.", thinking, temperature=0, max_new_tokens=60)
    for text in ("What is 12 + 30?", "Copy: red green blue", "Sort: 3 1 2"):
        stream = chat.ask(text)
        out = stream.result
        assert isinstance(out, gl.Output)
        anew = _output(demo, chat.messages, thinking=thinking, temperature=0, max_new_tokens=60)
        assert out.ids.tolist() == anew.ids.tolist()
        chat.keep(stream)
    # Each turn reads what the last one said and the new message, never the beginning.
    assert read[1] < len(anew.prompt) / 2 and read[2] < len(anew.prompt) / 2


def _counting(run: Callable, counts: list[int]) -> Callable:
    def counted(model: gl.Model, x: Any, **arguments: Any) -> Any:
        counts.append(len(x))
        return run(model, x, **arguments)

    return counted
