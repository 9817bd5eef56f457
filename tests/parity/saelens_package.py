"""gemloupe's autoencoders and activation datasets beside the sae_lens package.

python tests/parity/saelens_package.py

Run by hand where sae_lens is installed (`pip install torch==2.13.0 sae-lens`, and gemloupe's
dependencies): it needs an older transformer_lens than the driver. Autoencoders of every
architecture are saved by sae_lens and read here; a dataset is written here and read by its
ActivationsStore.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_lens import saes
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.activations_store import ActivationsStore

from gemloupe.integrations.saelens import ActivationWriter, load_sae

D_IN, D_SAE, HOOK = 24, 60, "blocks.1.hook_resid_post"
CLASSES = {
    "standard": (saes.StandardSAE, saes.StandardSAEConfig, {}),
    "jumprelu": (saes.JumpReLUSAE, saes.JumpReLUSAEConfig, {}),
    "gated": (saes.GatedSAE, saes.GatedSAEConfig, {}),
    "topk": (saes.TopKSAE, saes.TopKSAEConfig, {"k": 7}),
    "topk, rescaled": (
        saes.TopKSAE,
        saes.TopKSAEConfig,
        {"k": 7, "rescale_acts_by_decoder_norm": True},
    ),
}
if hasattr(saes, "AbsTopKSAE"):
    CLASSES["abstopk"] = (saes.AbsTopKSAE, saes.AbsTopKSAEConfig, {"k": 7})


def check_autoencoder(name: str, normalize: str, dtype: str, apply_b_dec: bool) -> None:
    kind, config, extra = CLASSES[name]
    sae = kind(
        config(
            d_in=D_IN,
            d_sae=D_SAE,
            dtype=dtype,
            normalize_activations=normalize,
            apply_b_dec_to_input=apply_b_dec,
            metadata=SAEMetadata(hook_name=HOOK),
            **extra,
        )
    )
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    x = torch.randn(9, D_IN) * 2 + 0.5
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        sae.save_model(folder)
        sae = sae.to(torch.float32)
        ours = load_sae(folder)
        assert ours.hook_name == HOOK
        features = sae.encode(x)
        decoded = sae.decode(features).numpy()
        np.testing.assert_allclose(ours.encode(x), features.numpy(), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(ours.decode(features, x), decoded, rtol=1e-4, atol=1e-4)
        changed = sae.encode(x)
        changed[:, 5], changed[:, 11] = 3.0, 0.0
        edited = x.numpy() + (sae.decode(changed).numpy() - decoded_again(sae, x))
        got = ours.with_features(x, {5: 3.0, 11: 0.0})
        np.testing.assert_allclose(got, edited, rtol=1e-3, atol=1e-3)


def decoded_again(sae: Any, x: torch.Tensor) -> np.ndarray:
    return sae.decode(sae.encode(x)).numpy()


def check_dataset() -> None:
    activations = np.random.default_rng(0).standard_normal((45, D_IN), np.float32)
    ids = np.arange(45)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "acts"
        with ActivationWriter(path, HOOK, d_in=D_IN, context_size=5) as writer:
            for begin in range(0, 45, 7):
                writer.add(activations[begin : begin + 7], ids[begin : begin + 7])
        store = ActivationsStore(
            model=None,  # type: ignore[arg-type]
            dataset=None,
            streaming=False,
            hook_name=HOOK,
            hook_head_index=None,
            context_size=5,
            d_in=D_IN,
            n_batches_in_buffer=2,
            total_training_tokens=40,
            store_batch_size_prompts=4,
            train_batch_size_tokens=8,
            prepend_bos=False,
            normalize_activations="none",
            device=torch.device("cpu"),
            dtype="float32",
            cached_activations_path=str(path),
        )
        got, got_ids = store.get_raw_llm_batch()
        assert np.array_equal(got.numpy(), activations[:20])
        assert np.array_equal(got_ids.numpy(), ids[:20])


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    for name in CLASSES:
        for normalize in ("none", "layer_norm", "constant_norm_rescale"):
            for apply_b_dec in (True, False):
                check_autoencoder(name, normalize, "float32", apply_b_dec)
        check_autoencoder(name, "none", "bfloat16", True)
        print(f"{name}: encode, decode and with_features equal sae_lens's")
    check_dataset()
    print("dataset: read by sae_lens's ActivationsStore")


if __name__ == "__main__":
    main()
