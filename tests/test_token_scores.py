"""`vocab=` and `targets=`: columns, log-probabilities and entropies of logits that are not held."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import gemloupe as gl
from made_adapters import ALL_LINEAR, make, save
from tiny_models import MEDIA_IDS, VOCAB_SIZE, make_tiny, random_ids, save_tiny

IDS = random_ids(150)  # More than two blocks of 64 rows.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(make_tiny("e2b", text_only=True), tmp_path_factory.mktemp("e2b"))


@pytest.fixture(scope="module")
def model(folder: Path) -> gl.Model:
    """Invariant: a row's bits do not depend on the block that it is computed in."""
    return gl.load(folder, dtype="float32", invariant=True)


def expected(logits: np.ndarray, targets: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities and entropies in float64, from all logits."""
    values = logits.astype(np.float64)
    values -= values.max(axis=1, keepdims=True)
    logs = values - np.log(np.exp(values).sum(axis=1, keepdims=True))
    p = np.exp(logs)
    entropy = -np.where(p > 0, p * np.where(p > 0, logs, 0), 0).sum(axis=1)
    chosen = [np.nan if t < 0 else logs[row, t] for row, t in enumerate(targets)]
    return np.array(chosen), entropy


def assert_scores(run: gl.Run, logits: np.ndarray, targets: list[int]) -> None:
    logprobs, entropy = expected(logits, targets)
    assert run.logprobs.dtype == run.entropy.dtype == np.float32
    np.testing.assert_allclose(run.logprobs, logprobs, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(run.entropy, entropy, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [512, 70, 7])
def test_next_scores_each_row_by_the_id_that_follows(model: gl.Model, chunk: int) -> None:
    full = model.run(IDS, logits="all")
    run = model.run(IDS, targets="next", chunk=chunk)
    assert_scores(run, full.logits, [*IDS[1:], -1])
    assert np.isnan(run.logprobs[-1])
    assert np.isfinite(run.entropy).all()
    assert np.array_equal(run.logits, full.logits[-1:])
    assert "logprobs, entropy" in repr(run)


def test_targets_may_be_any_ids_and_none(model: gl.Model) -> None:
    targets = random_ids(len(IDS), seed=8)
    targets[3] = -1
    full = model.run(IDS, logits="all", softcap=None)
    run = model.run(IDS, targets=np.array(targets), logits=None, softcap=None)
    assert run.logits is None
    assert_scores(run, full.logits, targets)


@pytest.mark.parametrize("logits", ["last", "all", slice(60, 130), slice(5, 5)])
@pytest.mark.parametrize("targets", [None, "next"])
def test_vocab_keeps_these_columns(model: gl.Model, logits: object, targets: str | None) -> None:
    ids = [7, 300, 7, 0]
    full = model.run(IDS, logits=logits).logits
    run = model.run(IDS, logits=logits, vocab=ids, targets=targets, chunk=40)
    assert np.array_equal(run.logits, full[:, ids])
    assert model.run(IDS, logits=logits, vocab=[]).logits.shape == (len(full), 0)
    assert (run.logprobs is None) == (targets is None)


def test_without_invariance_they_agree_within_rounding(folder: Path) -> None:
    for dtype in ("float32", "bfloat16", "int8", "int4"):
        model = gl.load(folder, dtype=dtype)
        full = model.run(IDS, logits="all").logits
        run = model.run(IDS, targets="next", vocab=[1, 2], logits="all")
        np.testing.assert_allclose(run.logits, full[:, [1, 2]], rtol=0, atol=1e-4)
        logprobs, entropy = expected(full, [*IDS[1:], -1])
        np.testing.assert_allclose(run.logprobs, logprobs, rtol=0, atol=2e-4)
        np.testing.assert_allclose(run.entropy, entropy, rtol=0, atol=2e-4)


def test_batches_caches_edits_and_softcaps_are_followed(model: gl.Model) -> None:
    edit = {"layers.4.resid_post": gl.edits.scale(0.5), "logits": gl.edits.scale(2.0)}
    rows = [IDS[:9], IDS[20:33]]
    full = model.run(rows, logits="all", edit=edit, softcap=5.0)
    runs = model.run(rows, targets="next", edit=edit, softcap=5.0)
    given = model.run(rows, targets=[r[::-1] for r in rows], edit=edit, softcap=5.0)
    for ids, whole, run, other in zip(rows, full, runs, given, strict=True):
        assert_scores(run, whole.logits, [*ids[1:], -1])
        assert_scores(other, whole.logits, ids[::-1])
    cache = model.new_cache()
    model.run(IDS[:30], cache=cache)
    continued = model.run(IDS[30:], cache=cache, targets="next")
    assert_scores(continued, model.run(IDS, logits="all").logits[30:], [*IDS[31:], -1])
    assert cache.length == len(IDS)


def test_adapters_are_followed(model: gl.Model, tmp_path: Path) -> None:
    base = make_tiny("e2b", text_only=True)
    peft = make(base, r=3, target_modules=ALL_LINEAR + "|lm_head")
    model.load_adapter(save(peft, tmp_path / "one"), name="one")
    full = model.run(IDS, logits="all", adapter="one").logits
    run = model.run(IDS, targets="next", adapter="one")
    assert_scores(run, full, [*IDS[1:], -1])
    assert not np.allclose(run.logprobs[:-1], model.run(IDS, targets="next").logprobs[:-1])


def test_logits_that_an_edit_forbids_count_as_nothing(model: gl.Model) -> None:
    mask = np.zeros(VOCAB_SIZE, np.float32)
    mask[10:] = -np.inf
    run = model.run(IDS, targets="next", edit={"logits": gl.edits.add(mask)}, logits="all")
    assert_scores(run, run.logits, [*IDS[1:], -1])
    assert np.isfinite(run.entropy).all()
    assert (run.logprobs[:-1][np.array(IDS[1:]) >= 10] == -np.inf).all()


def test_captured_logits_are_whole(model: gl.Model) -> None:
    run = model.run(IDS, targets="next", capture=["logits", "final_norm"])
    assert np.array_equal(run["logits"], model.run(IDS, logits="all").logits)
    assert run["final_norm"].shape[0] == len(IDS)


def test_a_repeated_run_scores_every_row(model: gl.Model) -> None:
    kept = model.run(IDS, keep=True)
    edit = {"layers.2.resid_post": gl.edits.zero(positions=100)}
    run = model.run(kept, edit=edit, targets="next", vocab=[4], logits="all")
    full = model.run(IDS, edit=edit, logits="all").logits
    assert_scores(run, full, [*IDS[1:], -1])
    assert np.array_equal(run.logits, full[:, [4]])


def test_rows_before_soft_tokens_have_no_next_token(tiny: Callable) -> None:
    _, folder = tiny("e2b", towers="tiny", media_ids=True)
    model = gl.load(folder, dtype="float32")
    image = MEDIA_IDS["image_token_id"]
    tokens = np.zeros((2, model.config.text.hidden_size), np.float32)
    run = model.run([2, 70, image, image, 80, 81], images=[tokens], targets="next")
    assert np.isnan(run.logprobs).tolist() == [False, True, True, False, False, True]


MISTAKES = {
    "a word": ({"targets": "previous"}, "targets is 'previous'; expected \"next\""),
    "too few": ({"targets": [1, 2]}, "targets has 2 ids; expected one for each of the 3 rows"),
    "outside": ({"targets": [1, 2, VOCAB_SIZE]}, f"targets has the id {VOCAB_SIZE}; expected -1"),
    "floats": ({"targets": [0.5, 1.0, 2.0]}, "targets is float64 of shape [3]; expected a list"),
    "lists": ({"targets": [[1], [2, 3]]}, "targets is [[1], [2, 3]]; expected a list of token ids"),
    "vocab outside": ({"vocab": [-1]}, "vocab has the id -1; expected 0 to 306"),
    "no logits": ({"vocab": [1], "logits": None}, "vocab chooses columns of logits, but logits is"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_named(model: gl.Model, case: str) -> None:
    arguments, message = MISTAKES[case]
    with pytest.raises(ValueError) as error:
        model.run([5, 6, 7], **arguments)
    assert message in str(error.value)
    with pytest.raises(ValueError, match="targets has 1 entries for 2 rows"):
        model.run([[5, 6], [7, 8]], targets=[[1, 2]])
    with pytest.raises(ValueError, match='targets is 5; expected "next", or ids for each of'):
        model.run([[5, 6], [7, 8]], targets=5)


def test_all_logits_are_never_held(tmp_path: Path) -> None:
    # 1500 rows of 60,000 logits are 343 MiB; blocks of 64 rows take 15 MiB.
    save_tiny(make_tiny("31b", text_only=True, vocab_size=60_000), tmp_path)
    code = f"""
import resource, gemloupe as gl
model = gl.load({str(tmp_path)!r}, dtype="float32")
ids = [5 + i % 1000 for i in range(1500)]
model.run(ids, chunk=1500)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run = model.run(ids, targets="next", chunk=1500, vocab=[3, 4], logits="all")
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(grown, run.logits.shape, len(run.entropy))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    grown, shape = done.stdout.split(" ", 1)
    assert shape.strip() == "(1500, 2) 1500"
    assert int(grown) < 120 << 10


def test_each_row_of_a_batch_chooses_its_logits() -> None:
    model = gl.load("demo:edge")
    rows = [[2, 5, 9], [2, 7]]
    last, every = (model.run(rows[i], logits=how) for i, how in ((0, "last"), (1, "all")))
    first, second = model.run(rows, logits=["last", "all"])
    assert np.array_equal(first.logits, last.logits) and np.array_equal(second.logits, every.logits)
    none, part = model.run(rows, logits=[None, slice(1, 2)], vocab=[3, 4])
    assert none.logits is None and part.logits.shape == (1, 2)
    with pytest.raises(ValueError, match="logits has 1 entries; expected one for each of 2 rows"):
        model.run(rows, logits=["last"])
    with pytest.raises(ValueError, match="x is one prompt; expected a list in a batch"):
        model.run(rows[0], logits=["last"])
    with pytest.raises(ValueError, match="logits is None"):
        model.run(rows, logits=["all", None], capture="logits")
