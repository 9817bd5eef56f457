"""Experts that stay on disk: the same bits as with all of them in memory, within the limit."""

from __future__ import annotations

import pytest

import gemloupe as gl
from gemloupe import sizes
from tiny_models import make_tiny, save_tiny

IDS = [(7 * i + 3) % 90 + 5 for i in range(40)]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("experts")
    save_tiny(make_tiny("26b"), folder / "model")
    gl.convert(folder / "model", folder / "int8", dtype="int8")
    return str(folder / "int8")


def limit_for(model: gl.Model, experts: int) -> int:
    """The max_memory that leaves room for this many experts."""
    from gemloupe.model import _resident_set

    text = model.config.text
    everything = sizes.resident_bytes(model.checkpoint, "auto")
    of_all = sizes.expert_bytes(model.checkpoint)
    of_one = of_all // (text.num_experts * text.num_hidden_layers)
    beside = sizes.scratch_bytes(text, 512)
    beside += sizes.kv_allocated(text, min(4096, text.max_position_embeddings), "float16", 512)
    # The process grows a little between here and `load`: hence a margin of one expert.
    return _resident_set() + beside + everything - of_all + (experts + 1) * of_one


def test_experts_on_disk_change_no_bit(packed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemloupe.model._resident_set", lambda: 50 << 20)
    whole = gl.load(packed)
    few = gl.load(packed, max_memory=limit_for(whole, 3))
    assert whole.expert_cache is None
    cache = few.expert_cache
    assert cache is not None
    assert cache["capacity"] < whole.config.text.num_experts * whole.config.text.num_hidden_layers
    expected = whole.run(IDS, logits="all").logits
    run = few.run(IDS, logits="all")
    assert (run.logits == expected).all()
    follow = [few.run([5], cache=run.cache).logits, few.run([6], cache=run.cache).logits]
    assert all(logits.shape == (1, expected.shape[1]) for logits in follow)
    cache = few.expert_cache
    assert cache is not None
    assert cache["read"] > 0
    assert cache["bytes_read"] > 0


def test_a_limit_too_small_for_the_rest_is_refused(packed: str) -> None:
    with pytest.raises(MemoryError, match=r"max_memory is 1.00 MiB"):
        gl.load(packed, max_memory=1 << 20)


def test_experts_that_would_be_converted_are_not_read_on_demand(
    tmp_path: pytest.TempPathFactory,
) -> None:
    save_tiny(make_tiny("26b"), tmp_path / "model")
    with pytest.raises(MemoryError):
        gl.load(tmp_path / "model", dtype="int8", max_memory=1 << 20)


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "8GB", float("inf"), float("nan")])
def test_a_limit_that_is_no_number_of_bytes_is_refused(packed: str, limit: object) -> None:
    with pytest.raises(ValueError, match=r"max_memory is .*; expected None or a number of bytes"):
        gl.load(packed, max_memory=limit)
