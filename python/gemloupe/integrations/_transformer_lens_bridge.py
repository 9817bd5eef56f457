"""TransformerLens's bridge with hooks that act during the pass, not on what it has captured."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.bridge_core import BridgeCore
from transformer_lens.model_bridge.driver_protocol import to_torch
from transformer_lens.model_bridge.remote_bridge import RemoteBridge
from transformer_lens.model_bridge.sources._bridge_builder import detect_tokenizer_bos_eos
from transformer_lens.utilities.activation_functions import SOFTCAP_DISABLED

from gemloupe.integrations.transformer_lens import Driver

if TYPE_CHECKING:
    from gemloupe.model import Model


class GemloupeBridge(RemoteBridge):
    """See `gemloupe.integrations.transformer_lens.bridge`."""

    def __init__(self, model: Model) -> None:
        config = _bridge_config(model)
        adapter = ArchitectureAdapterFactory.select_architecture_adapter(config)
        tokenizer = None
        if model.tokenizer.exists:
            tokenizer = _tokenizer(model)
            begins, ends = detect_tokenizer_bos_eos(tokenizer)
            adapter.cfg.tokenizer_prepends_bos, adapter.cfg.tokenizer_appends_eos = begins, ends
        self._live: frozenset[str] | None = None
        driver = Driver(model, adapter.cfg, tokenizer)
        super().__init__(adapter, tokenizer, driver)
        # Caches list activations in the registry's order; the driver declares a set.
        self._hook_registry: dict[str, HookPoint] = {
            name: self.hook_dict[name] for name in driver.names
        }

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    @property
    def W_E(self) -> torch.Tensor:
        """The embedding matrix [V, D], not multiplied by its constant √D."""
        return self._driver.get_param("embed_tokens.weight")

    @property
    def W_U(self) -> torch.Tensor:
        """The output matrix [D, V]: the embedding's transpose."""
        return self.W_E.T

    def forward(self, input: Any = None, **kwargs: Any) -> Any:
        """As RemoteBridge's, but hooks run inside the pass and may change it."""
        hooked = self._hooked()
        live = hooked if self._live is None else hooked & self._live
        if "capture" not in kwargs:
            kwargs["capture"] = tuple(name for name in self._hook_registry if name in hooked - live)
        if live:
            given = dict(kwargs.get("intervene") or {})
            for name in live:
                given[name] = _run_hooks(self._hook_registry[name], given.get(name))
            kwargs["intervene"] = given
        return super().forward(input, **kwargs)

    def run_with_hooks(self, input: Any, *args: Any, **kwargs: Any) -> Any:
        """As TransformerLens's; NotImplementedError for backward hooks."""
        if kwargs.get("bwd_hooks") or (len(args) > 1 and args[1]):
            raise NotImplementedError("gemloupe has no backward pass; bwd_hooks is not served")
        self._reject_stop_at_layer(kwargs.get("stop_at_layer"))
        self._reject_start_at_layer(kwargs.get("start_at_layer"))
        return BridgeCore.run_with_hooks(self, input, *args, **kwargs)

    def run_with_cache(self, *args: Any, **kwargs: Any) -> Any:
        """As TransformerLens's: hooks that are attached already act, the others only read."""
        before, self._live = self._live, self._hooked()
        try:
            return super().run_with_cache(*args, **kwargs)
        finally:
            self._live = before

    def _hooked(self) -> frozenset[str]:
        return frozenset(
            name
            for name, point in self._hook_registry.items()
            if point.fwd_hooks and self._gated_hook_reason(name) is None
        )


def _run_hooks(point: HookPoint, first: Any) -> Callable[[np.ndarray], torch.Tensor]:
    """The intervention that gives an activation to a hook point's functions."""
    if first is not None:
        raise ValueError(f"{point.name} has hooks and is in intervene too; expected one of the two")
    return lambda x: point(to_torch(x))


def _bridge_config(model: Model) -> TransformerBridgeConfig:
    text = model.config.text
    sizes = [layer.head_dim for layer in text.layers]
    heads = [layer.num_kv_heads for layer in text.layers]
    config = TransformerBridgeConfig(
        d_model=text.hidden_size,
        d_head=max(set(sizes), key=sizes.count),
        n_layers=text.num_hidden_layers,
        n_ctx=text.max_position_embeddings,
        n_heads=text.num_attention_heads,
        n_key_value_heads=max(set(heads), key=heads.count),
        per_layer_head_dim=sizes,
        per_layer_num_key_value_heads=heads,
        d_mlp=text.layers[0].intermediate_size,
        d_vocab=text.vocab_size,
        architecture="Gemma4ForCausalLM",
        model_name=str(model.checkpoint.folder),
        act_fn="gelu_pytorch_tanh",
        eps=text.rms_norm_eps,
        normalization_type="RMS",
        gated_mlp=True,
        attn_scale=1.0,
        output_logits_soft_cap=text.final_logit_softcapping or SOFTCAP_DISABLED,
        window_size=text.sliding_window or None,
        num_experts=text.num_experts or None,
        experts_per_token=text.top_k_experts or None,
        tie_word_embeddings=True,
        dtype=torch.float32,
    )
    config.device = None
    return config


def _tokenizer(model: Model) -> Any:
    named = {
        role: piece
        for role, piece in model.tokenizer.named_tokens.items()
        if role in ("bos_token", "eos_token", "unk_token", "pad_token")
    }
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model.tokenizer.backend,
        add_bos_token=False,
        padding_side="left",
        **named,
    )
