"""Random tiny checkpoints of every Gemma 4 variant, made with transformers' own classes.

Every parameter that transformers initialises to a constant (norm weights, `layer_scalar`, router
scales) is drawn at random here, so that forgetting one of them changes the logits. Sizes are odd
on purpose: no width is a multiple of 16 and head counts have uneven ratios.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models.gemma4 import modeling_gemma4
from transformers.models.gemma4_unified import modeling_gemma4_unified

transformers.utils.logging.disable_progress_bar()
# The models are tiny: a second thread would only spin, and wait for its turn on a busy machine.
torch.set_num_threads(1)

VOCAB_SIZE = 307
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_S, _F = "sliding_attention", "full_attention"

# Text configs in the released spelling. What differs between variants is what differs between the
# released files (sharing, per-layer embeddings, experts, K = V, head counts); only sizes are tiny.
_TEXT_CONFIGS: dict[str, dict[str, Any]] = {
    "e2b": {
        "hidden_size": 44,
        "intermediate_size": 53,
        "use_double_wide_mlp": True,
        "layer_types": [_S, _S, _S, _F, _S, _S, _S, _S, _F],
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 12,
        "global_head_dim": 20,
        "sliding_window": 7,
        "num_kv_shared_layers": 5,
        "hidden_size_per_layer_input": 21,
    },
    "e4b": {
        "hidden_size": 45,
        "intermediate_size": 67,
        "layer_types": [_S, _S, _F, _S, _S, _S, _S, _S, _F],
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "global_head_dim": 16,
        "sliding_window": 5,
        "num_kv_shared_layers": 6,
        "hidden_size_per_layer_input": 26,
    },
    "12b": {
        "hidden_size": 38,
        "intermediate_size": 71,
        "layer_types": [_S, _S, _S, _F] * 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "head_dim": 14,
        "global_head_dim": 24,
        "sliding_window": 11,
        "final_logit_softcapping": 6.0,
        "use_bidirectional_attention": "vision",
    },
    "26b": {
        "hidden_size": 50,
        "intermediate_size": 57,
        "layer_types": [_S, _S, _S, _S, _S, _F],
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "num_global_key_value_heads": 2,
        "attention_k_eq_v": True,
        "head_dim": 10,
        "global_head_dim": 18,
        "sliding_window": 9,
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": True,
        "num_experts": 11,
        "top_k_experts": 3,
        "moe_intermediate_size": 19,
        "use_bidirectional_attention": "vision",
    },
    "31b": {
        "hidden_size": 52,
        "intermediate_size": 101,
        "layer_types": [_S, _S, _S, _S, _S, _F],
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "head_dim": 12,
        "global_head_dim": 22,
        "sliding_window": 12,
        "final_logit_softcapping": 6.0,
        "hidden_size_per_layer_input": 0,
        "use_bidirectional_attention": "vision",
    },
}
VARIANTS = tuple(_TEXT_CONFIGS)

# Mean of a norm's weights where it is not 1: q_norm carries the attention scale (scores are not
# divided by sqrt(H)) and the final norm lifts the logits into the soft-cap's curved region.
_NORM_MEANS = {"q_norm.weight": 0.4, "norm.weight": 1.0}


def text_config_values(variant: str, **overrides: Any) -> dict[str, Any]:
    """Returns the text config of `variant` in the released spelling, `overrides` applied."""
    values = {
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 262_144,
        "final_logit_softcapping": 30.0,
        **_TEXT_CONFIGS[variant],
        **overrides,
    }
    if variant != "12b":  # Gemma 4 Unified has no per-layer embeddings.
        values.setdefault("vocab_size_per_layer_input", values["vocab_size"])
    values["num_hidden_layers"] = len(values["layer_types"])
    return values


def make_tiny(
    variant: str,
    *,
    seed: int = 0,
    dtype: str = "float32",
    text_only: bool = False,
    towers: str | None = None,
    media_ids: bool = False,
    vision: dict[str, Any] | None = None,
    **overrides: Any,
) -> nn.Module:
    """Makes a random model of `variant`, in evaluation mode, float32, eager attention and experts.

    `dtype` is the type that `save_tiny` stores: every weight is rounded to it here, so that the
    returned float32 model and the file hold the same numbers. `towers="tiny"` adds small vision
    and audio towers to the multimodal class, "audio" an audio tower of more layers whose bounds all
    act; None leaves them null. `media_ids` gives the config the placeholders' ids of
    `save_tiny_tokenizer`. `vision` replaces values of the small vision tower's config, `overrides`
    those of the text config, released spelling.
    """
    text = text_config_values(variant, **overrides)
    if variant == "12b":
        text_config = transformers.Gemma4UnifiedTextConfig(**text)
        text_class = transformers.Gemma4UnifiedForCausalLM
        config_class = transformers.Gemma4UnifiedConfig
        multimodal_class = transformers.Gemma4UnifiedForConditionalGeneration
    else:
        text_config = transformers.Gemma4TextConfig(**text)
        text_class = transformers.Gemma4ForCausalLM
        config_class = transformers.Gemma4Config
        multimodal_class = transformers.Gemma4ForConditionalGeneration
    # The experts' eager loop exists only in Gemma 4, not in Unified, which has no experts.
    backends = {"attn_implementation": "eager"}
    if variant != "12b":
        backends["experts_implementation"] = "eager"
    if text_only:
        model = text_class._from_config(text_config, **backends)
    else:
        towers_and_ids = _tower_configs(variant, text, towers) | (MEDIA_IDS if media_ids else {})
        if vision:
            towers_and_ids["vision_config"] |= vision
        config = config_class(text_config=text_config, **towers_and_ids)
        model = multimodal_class._from_config(config, **backends)
    randomise(model, seed)
    with torch.no_grad():
        for tensor in _weights(model).values():
            tensor.copy_(tensor.to(DTYPES[dtype]).float())
    model.file_dtype = dtype
    return model.eval().requires_grad_(False)


def _tower_configs(variant: str, text: dict[str, Any], towers: str | None) -> dict[str, Any]:
    if towers is None:
        return {"vision_config": None, "audio_config": None}
    if towers not in ("tiny", "audio"):
        raise ValueError(f"towers must be None, 'tiny' or 'audio', got {towers!r}")
    if towers == "audio":
        audio = {"hidden_size": 36, "num_hidden_layers": 3, "num_attention_heads": 4}
        audio |= {"output_proj_dims": 26, "residual_weight": 0.55, "conv_kernel_size": 4}
        audio |= {"attention_logit_cap": 3.0, "gradient_clipping": 1.7, "rms_norm_eps": 1e-3}
        samples = {"audio_embed_dim": 20, "rms_norm_eps": 1e-3}
        return {"vision_config": None, "audio_config": samples if variant == "12b" else audio}
    if variant == "12b":
        vision = {"mm_embed_dim": text["hidden_size"], "mm_posemb_size": 16}
        vision |= {"output_proj_dims": text["hidden_size"], "patch_size": 4}
        return {"vision_config": vision, "audio_config": {"audio_embed_dim": 20}}
    vision = {"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 8}
    vision |= {"position_embedding_size": 32, "patch_size": 4}
    vision |= {"use_clipped_linears": variant in ("e2b", "e4b")}
    vision |= {"standardize": variant in ("26b", "31b")}
    audio = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    audio |= {"output_proj_dims": 28}
    has_audio = variant in ("e2b", "e4b")
    return {"vision_config": vision, "audio_config": audio if has_audio else None}


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the floating-point tensors that a checkpoint stores, the tied head left out."""
    state = model.state_dict(keep_vars=True)
    return {
        name: tensor
        for name, tensor in state.items()
        if name != "lm_head.weight" and tensor.is_floating_point()
    }


def randomise(model: nn.Module, seed: int) -> None:
    """Draws every stored tensor anew; equal seeds give equal models.

    Matrices are scaled by 1/sqrt(inputs), so that branches stay of order one; one-dimensional
    parameters are uniform within 40 % of their mean.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in _weights(model).items():
            tensor.copy_(_draw(name, tensor.shape, generator))


def _draw(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if name.endswith(("_min", "_max")):  # Bounds of clipped linears: tight enough to act.
        bound = 1.5 + torch.rand(shape, generator=generator)
        return -bound if name.endswith("_min") else bound
    if len(shape) <= 1:
        mean = next((m for end, m in _NORM_MEANS.items() if _is_norm(name, end)), 1.0)
        if name.endswith("layer_scalar"):
            mean = 0.9
        return mean * (0.6 + 0.8 * torch.rand(shape, generator=generator))
    noise = torch.randn(shape, generator=generator)
    if name.endswith("embed_tokens.weight"):
        noise[1] = 0  # The end token's logit is 0: random models do not stop by chance.
        return noise * 0.25  # Times sqrt(D): near 1.7, so the layers outweigh the input token.
    if name.endswith("embed_tokens_per_layer.weight"):
        return noise * 0.35  # Times sqrt(P): near 1, like the context part it is added to.
    if name.endswith("router.proj.weight"):
        return noise * 1.5  # The router's input has norm 1 (its 1/sqrt(D)), so logits spread 1.5.
    return noise * (
        1.2 / math.sqrt(math.prod(shape[2:]) * shape[1] if "conv" in name else shape[-1])
    )


def _is_norm(name: str, end: str) -> bool:
    if end == "norm.weight":
        return name in ("model.norm.weight", "model.language_model.norm.weight")
    return name.endswith(end)


def text_model(model: nn.Module) -> nn.Module:
    """Returns the text decoder inside a text-only or a multimodal model."""
    return getattr(model.model, "language_model", model.model)


def text_config(model: nn.Module) -> Any:
    return model.config.get_text_config()


def save_tiny(
    model: nn.Module, folder: str | Path, *, style: str = "transformers", shards: int = 1
) -> Path:
    """Saves `model` as a checkpoint folder and returns its path.

    style "transformers": config.json as transformers 5.23 writes it (`per_layer_config`).
    style "released": the published spelling (`global_head_dim`, `num_global_key_value_heads`) and,
    for models with KV sharing, the published unused K/V tensors of the sharing layers, random.
    """
    if style not in ("transformers", "released"):
        raise ValueError(f"style must be 'transformers' or 'released', got {style!r}")
    folder = Path(folder)
    copy.deepcopy(model).to(DTYPES[model.file_dtype]).save_pretrained(folder)
    if style == "transformers" and shards == 1:
        return folder
    single = folder / "model.safetensors"
    tensors = load_file(single)
    if style == "released":
        _write_released_config(folder)
        tensors |= _unused_sharing_tensors(model)
    single.unlink()
    _write_shards(folder, tensors, shards)
    return folder


def _write_released_config(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    text = config.get("text_config", config)
    overrides = text.pop("per_layer_config")
    full = next(iter(overrides.values()))
    text["global_head_dim"] = full.get("head_dim", text["head_dim"])
    text["num_global_key_value_heads"] = (
        full.get("num_key_value_heads", text["num_key_value_heads"])
        if text["attention_k_eq_v"]
        else None
    )
    path.write_text(json.dumps(config, indent=2))


def _unused_sharing_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    config = text_config(model)
    prefix = "model." if text_model(model) is model.model else "model.language_model."
    generator = torch.Generator().manual_seed(987)
    tensors = {}
    for index in range(
        config.num_hidden_layers - config.num_kv_shared_layers, config.num_hidden_layers
    ):
        layer = config.per_layer_config[index]
        width = layer.num_key_value_heads * layer.head_dim
        shapes = {
            "k_proj": (width, config.hidden_size),
            "v_proj": (width, config.hidden_size),
            "k_norm": (layer.head_dim,),
        }
        for name, shape in shapes.items():
            noise = 3.0 * torch.randn(shape, generator=generator)
            key = f"{prefix}layers.{index}.self_attn.{name}.weight"
            tensors[key] = noise.to(DTYPES[model.file_dtype])
    return tensors


def _write_shards(folder: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    metadata = {"format": "pt"}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata)
        return
    weight_map = {}
    for index, names in enumerate(np.array_split(sorted(tensors), shards)):
        filename = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        save_file({str(name): tensors[str(name)] for name in names}, folder / filename, metadata)
        weight_map |= {str(name): filename for name in names}
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
    (folder / "model.safetensors.index.json").write_text(index_text)


def random_ids(count: int, *, seed: int = 1, vocab_size: int = VOCAB_SIZE) -> list[int]:
    """Returns BOS (2) and then `count` - 1 random ids above the special ones."""
    generator = np.random.default_rng(seed)
    return [2, *generator.integers(4, vocab_size, count - 1).tolist()]


def hf_run(
    model: nn.Module, ids: list[int], position_ids: list[int] | None = None
) -> dict[str, np.ndarray]:
    """Runs one prefill of `model` and returns its values under gemloupe's hook-point names.

    Every value that has a module, an attention argument or a router output in transformers is in
    the result: `logits` [T, V] and `layers.{i}.resid_post` [T, D] always. Masked scores are -inf.
    """
    values: dict[str, np.ndarray] = {}
    arguments = {"input_ids": torch.tensor([ids]), "use_cache": False}
    if position_ids is not None:
        arguments["position_ids"] = torch.tensor([position_ids])
    with torch.no_grad(), _recording(model, values):
        values["logits"] = _array(model(**arguments).logits)
    return values


def _array(tensor: torch.Tensor) -> np.ndarray:
    """Copies a [1, ...] tensor to an array without the batch dimension (layers write in place)."""
    return tensor.detach()[0].clone().numpy()


@contextlib.contextmanager
def _recording(model: nn.Module, values: dict[str, np.ndarray]) -> Iterator[None]:
    decoder = text_model(model)
    handles = []

    def output_of(module: nn.Module, name: str, heads: int | None = None) -> None:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            array = _array(output)
            values[name] = array if heads is None else array.reshape(len(array), heads, -1)

        handles.append(module.register_forward_hook(hook))

    def input_of(module: nn.Module, name: str, heads: int | None = None, argument: int = 0) -> None:
        def hook(_module: nn.Module, inputs: Any) -> None:
            array = _array(inputs[argument])
            values[name] = array if heads is None else array.reshape(len(array), heads, -1)

        handles.append(module.register_forward_pre_hook(hook))

    output_of(decoder.embed_tokens, "embed")
    if getattr(decoder, "hidden_size_per_layer_input", 0):
        output_of(decoder.per_layer_projection_norm, "per_layer_inputs.context")
    for index, layer in enumerate(decoder.layers):
        _record_layer(f"layers.{index}.", layer, input_of, output_of)
        if getattr(layer, "enable_moe_block", False):
            handles.extend(_record_experts(f"layers.{index}.", layer, values))
    output_of(decoder.norm, "final_norm")
    output_of(model.lm_head, "logits_raw")
    try:
        with _recording_attention(values):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _record_layer(prefix: str, layer: nn.Module, input_of: Any, output_of: Any) -> None:
    attention = layer.self_attn
    heads = attention.q_proj.out_features // attention.head_dim
    input_of(layer, prefix + "resid_pre")
    if getattr(layer, "hidden_size_per_layer_input", 0):
        input_of(layer, prefix + "per_layer.in", argument=1)
    output_of(layer.input_layernorm, prefix + "attn.norm")
    output_of(attention.q_proj, prefix + "attn.q_proj", heads)
    output_of(attention.q_norm, prefix + "attn.q")
    if not attention.is_kv_shared_layer:
        kv_heads = attention.k_proj.out_features // attention.head_dim
        output_of(attention.k_proj, prefix + "attn.k_proj", kv_heads)
        # Without v_proj the raw value is the raw key.
        output_of(attention.v_proj or attention.k_proj, prefix + "attn.v_proj", kv_heads)
        output_of(attention.k_norm, prefix + "attn.k")
        output_of(attention.v_norm, prefix + "attn.v")
    input_of(attention.o_proj, prefix + "attn.z", heads)
    output_of(attention.o_proj, prefix + "attn.out")
    output_of(layer.post_attention_layernorm, prefix + "attn.post")
    input_of(layer.pre_feedforward_layernorm, prefix + "resid_mid")
    output_of(layer.pre_feedforward_layernorm, prefix + "mlp.norm")
    output_of(layer.mlp.gate_proj, prefix + "mlp.gate")
    output_of(layer.mlp.up_proj, prefix + "mlp.up")
    input_of(layer.mlp.down_proj, prefix + "mlp.hidden")
    output_of(layer.mlp.down_proj, prefix + "mlp.out")
    input_of(layer.post_feedforward_layernorm, prefix + "ffn.out")
    output_of(layer.post_feedforward_layernorm, prefix + "ffn.post")
    if getattr(layer, "hidden_size_per_layer_input", 0):
        input_of(layer.per_layer_input_gate, prefix + "resid_ffn")
        output_of(layer.per_layer_input_gate, prefix + "per_layer.gate")
        input_of(layer.per_layer_projection, prefix + "per_layer.hidden")
        output_of(layer.per_layer_projection, prefix + "per_layer.out")
        output_of(layer.post_per_layer_input_norm, prefix + "per_layer.post")
    output_of(layer, prefix + "resid_post")


def _expert_hidden(module: nn.Module, expert: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    gate, up = (module.gate_up_proj[expert] @ x).chunk(2)
    return module.act_fn(gate) * up


def _record_experts(prefix: str, layer: nn.Module, values: dict[str, np.ndarray]) -> list[Any]:
    """Hooks the router and the experts, whose tensors are [T, ...] without a batch dimension."""

    def flat(name: str, value: torch.Tensor) -> None:
        values[prefix + name] = value.detach().reshape(-1, value.shape[-1]).clone().numpy()

    def router_hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        probs, weights, experts = output
        flat("router.probs", probs)
        flat("router.weights", weights)
        values[prefix + "router.experts"] = experts.clone().numpy()

    def experts_hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        x, experts, _weights_ = inputs
        flat("experts.norm", x)
        flat("experts.out", output)
        hidden = [
            [_expert_hidden(module, e, row) for e in chosen]
            for row, chosen in zip(x, experts, strict=True)
        ]
        values[prefix + "experts.hidden"] = np.stack([[h.numpy() for h in row] for row in hidden])
        each = [
            [(module.down_proj[e] @ h).numpy() for e, h in zip(chosen, row, strict=True)]
            for chosen, row in zip(experts, hidden, strict=True)
        ]
        values[prefix + "experts.each"] = np.stack(each)

    return [
        layer.router.register_forward_hook(router_hook),
        layer.router.proj.register_forward_pre_hook(lambda _m, i: flat("router.norm", i[0])),
        layer.router.proj.register_forward_hook(lambda _m, _i, o: flat("router.logits", o)),
        layer.experts.register_forward_hook(experts_hook),
        layer.post_feedforward_layernorm_1.register_forward_hook(
            lambda _m, _i, o: flat("mlp.post", o)
        ),
        layer.post_feedforward_layernorm_2.register_forward_hook(
            lambda _m, _i, o: flat("experts.post", o)
        ),
    ]


@contextlib.contextmanager
def _recording_attention(values: dict[str, np.ndarray]) -> Iterator[None]:
    """Records what eager attention gets and gives; the functions themselves stay transformers'."""
    with contextlib.ExitStack() as stack:
        for module in (modeling_gemma4, modeling_gemma4_unified):
            original = module.eager_attention_forward

            def recorded(
                layer: nn.Module,
                query: torch.Tensor,
                key: torch.Tensor,
                value: torch.Tensor,
                mask: torch.Tensor,
                *args: Any,
                _original: Any = original,
                **kwargs: Any,
            ) -> Any:
                prefix = f"layers.{layer.layer_idx}.attn."
                values[prefix + "rot_q"] = _array(query.transpose(1, 2))
                if not layer.is_kv_shared_layer:
                    values[prefix + "rot_k"] = _array(key.transpose(1, 2))
                values[prefix + "keys"] = _array(key.transpose(1, 2))
                values[prefix + "values"] = _array(value.transpose(1, 2))
                repeated = key.repeat_interleave(layer.num_key_value_groups, dim=1)
                scores = query @ repeated.transpose(2, 3)
                if mask is not None:
                    scores = scores.masked_fill(mask < 0, -torch.inf)
                values[prefix + "scores"] = _array(scores)
                output, pattern = _original(layer, query, key, value, mask, *args, **kwargs)
                values[prefix + "pattern"] = _array(pattern)
                return output, pattern

            stack.enter_context(mock.patch.object(module, "eager_attention_forward", recorded))
        yield


SPECIAL_TOKENS = {
    "<pad>": 0,
    "<eos>": 1,
    "<bos>": 2,
    "<unk>": 3,
    "<mask>": 4,
    "<|tool>": 46,
    "<tool|>": 47,
    "<|tool_call>": 48,
    "<tool_call|>": 49,
    "<|tool_response>": 50,
    "<tool_response|>": 51,
    '<|"|>': 52,
}
_LATER_SPECIAL_TOKENS = ("<|think|>", "<|channel>", "<channel|>", "<|turn>", "<turn|>")
_LATER_SPECIAL_TOKENS += ("<|image>", "<image|>", "<|image|>", "<|audio>", "<audio|>")
_LATER_SPECIAL_TOKENS += ("<|audio|>", "<|video|>")
# Where they stand in a tiny tokenizer, by the fields of config.json.
MEDIA_IDS = {
    "boi_token_id": 10,
    "eoi_token_id": 11,
    "image_token_id": 12,
    "boa_token_id": 13,
    "eoa_token_id": 14,
    "eoa_token_index": 14,
    "audio_token_id": 15,
    "video_token_id": 16,
}


def save_tiny_tokenizer(folder: str | Path, vocab_size: int = VOCAB_SIZE) -> Path:
    """Writes a working tokenizer.json of exactly `vocab_size` pieces and its config files.

    BPE with byte fallback, spaces as U+2581, and Gemma 4's special tokens; ids 0...4 and 46...52
    are Gemma 4's own, the others come from the files. With fewer than about 400 pieces the last
    bytes do not fit, and characters that need them become <unk>.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    vocab = dict(SPECIAL_TOKENS)
    taken = set(vocab.values())
    free = (index for index in range(vocab_size) if index not in taken)
    letters = "\u2581\n" + string.ascii_letters + string.digits + ".,:;!?'\"()+-*/="
    merges = [("\u2581", "t"), ("h", "e"), ("\u2581t", "he"), ("i", "n"), ("a", "n")]
    pieces = [*_LATER_SPECIAL_TOKENS, *letters, *(left + right for left, right in merges)]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += [f"<unused{index}>" for index in range(vocab_size)]
    for piece, index in zip(pieces, free, strict=False):
        vocab[piece] = index
    bpe = models.BPE(
        vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    special = [*SPECIAL_TOKENS, *_LATER_SPECIAL_TOKENS]
    tokenizer.add_special_tokens(
        [AddedToken(piece, special=True, normalized=False) for piece in special]
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    return folder
