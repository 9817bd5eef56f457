"""Drafters beside transformers' assistant classes: the same guesses from the same cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import gemloupe as gl
from tiny_drafters import make_drafter, reference_drafts, save_drafter
from tiny_models import VARIANTS, random_ids, text_model


@pytest.mark.parametrize("clusters", [0, 307], ids=["all", "clusters"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("length", [4, 40])
def test_guesses_are_those_of_the_reference(tiny, variant, clusters, length, tmp_path):
    reference, folder = tiny(variant)
    drafter = make_drafter(variant, clusters=clusters, chosen=40)
    model = gl.load(folder, dtype="float32")
    loaded = model.load_drafter(save_drafter(drafter, tmp_path / "drafter"))
    ids = random_ids(length)
    run = model.run(ids, capture="final_norm", cache=model.new_cache(sliding="full"))
    hidden = run["final_norm"][-1]
    text = model.config.text
    kinds = {"full_attention": "full", "sliding_attention": "sliding"}
    shared = {}
    for name, kind in kinds.items():
        source = max(
            i for i, layer in enumerate(text.layers) if layer.kind == kind and layer.kv_source == i
        )
        layer = run.cache.layers[source]
        shared[name] = tuple(
            torch.from_numpy(np.array(part)).permute(1, 0, 2)[None]
            for part in (layer.keys, layer.values)
        )
    embed = text_model(reference).embed_tokens
    want, logits = reference_drafts(drafter, embed, 17, torch.from_numpy(hidden.copy()), shared, 5)
    got = loaded.core.draft(model.core, run.cache.core, 17, hidden, 5)
    for step, (mine, theirs, row) in enumerate(zip(got, want, logits, strict=True)):
        if mine != theirs:  # only where the reference itself hardly decides
            top = row.topk(2).values
            assert float(top[0] - top[1]) < 1e-5, (step, got, want)
            break
    assert len(set(want)) > 1
