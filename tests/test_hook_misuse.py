"""Captures and edits as they must not be used: clear errors, and never a silent other meaning."""

from __future__ import annotations

import numpy as np
import pytest

import gemloupe as gl
from tiny_models import random_ids

RESID = "layers.1.resid_post"
Z = "layers.1.attn.z"
KEYS = "layers.1.attn.keys"
PATTERN = "layers.1.attn.pattern"
LOGITS = "layers.1.router.logits"
IDS = random_ids(10)


@pytest.fixture(scope="module")
def e2b(tiny):
    return gl.load(tiny("e2b")[1], dtype="float32")


@pytest.fixture(scope="module")
def moe(tiny):
    return gl.load(tiny("26b")[1], dtype="float32")


@pytest.fixture(scope="module")
def demo():
    return gl.load("demo:moe")


def test_every_row_of_a_batch_is_captured_where_the_names_come_from_an_iterator(e2b):
    runs = e2b.run([IDS, IDS[:4]], capture=(name for name in [RESID]))
    assert [run[RESID].shape[0] for run in runs] == [10, 4]
    with pytest.raises(TypeError, match="capture is 5; expected names"):
        e2b.run(IDS, capture=5)


@pytest.mark.parametrize(
    "edit",
    [
        {Z: gl.edits.zero(heads=[])},
        {PATTERN: gl.edits.zero(heads=[])},
        {"layers.1.attn.scores": gl.edits.mask_edges(None, [0, 1], heads=[])},
        {RESID: gl.edits.zero(positions=[])},
        {RESID: gl.edits.zero(rows=[])},
        {RESID: []},
    ],
)
def test_edits_of_nothing_change_nothing(e2b, edit):
    np.testing.assert_array_equal(e2b.run(IDS, edit=edit).logits, e2b.run(IDS).logits)


def test_ablating_no_expert_changes_nothing_and_all_of_them_is_an_error(moe):
    plain = moe.run(IDS).logits
    for mode in ("mask", "zero"):
        edit = {LOGITS: gl.edits.ablate_experts([], mode)}
        np.testing.assert_array_equal(moe.run(IDS, edit=edit).logits, plain)
    every = range(moe.config.text.num_experts)
    with pytest.raises(ValueError, match="got all 11 experts; expected to leave one"):
        moe.run(IDS, edit={LOGITS: gl.edits.ablate_experts(every)})


def test_taking_experts_away_is_finite_enough(moe):
    edit = {LOGITS: gl.edits.ablate_experts([1])}
    assert np.isfinite(moe.run(IDS, edit=edit, check_finite=True).logits).all()
    with pytest.raises(ValueError, match="router.logits: got nan"):
        moe.run(IDS, edit={LOGITS: gl.edits.set(np.nan)}, check_finite=True)


@pytest.mark.parametrize(
    ("point", "make", "error", "match"),
    [
        (Z, lambda: gl.edits.zero(heads=np.array([False, True, True])), TypeError, "heads at"),
        (Z, lambda: gl.edits.zero(heads=1.5), TypeError, "got 1.5; expected a number or a list"),
        (Z, lambda: gl.edits.zero(heads=slice(0, 1)), TypeError, "slice"),
        (Z, lambda: gl.edits.zero(heads=3), ValueError, "got 3; expected 0 to 2"),
        (RESID, lambda: gl.edits.zero(rows=[True, False]), TypeError, "rows: got"),
        (RESID, lambda: gl.edits.zero(rows=-1), ValueError, "rows: got -1"),
        (RESID, lambda: gl.edits.zero(positions=2**63), ValueError, "beyond every sequence"),
        (Z, lambda: gl.edits.project_out(np.ones(12)), ValueError, r"\[12\]; expected \[3, 12\]"),
        (RESID, lambda: gl.edits.project_out(2.0), ValueError, r"\[\]; expected \[44\]"),
    ],
)
def test_masks_fractions_and_other_shapes_are_refused(e2b, point, make, error, match):
    with pytest.raises(error, match=match):
        e2b.run(IDS, edit={point: make()})


def test_masks_of_experts_are_refused(moe):
    mask = np.arange(moe.config.text.num_experts) == 3
    with pytest.raises(TypeError, match="ablate_experts: experts: got"):
        moe.run(IDS, edit={LOGITS: gl.edits.ablate_experts(mask)})


def test_a_slice_may_end_far_beyond_the_sequence(e2b):
    capture = {RESID: gl.at(slice(7, 10**12))}
    assert e2b.run(IDS, capture=capture).positions_of(RESID).tolist() == [7, 8, 9]


def test_a_list_may_mix_arrays_numbers_functions_and_edits(e2b):
    ones = np.ones(44, np.float32)
    run = e2b.run(IDS, capture=RESID, edit={RESID: [lambda x: x * 5, ones, gl.edits.add(1.0)]})
    np.testing.assert_array_equal(run[RESID], np.full((10, 44), 2, np.float32))
    run = e2b.run(IDS, capture=RESID, edit={RESID: (1.0,) * 44})
    np.testing.assert_array_equal(run[RESID], np.ones((10, 44), np.float32))


@pytest.mark.parametrize("shape", [(1, 1), (1000, 1000), (44, 10)])
def test_a_function_that_resizes_its_array_in_place_is_an_error(e2b, shape):
    def resize(x):
        x.resize(shape, refcheck=False)

    with pytest.raises(ValueError, match=r"the function left \[\d+, \d+\], expected \[10, 44\]"):
        e2b.run(IDS, edit={RESID: resize})


def test_positions_at_keys_are_those_of_the_keys(e2b):
    first = e2b.run(IDS[:4])
    plain = e2b.run(IDS[4:], cache=first.cache.fork(), capture=[KEYS, PATTERN])
    edit = {KEYS: gl.edits.zero(positions=[2, 7])}
    run = e2b.run(IDS[4:], cache=first.cache.fork(), capture=KEYS, edit=edit)
    zeroed = (run[KEYS] == 0).all(axis=(1, 2))
    assert np.flatnonzero(zeroed).tolist() == [2, 7]
    kept = np.delete(np.arange(10), [2, 7])
    np.testing.assert_array_equal(run[KEYS][kept], plain[KEYS][kept])
    one = e2b.run(IDS, capture={KEYS: gl.at([3, -1])})
    assert one.positions_of(KEYS).tolist() == [3, 9]
    np.testing.assert_array_equal(one[KEYS], e2b.run(IDS, capture=KEYS)[KEYS][[3, 9]])


def test_keys_of_a_prompt_in_chunks_are_kept_once(e2b):
    whole = e2b.run(IDS, capture=KEYS)
    chunked = e2b.run(IDS, capture=KEYS, chunk=3)
    assert chunked.positions_of(KEYS).tolist() == list(range(10))
    np.testing.assert_allclose(chunked[KEYS], whole[KEYS], atol=1e-5)
    patched = e2b.run(IDS, capture=KEYS, edit={KEYS: gl.edits.patch(chunked)})
    np.testing.assert_array_equal(patched[KEYS], chunked[KEYS])


def test_patching_from_what_is_no_row_a_position_is_an_error(e2b):
    ids = random_ids(44)  # As many tokens as columns: the mean has the shape of one of each.
    mean = e2b.run(ids, capture={RESID: gl.at(reduce="mean")})
    with pytest.raises(ValueError, match=r"of shape \[44\]; expected \[44, 44\].*reduce"):
        e2b.run(ids, edit={RESID: gl.edits.patch(mean)})
    pattern = e2b.run(IDS, capture=PATTERN)
    with pytest.raises(ValueError, match="columns change with every pass"):
        e2b.run(IDS, edit={PATTERN: gl.edits.patch(pattern)})
    out = e2b.generate(IDS, max_new_tokens=2, capture=RESID)
    with pytest.raises(TypeError, match=r"got Output; expected what model\.run returned"):
        e2b.run(IDS, edit={RESID: gl.edits.patch(out)})


@pytest.mark.parametrize("keys", ["generated", slice(12, None)])
def test_masked_keys_follow_the_answer(e2b, keys):
    edit = {"layers.1.attn.scores": gl.edits.mask_edges("generated", keys)}
    out = e2b.generate(random_ids(12), max_new_tokens=4, temperature=0, capture=PATTERN, edit=edit)
    for pattern in out.captured[PATTERN][1:]:
        assert (pattern[:, 0, 12:] == 0).all()
        assert (pattern[:, 0, :12] > 0).any()


def test_a_slice_of_no_rows_has_logits_of_no_rows(e2b):
    assert e2b.run(IDS, logits=slice(3, 3)).logits.shape == (0, 307)
    assert e2b.run(IDS, logits=None).logits is None


def test_a_call_that_raises_leaves_no_note_in_the_cache(e2b):
    cache, other = e2b.new_cache(), e2b.new_cache()
    edit = {RESID: lambda x: 1 / 0}
    with pytest.raises(ZeroDivisionError):
        e2b.run(IDS, cache=cache, edit=edit)
    with pytest.raises(ZeroDivisionError):
        e2b.generate(IDS, cache=cache, edit=edit)
    with pytest.raises(ZeroDivisionError):
        e2b.run([IDS, IDS], cache=[cache, other], edit=[{"embed": gl.edits.zero()}, edit])
    assert cache.provenance == other.provenance == ()


def test_the_result_of_a_stream_is_the_same_whenever_it_is_asked_for(demo):
    stream = demo.generate("Hi", max_new_tokens=6, temperature=0, capture=RESID, stream=True)
    next(stream)
    next(stream)
    stream.close()
    assert stream.result is stream.result
    rows = len(stream.result.prompt) + 1
    assert stream.result.captured[RESID].shape[0] == rows
    assert stream.result.routing.experts.shape[1] == rows


def test_a_stream_that_is_closed_while_the_prompt_is_read_has_what_was_read(demo):
    arguments = {"max_new_tokens": 6, "temperature": 0, "capture": RESID, "stream": True}
    stream = demo.generate([5] * 700, **arguments)
    stream.close()
    assert stream.result.captured[RESID].shape[0] == 0
    stream = demo.generate([[5] * 9, [6] * 700], **arguments)
    next(stream)
    stream.close()
    first, second = stream.result
    assert first.routing.experts.shape[1] == first.captured[RESID].shape[0] == 9
    assert second.routing.experts.shape[1] == second.captured[RESID].shape[0] == 0


def test_an_edit_function_may_end_the_stream_that_calls_it(demo):
    streams = []

    def stop_at_two(x, at):
        if at.step == 2:
            streams[0].close()

    edit = {RESID: stop_at_two}
    streams.append(demo.generate("Hi", max_new_tokens=20, temperature=0, edit=edit, stream=True))
    for _piece in streams[0]:
        pass
    out = streams[0].result
    assert out.finish_reason == "cancelled" and len(out.ids) == 2


def test_a_stream_stepped_by_its_own_edit_function_is_an_error(demo):
    streams = []
    edit = {RESID: lambda x: next(streams[0])}
    streams.append(demo.generate("Hi", max_new_tokens=20, edit=edit, stream=True))
    with pytest.raises(RuntimeError, match="in use"):
        next(streams[0])
    assert np.isfinite(demo.run([2, 5]).logits).all()
