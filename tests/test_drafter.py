"""Decoding with a drafter: the same tokens, in fewer passes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import gemloupe as gl
from gemloupe import _core
from tiny_drafters import make_drafter, save_drafter
from tiny_models import VARIANTS, random_ids


@pytest.fixture
def pair(tiny, variant, tmp_path):
    """A model, and a drafter of it that always guesses id 0."""
    model = gl.load(tiny(variant)[1], dtype="float32")
    drafter = make_drafter(variant)
    drafter.model.embed_tokens.weight.zero_()
    return model, model.load_drafter(save_drafter(drafter, tmp_path / "drafter"), max_tokens=5)


def decode(model, drafter, allowed, *, new=40, temperature=0.0, prompt=23, logprobs=-1):
    """(tokens, logprobs, cache, counts) of a row that may choose only `allowed` ids."""
    session = _core.Session(model.core)
    request = _core.RowRequest()
    request.ids = random_ids(prompt)
    request.max_new_tokens = new
    request.sampling.temperature = temperature
    request.sampling.seed = 7
    request.sampling.suppress = [id for id in range(307) if id not in allowed]
    request.logprobs = logprobs
    if drafter is not None:
        request.drafter = drafter.core
        request.draft_tokens = drafter.max_tokens
    row = session.submit(request)
    tokens, chosen, passes = [], [], 0
    while session.active:
        results = session.step()
        passes += 1
        tokens += [result.token for result in results]
        chosen += [result.logprobs.logprob for result in results if result.logprobs]
    return tokens, chosen, model.wrap_cache(session.cache(row)), session.drafts(row), passes


@pytest.mark.parametrize("variant", VARIANTS)
def test_right_guesses_save_passes(pair):
    model, drafter = pair
    tokens, _, cache, (passes, drafted, accepted), steps = decode(model, drafter, {0})
    assert tokens == [0] * 40
    assert accepted == drafted == 40 - steps > 25
    assert passes == steps - 1  # the first pass reads the prompt
    plain = decode(model, None, {0})
    assert cache.tokens.tolist() == plain[2].tokens.tolist()
    for mine, theirs in zip(cache.layers, plain[2].layers, strict=True):
        np.testing.assert_array_equal(mine.positions, theirs.positions)
        np.testing.assert_array_equal(mine.keys, theirs.keys)
        np.testing.assert_array_equal(mine.values, theirs.values)


@pytest.mark.core  # repeated for every instruction set
@pytest.mark.parametrize("temperature", [0.0, 1.3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_guesses_change_no_token_and_no_bit(pair, temperature):
    model, drafter = pair
    allowed = {0, 40, 77}
    options = {"temperature": temperature, "new": 70, "logprobs": 0}
    tokens, logprobs, cache, (passes, drafted, accepted), steps = decode(
        model, drafter, allowed, **options
    )
    plain = decode(model, None, allowed, **options)
    assert (tokens, logprobs) == plain[:2]
    assert cache.tokens.tolist() == plain[2].tokens.tolist()
    if temperature:
        assert 0 < accepted < drafted
        assert steps < plain[4] == 70
    assert drafted >= passes > 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_generate_with_a_drafter_gives_the_same(pair):
    model, drafter = pair
    prompts = [random_ids(9), random_ids(30), random_ids(17)]
    plain = model.generate(prompts, max_new_tokens=30, temperature=0, logprobs=2)
    drafted = model.generate(prompts, max_new_tokens=30, temperature=0, logprobs=2, drafter=drafter)
    for mine, theirs in zip(drafted, plain, strict=True):
        assert mine.ids.tolist() == theirs.ids.tolist()
        assert mine.logprobs == theirs.logprobs
        assert mine.drafts.passes > 0
        assert theirs.drafts is None
        assert mine.timings.decode_tokens == theirs.timings.decode_tokens


@pytest.mark.parametrize("variant", ["e2b", "26b"])
def test_captures_hold_the_rows_that_stay(pair):
    model, drafter = pair
    names = ["layers.1.resid_post", "logits", "layers.0.attn.z"]
    arguments = {"max_new_tokens": 25, "temperature": 0, "capture": names}
    plain = model.generate(random_ids(13), **arguments)
    drafted = model.generate(random_ids(13), drafter=drafter, **arguments)
    assert drafted.drafts.drafted > drafted.drafts.accepted
    for name in names:
        np.testing.assert_array_equal(drafted.captured[name], plain.captured[name])
        np.testing.assert_array_equal(
            drafted.captured.positions_of(name), plain.captured.positions_of(name)
        )


@pytest.mark.parametrize("variant", ["e4b"])
def test_what_can_not_be_undone_goes_without_guesses(pair):
    model, drafter = pair
    arguments = {"max_new_tokens": 6, "temperature": 0, "drafter": drafter}
    for extra in (
        {"edit": {"layers.1.resid_post": gl.edits.scale(1.0)}},
        {"capture": "layers.0.attn.pattern"},
        {"stop": "never"} if model.tokenizer.exists else {"capture": "layers.0.attn.keys"},
    ):
        assert model.generate(random_ids(8), **arguments, **extra).drafts.drafted == 0


@pytest.mark.parametrize("variant", ["e2b"])
def test_bad_drafters_are_refused(pair, tiny, tmp_path):
    model, drafter = pair
    other = gl.load(tiny("31b")[1], dtype="float32")
    with pytest.raises(ValueError, match="was loaded for another model"):
        other.generate(random_ids(4), drafter=drafter, max_new_tokens=2)
    with pytest.raises(ValueError, match="backbone_hidden_size is 44, expected 52"):
        other.load_drafter(drafter.source)
    with pytest.raises(ValueError, match=r"model_type is 'gemma4_text'|model_type is 'gemma4'"):
        model.load_drafter(tiny("e2b")[1])
    with pytest.raises(ValueError, match="expected 1 to 7"):
        model.load_drafter(drafter.source, max_tokens=8)
    broken = make_drafter("e2b", clusters=307)
    broken.masked_embedding.token_ordering.copy_(torch.zeros(307, dtype=torch.long))
    with pytest.raises(ValueError, match="is no order of the ids"):
        model.load_drafter(save_drafter(broken, tmp_path / "broken"))
    folder = save_drafter(make_drafter("e2b"), tmp_path / "cut")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["head_dim"] = 14
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="shape"):
        model.load_drafter(folder)
