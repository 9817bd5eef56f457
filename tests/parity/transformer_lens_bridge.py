"""gemloupe under TransformerLens, beside TransformerLens's own bridge over transformers.

python tests/parity/transformer_lens_bridge.py

Run by hand where transformer_lens is installed (`pip install torch==2.13.0 transformers==5.23.0
"transformer_lens>=4.3"`, and gemloupe): the package is too large for the test extra. Every hook
point that both name is compared on a random tiny model of each variant, then hooks that change
the pass, the loss, padded batches and activation patching.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from transformer_lens import patching
from transformer_lens.model_bridge.driver_protocol import Driver, validate_driver
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

import gemloupe as gl
from gemloupe.integrations import transformer_lens
from parity.parity_checks import assert_logits_close, assert_tensor_close
from tiny_models import VARIANTS, make_tiny, random_ids, save_tiny, save_tiny_tokenizer

# Both give post-softmax weights in TransformerBridge's Gemma 4; here scores are scores.
DIFFERENT = ("hook_attn_scores",)
EDITED = "blocks.2.hook_resid_pre"


def compare(variant: str, folder: Path) -> None:
    reference = make_tiny(variant)
    save_tiny(reference, folder)
    save_tiny_tokenizer(folder)
    theirs = build_bridge_from_module(
        make_tiny(variant), type(reference).__name__, hf_config=reference.config
    )
    ours = transformer_lens.bridge(gl.load(folder, dtype="float32"))
    assert isinstance(ours._driver, Driver)
    validate_driver(ours._driver, after_bridge_construction=True)
    ids = torch.tensor([random_ids(13)])

    want_logits, want = theirs.run_with_cache(ids)
    got_logits, got = ours.run_with_cache(ids)
    assert_logits_close(got_logits.numpy(), want_logits.numpy())
    common = [name for name in got.keys() if name in want and not name.endswith(DIFFERENT)]
    missing = [name for name in got.keys() if name not in want]
    for name in common:
        expected = want[name].numpy().reshape(got[name].shape)
        assert_tensor_close(got[name].numpy(), expected, f"{variant} {name}")
    print(f"{variant}: {len(common)} hook names equal; only here: {sorted(kinds(missing))}")

    assert abs(float(ours(ids, return_type="loss") - theirs(ids, return_type="loss"))) < 1e-4
    check_padding(ours)
    check_hooks(variant, ours, theirs, ids)
    check_patching(variant, ours, theirs, ids)


def kinds(names: list[str]) -> set[str]:
    return {name.split(".", 2)[2] if name.startswith("blocks.") else name for name in names}


def check_padding(ours: Any) -> None:
    short, long = random_ids(5), random_ids(9, seed=4)
    padded = torch.tensor([[0] * 4 + short, long])
    mask = torch.tensor([[0] * 4 + [1] * 5, [1] * 9])
    logits, cache = ours.run_with_cache(padded, attention_mask=mask)
    alone, cache_alone = ours.run_with_cache(torch.tensor([short]))
    assert_logits_close(logits[0, 4:].numpy(), alone[0].numpy())
    for name in ("blocks.1.hook_out", "blocks.1.attn.hook_pattern"):
        got = cache[name][0]
        got = got[:, 4:, 4:] if name.endswith("pattern") else got[4:]
        assert_tensor_close(got.numpy(), cache_alone[name][0].numpy(), name)


def check_hooks(variant: str, ours: Any, theirs: Any, ids: torch.Tensor) -> None:
    direction = torch.randn(theirs.cfg.d_model)

    def steer(x: torch.Tensor, hook: Any) -> torch.Tensor:
        x[:, 3:] += direction
        return x

    def ablate(z: torch.Tensor, hook: Any) -> torch.Tensor:
        z = z.clone()
        z[:, :, 1] = 0
        return z

    for name, hook in ((EDITED, steer), ("blocks.1.attn.hook_z", ablate)):
        want = theirs.run_with_hooks(ids, fwd_hooks=[(name, hook)])
        got = ours.run_with_hooks(ids, fwd_hooks=[(name, hook)])
        assert_logits_close(got.numpy(), want.numpy(), f"{variant} {name}")
        with ours.hooks(fwd_hooks=[(name, hook)]):
            _, cache = ours.run_with_cache(ids)
        with theirs.hooks(fwd_hooks=[(name, hook)]):
            _, expected = theirs.run_with_cache(ids)
        last = f"blocks.{theirs.cfg.n_layers - 1}.hook_resid_post"
        assert_tensor_close(cache[last].numpy(), expected[last].numpy(), last)
    unedited = ours(ids)
    value = {"op": "add", "value": direction.numpy(), "pos": list(range(3, ids.shape[1]))}
    got = ours.forward(ids, intervene={"blocks.2.hook_in": value})
    want = theirs.run_with_hooks(ids, fwd_hooks=[(EDITED, steer)])
    assert_logits_close(got.numpy(), want.numpy(), f"{variant} intervene")
    assert not np.array_equal(got.numpy(), unedited.numpy())
    assert np.array_equal(ours(ids).numpy(), unedited.numpy()), "a hook outlived its call"
    print(f"{variant}: hooks change the pass as TransformerBridge's do")


def check_patching(variant: str, ours: Any, theirs: Any, ids: torch.Tensor) -> None:
    corrupted = ids.clone()
    corrupted[0, 4] = 77

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logits[0, -1, 5] - logits[0, -1, 6]

    grids = []
    for bridge in (theirs, ours):
        _, clean = bridge.run_with_cache(ids)
        grid = patching.get_act_patch_resid_pre(bridge, corrupted, clean, metric)
        grids.append(grid.detach().numpy())
    assert_tensor_close(grids[1], grids[0], f"{variant} patching grid")
    print(f"{variant}: patching grid {grids[0].shape} equal")


def main() -> None:
    warnings.filterwarnings("ignore")
    for variant in VARIANTS:
        with tempfile.TemporaryDirectory() as folder:
            compare(variant, Path(folder))


if __name__ == "__main__":
    main()
