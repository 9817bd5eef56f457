"""Far positions: RoPE's angle is a float32 product, and another angle gives other logits."""

from __future__ import annotations

import numpy as np
import pytest
from parity_checks import assert_logits_close

import gemloupe as gl
from hf_process import hf_logits_far
from tiny_models import VARIANTS, random_ids

STARTS = (4_000, 131_000, 262_000)
COUNT = 100


@pytest.fixture(scope="module")
def far_logits(tiny, tmp_path_factory):
    """Returns {(variant, start): transformers' logits} of COUNT tokens from each position."""
    keys = [(variant, start) for variant in VARIANTS for start in STARTS]
    jobs = [(tiny(variant)[1], random_ids(COUNT), start) for variant, start in keys]
    return dict(zip(keys, hf_logits_far(jobs, tmp_path_factory.mktemp("far")), strict=True))


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_far_prefill_equals_transformers(tiny, far_logits, variant, start):
    model = gl.load(tiny(variant)[1], dtype="float32")
    cache = model.new_cache(max_tokens=COUNT, start=start)
    run = model.run(random_ids(COUNT), cache=cache, logits="all")
    assert_logits_close(run.logits, far_logits[variant, start])


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_far_decoding_equals_transformers(tiny, far_logits, variant, start):
    model = gl.load(tiny(variant)[1], dtype="float32")
    cache = model.new_cache(max_tokens=COUNT, start=start)
    rows = [model.run([token], cache=cache, logits="all").logits for token in random_ids(COUNT)]
    assert_logits_close(np.concatenate(rows), far_logits[variant, start])
