"""Guesses from the sequence itself: the same tokens, in fewer passes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import gemloupe as gl
from gemloupe import _core
from tiny_models import VARIANTS, random_ids


@pytest.fixture
def model(tiny, variant) -> gl.Model:
    return gl.load(tiny(variant)[1], dtype="float32")


def decode(model: gl.Model, ngram: int, allowed: set[int], **options: Any) -> tuple[Any, ...]:
    """(tokens, logprobs, cache, counts, steps) of a row that may choose only `allowed` ids."""
    session = _core.Session(model.core)
    request = _core.RowRequest()
    request.ids = options.get("ids", random_ids(23))
    request.max_new_tokens = 60
    request.sampling.temperature = options.get("temperature", 0.0)
    request.sampling.seed = options.get("seed", 7)
    request.sampling.suppress = [id for id in range(307) if id not in allowed]
    request.logprobs = 2
    request.lookup_ngram, request.draft_tokens = ngram, 7
    row = session.submit(request)
    tokens, logprobs, steps = [], [], 0
    while session.active:
        results = session.step()
        steps += 1
        tokens += [result.token for result in results]
        logprobs += [(result.logprobs.logprob, result.logprobs.top) for result in results]
    return tokens, logprobs, model.wrap_cache(session.cache(row)), session.drafts(row), steps


@pytest.mark.core  # repeated for every instruction set
@pytest.mark.parametrize("temperature", [0.0, 1.3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_looking_up_changes_no_token_and_no_bit(model: gl.Model, temperature: float) -> None:
    allowed = {40, 77, 5}
    found = decode(model, 3, allowed, temperature=temperature)
    plain = decode(model, 0, allowed, temperature=temperature)
    assert found[:2] == plain[:2]
    assert found[2].tokens.tolist() == plain[2].tokens.tolist()
    for mine, theirs in zip(found[2].layers, plain[2].layers, strict=True):
        assert np.array_equal(mine.keys, theirs.keys)
        assert np.array_equal(mine.values, theirs.values)
    passes, drafted, accepted = found[3]
    assert drafted >= passes > 0 and plain[3] == (0, 0, 0)
    assert len(found[0]) == found[4] + accepted
    assert found[4] < plain[4] == 60


@pytest.mark.parametrize("variant", ["e2b"])
def test_what_followed_the_last_earlier_place_is_guessed(model: gl.Model) -> None:
    only = {9}  # The row can say nothing else: guesses are right where 9 follows.
    right = decode(model, 2, only, ids=[2, *[9] * 20])
    assert right[4] < 15 and right[3][1] == right[3][2]
    wrong = decode(model, 2, only, ids=[2, 9, 9, 30, 9])  # Of [9, 9], 30 followed at first.
    assert wrong[0] == [9] * 60 and 0 < wrong[3][1] - wrong[3][2] <= 7


@pytest.mark.parametrize("variant", ["e2b", "26b"])
def test_generate_looks_up_in_prompts_caches_and_prefixes(model: gl.Model) -> None:
    phrase = random_ids(40)[1:]
    prompts = [[2, *phrase * n] for n in (3, 15)]
    arguments = {"max_new_tokens": 20, "temperature": 0, "logprobs": 2, "routing": False}
    plain = model.generate(prompts, **arguments)
    prefixes = model.prefix_cache()
    for drafter in ("prompt-lookup", gl.PromptLookup(ngram=2, max_tokens=3)):
        for _ in range(2):
            drafted = model.generate(prompts, drafter=drafter, prefix_cache=prefixes, **arguments)
            for mine, theirs in zip(drafted, plain, strict=True):
                assert mine.ids.tolist() == theirs.ids.tolist()
                assert mine.logprobs == theirs.logprobs
                assert mine.drafts.accepted <= mine.drafts.drafted and theirs.drafts is None
    assert prefixes.stats.hits > 0
    captured = [
        model.generate(prompts[0], capture=["layers.1.resid_post", "logits"], drafter=drafter,
                       **arguments).captured
        for drafter in (None, "prompt-lookup")
    ]  # fmt: skip
    for name in captured[0]:
        assert np.array_equal(captured[1][name], captured[0][name])


@pytest.mark.parametrize("variant", ["e2b"])
def test_rows_that_can_not_go_back_are_not_looked_up(model: gl.Model) -> None:
    arguments = {"max_new_tokens": 12, "temperature": 0, "drafter": "prompt-lookup"}
    for extra in (
        {"edit": {"layers.1.resid_post": gl.edits.scale(1.0)}},
        {"capture": "layers.0.attn.pattern"},
    ):
        assert model.generate([2, *[9] * 9], **arguments, **extra).drafts.drafted == 0


def test_numbers_out_of_range_are_refused() -> None:
    for wrong in ({"ngram": 1}, {"ngram": 17}, {"max_tokens": 0}, {"max_tokens": 8}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is .*; expected"):
            gl.PromptLookup(**wrong)
    with pytest.raises(TypeError, match="expected an int"):
        gl.PromptLookup(ngram=2.5)


def test_what_is_no_drafter_is_named(tiny: Any) -> None:
    model = gl.load(tiny("31b", text_only=True)[1], dtype="float32")
    for wrong in (5, gl.PromptLookup):
        with pytest.raises(TypeError, match="expected what load_drafter gave, a path or hub id"):
            model.generate([5, 6, 7], drafter=wrong)
