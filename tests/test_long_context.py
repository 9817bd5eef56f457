"""benchmarks/long_context.py: what it counts and prints, without timings; filled caches."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import gemloupe as gl
from gemloupe import bench, sizes
from tiny_models import random_ids

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import long_context


def test_a_context_is_read_whole_or_filled_and_read_at_its_end() -> None:
    assert long_context.split(4096, 4096, 512) == (0, 4096)
    assert long_context.split(4097, 4096, 512) == (3585, 512)
    assert long_context.split(100, 64, 512) == (36, 64)


def test_the_prediction_is_bytes_over_bandwidth_and_the_share_what_is_reached() -> None:
    line = long_context.Line(
        context=100, filled=0, prefill_tokens=100, prefill_seconds=1.0, decode_seconds=0.5,
        kv_held=0, kv_expected=0, weights_read=3e9, kv_read=1e9, bandwidth=10e9,
    )  # fmt: skip
    assert line.predicted_seconds == pytest.approx(0.4)
    assert line.share == pytest.approx(0.8)


@pytest.mark.parametrize("kv_dtype", ["float16", "int8"])
def test_bytes_of_a_token_are_counted_by_hand(tiny: Callable, kv_dtype: str) -> None:
    model = gl.load(tiny("e2b")[1], dtype="float32", kv_dtype=kv_dtype)
    text = model.config.text
    element, scales = (2, 0) if kv_dtype == "float16" else (1, 8)
    expected = 0
    for layer in text.layers:
        seen = 201 if layer.kind == "full" else min(201, layer.window)
        expected += seen * layer.num_kv_heads * (2 * layer.head_dim * element + scales)
    weights, kv = long_context.bytes_read(model, 200)
    assert kv == expected
    assert weights == long_context.bytes_read(model, 7)[0]
    assert weights + kv == bench.bytes_per_token(model, bench.Case("tg", 1, 200))


@pytest.mark.parametrize("variant", ["e2b", "26b"])
def test_lines_hold_what_the_sizes_say(
    tiny: Callable, variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(bench, "read_bandwidth", lambda threads: 2e10)
    out = tmp_path / "out.json"
    folder = str(tiny(variant)[1])
    arguments = ["--context", "300", "40", "--prefill", "64", "--rows", "32", "--new", "3"]
    assert long_context.main([folder, *arguments, "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    short, long = report["contexts"]
    assert (short["context"], short["filled"], short["prefill_tokens"]) == (40, 0, 36)
    assert (long["context"], long["filled"], long["prefill_tokens"]) == (300, 264, 32)
    text = gl.load(folder).config.text
    for line in (short, long):
        most = sizes.kv_allocated(text, line["context"], report["kv_dtype"], 512)
        assert line["kv_expected"] == most
        assert 0 < line["kv_held"] <= most
        total = line["weights_read"] + line["kv_read"]
        assert line["predicted_seconds"] == pytest.approx(total / 2e10)
    assert "32 after 264 filled" in capsys.readouterr().out


def test_arguments_that_make_no_sense_are_refused(capsys) -> None:
    for wrong, message in (
        (["--context", "9"], "--context has 9; expected --new + 2 = 10 or more"),
        (["--new", "0"], "--new is 0; expected 1 or more"),
        (["--rows", "-1"], "--rows is -1; expected 1 or more"),
    ):
        with pytest.raises(SystemExit):
            long_context.parse(["model", *wrong])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
@pytest.mark.parametrize("variant", ["e2b", "26b"])
def test_a_filled_cache_is_like_one_that_was_read(
    tiny: Callable, variant: str, kv_dtype: str
) -> None:
    model = gl.load(tiny(variant)[1], dtype="float32", kv_dtype=kv_dtype)
    ids = random_ids(700)
    real, filled, again = (model.new_cache(max_tokens=720) for _ in range(3))
    model.run(ids, cache=real, logits=None)
    for cache in (filled, again):
        cache.core.append_random(list(ids), 3)
    assert filled.length == real.length == 700
    assert filled.tokens.tolist() == real.tokens.tolist()
    for a, b, c in zip(filled.layers, real.layers, again.layers, strict=True):
        assert a.positions.tolist() == b.positions.tolist()
        assert np.array_equal(a.values, c.values)
        assert abs(float(np.std(a.values)) - 1) < 0.1
    run = model.run([5], cache=filled)
    assert np.isfinite(run.logits).all()
    with pytest.raises(ValueError, match="20 ids after 701 tokens, expected at most 720"):
        filled.core.append_random([1] * 20, 0)
