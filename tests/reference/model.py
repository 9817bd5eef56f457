"""The whole text decoder: embeddings, layers, tied head, soft-cap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .checkpoint import read_weights
from .config import Config, read_config
from .decoder_layer import decoder_layer, under
from .per_layer import per_layer_inputs
from .rms_norm import rms_norm
from .trace import Trace


@dataclass(frozen=True)
class Gemma4Text:
    config: Config
    weights: dict[str, np.ndarray]

    def run(
        self, ids: Sequence[int], positions: Sequence[int] | None = None
    ) -> dict[str, np.ndarray]:
        """Returns one prefill's values by hook-point name; `logits` is float64 [T, V].

        `positions` are the tokens' absolute positions, default 0 ... T-1; they must be consecutive.
        """
        token_ids = np.asarray(ids)
        position = np.arange(len(ids)) if positions is None else np.asarray(positions)
        trace, config, weights = Trace(), self.config, self.weights
        # sqrt(D) is held in the weights' type; float32 here, because the comparison is float32.
        scale = np.float64(np.float32(config.hidden_size**0.5))
        resid = trace("embed", weights["embed_tokens.weight"][token_ids] * scale)
        extra = None
        if config.per_layer_size:
            extra = per_layer_inputs(token_ids, resid, weights, config, trace)
        kv: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for layer in config.layers:
            name = f"layers.{layer.index}."
            resid = decoder_layer(
                resid,
                position,
                None if extra is None else extra[:, layer.index],
                under(weights, name),
                layer,
                config,
                kv,
                trace.within(name),
            )
        x = rms_norm(resid, weights["norm.weight"], config.eps, trace, "final_norm")
        logits = trace("logits_raw", x @ weights["embed_tokens.weight"].T)
        if config.softcap is not None:
            logits = config.softcap * np.tanh(logits / config.softcap)
        trace("logits", logits)
        return trace.values


def load(folder: str | Path) -> Gemma4Text:
    """Reads a checkpoint folder of either class, spelling and dtype into float64."""
    return Gemma4Text(read_config(Path(folder)), read_weights(Path(folder)))
