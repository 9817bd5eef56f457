"""config.json: what is read from it, in both styles, and what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

from gemloupe.config import ModelConfig, parse_config, read_config
from gemloupe.variants import VARIANTS as RELEASED
from snapshot_texts import assert_is_snapshot
from tiny_models import VARIANTS, text_config_values, text_model


def text_only(**fields: Any) -> dict[str, Any]:
    """A small text-only config in the published spelling."""
    small = {
        "vocab_size": 37,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 0,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    return {"model_type": "gemma4_text", **small, **fields}


def reference_model(raw: dict[str, Any]) -> torch.nn.Module:
    fields = {name: value for name, value in raw.items() if name != "model_type"}
    return Gemma4ForCausalLM(Gemma4TextConfig(**copy.deepcopy(fields))).model


def assert_layers_are_those_of(config: ModelConfig, decoder: torch.nn.Module) -> None:
    donors: dict[str, int] = {}
    for index, (ours, theirs) in enumerate(zip(config.text.layers, decoder.layers, strict=True)):
        attention = theirs.self_attn
        if not attention.is_kv_shared_layer:
            donors[attention.layer_type] = index
            assert ours.num_kv_heads * ours.head_dim == attention.k_proj.out_features
            assert ours.values_are_keys == (attention.v_proj is None)
        inv_freq = getattr(decoder.rotary_emb, f"{attention.layer_type}_inv_freq")
        assert ours.kind == attention.layer_type.removesuffix("_attention")
        assert ours.window == (attention.sliding_window or 0)
        assert ours.head_dim == attention.head_dim == 2 * len(inv_freq)
        assert ours.kv_source == donors[attention.layer_type]
        assert ours.intermediate_size == theirs.mlp.gate_proj.out_features
        assert ours.has_experts == hasattr(theirs, "router")
        assert ours.rotary_pairs == int((inv_freq != 0).sum())
        if ours.rotary_pairs > 1:
            expected = ours.rope_theta ** (-2 / ours.head_dim) / ours.rope_factor
            assert float(inv_freq[1]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("style", ["transformers", "released"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_layers_are_those_that_transformers_builds(
    tiny: Callable, variant: str, style: str
) -> None:
    model, folder = tiny(variant, style=style)
    assert_layers_are_those_of(read_config(folder / "config.json"), text_model(model))


def test_both_styles_and_a_text_only_file_give_the_same_text_config(tiny: Callable) -> None:
    configs = [
        read_config(tiny("26b", style="transformers")[1] / "config.json"),
        read_config(tiny("26b", style="released")[1] / "config.json"),
        read_config(tiny("26b", text_only=True)[1] / "config.json"),
    ]
    assert configs[0].text == configs[1].text == configs[2].text
    assert [config.model_type for config in configs] == ["gemma4", "gemma4", "gemma4_text"]


_SLIDING = {"rope_type": "default", "rope_theta": 1e4}
_FULL = {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25}

# What transformers 5.23 accepts besides what it writes.
ACCEPTED = {
    "no layer types": {"layer_types": None, "num_hidden_layers": 12},
    "a sliding last layer, run as full": {"layer_types": ["full_attention", "sliding_attention"]},
    "no rope parameters": {"rope_parameters": None},
    "type instead of rope_type": {
        "rope_parameters": {
            "sliding_attention": {"type": "default", "rope_theta": 1e4},
            "full_attention": {"type": "proportional", "rope_theta": 1e6},
        }
    },
    "no rope type": {
        "rope_parameters": {"sliding_attention": {"rope_theta": 50}, "full_attention": _FULL}
    },
    "linear scaling": {
        "rope_parameters": {
            "sliding_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0},
            "full_attention": {**_FULL, "factor": 2.0},
        }
    },
    "an odd share of rotating pairs": {
        "global_head_dim": 22,
        "rope_parameters": {
            "sliding_attention": {**_SLIDING, "partial_rotary_factor": 0.5},
            "full_attention": {**_FULL, "partial_rotary_factor": 0.3},
        },
    },
    "null per-layer config": {"per_layer_config": None},
    "padded layer keys": {
        "num_hidden_layers": 12,
        "layer_types": None,
        "per_layer_config": {"05": {"head_dim": 16}, "11": {"head_dim": 16}},
    },
    "overrides equal to the common values": {
        "per_layer_config": {"1": {"head_dim": 8, "intermediate_size": 12}}
    },
    "attention in both directions": {"use_bidirectional_attention": "all", "sliding_window": 9},
}


@pytest.mark.parametrize("fields", ACCEPTED.values(), ids=ACCEPTED.keys())
@pytest.mark.filterwarnings("ignore:.*last layer")
def test_unusual_configs_are_read_as_transformers_reads_them(fields: dict[str, Any]) -> None:
    raw = text_only(**fields)
    config = parse_config(copy.deepcopy(raw))
    assert_layers_are_those_of(config, reference_model(raw))


def test_missing_fields_have_the_defaults_of_transformers() -> None:
    text = parse_config({"model_type": "gemma4_text"}).text
    defaults = Gemma4TextConfig()
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        assert getattr(text, name) == getattr(defaults, name)
    assert text.rms_norm_eps == defaults.rms_norm_eps
    assert text.hidden_size_per_layer_input == defaults.hidden_size_per_layer_input
    assert text.vocab_size_per_layer_input == defaults.vocab_size_per_layer_input
    assert text.max_position_embeddings == defaults.max_position_embeddings
    assert text.layers[0].num_kv_heads == 4
    assert (text.num_experts, text.final_logit_softcapping, text.bidirectional) == (0, 0.0, "none")


def test_unified_has_no_per_layer_input_and_sees_images_whole() -> None:
    text = parse_config({"model_type": "gemma4_unified_text"}).text
    assert text.hidden_size_per_layer_input == 0
    assert text.bidirectional == "vision"
    assert (text.sliding_window, text.max_position_embeddings) == (1024, 262_144)


def test_fields_of_switched_off_parts_may_be_null() -> None:
    raw = text_only(num_experts=None, top_k_experts=None, moe_intermediate_size=None)
    raw |= {"final_logit_softcapping": None, "hidden_size_per_layer_input": None}
    raw |= {"use_bidirectional_attention": None, "quantization_config": None}
    raw |= {"num_global_key_value_heads": None, "attention_dropout": 0.5}
    text = parse_config(raw).text
    assert (text.num_experts, text.hidden_size_per_layer_input) == (0, 0)
    assert text.final_logit_softcapping == 0.0


def test_global_kv_heads_count_only_where_values_are_keys() -> None:
    fields = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_global_key_value_heads": 2}
    separate = parse_config(text_only(**fields)).text.layers[1]
    together = parse_config(text_only(**fields, attention_k_eq_v=True)).text.layers[1]
    assert (separate.num_kv_heads, separate.values_are_keys) == (4, False)
    assert (together.num_kv_heads, together.values_are_keys) == (2, True)


def test_token_ids_come_from_the_file() -> None:
    config = RELEASED["E2B"].config
    assert config.eos_token_ids == (1, 106)  # The top level's, before the text config's.
    assert (config.bos_token_id, config.pad_token_id) == (2, 0)
    assert (config.image_token_id, config.eoa_token_id) == (258_880, 258_883)
    bare = parse_config(text_only())
    assert (bare.eos_token_ids, bare.bos_token_id, bare.image_token_id) == ((), None, None)


def test_the_released_configs_are_those_of_the_specification() -> None:
    layers = {name: variant.config.text.layers for name, variant in RELEASED.items()}
    assert {name: len(specs) for name, specs in layers.items()} == {
        "E2B": 35, "E4B": 42, "12B": 48, "26B-A4B": 30, "31B": 60,
    }  # fmt: skip
    assert [spec.kv_source for spec in layers["E2B"][13:20]] == [13, 14, 13, 13, 13, 13, 14]
    assert [layers["E2B"][i].intermediate_size for i in (14, 15)] == [6144, 12_288]
    assert {spec.kv_source for spec in layers["E4B"][24:]} == {22, 23}
    assert {spec.rotary_pairs for spec in layers["31B"]} == {128, 64}
    assert [layers["31B"][i].num_kv_heads for i in (0, 5)] == [16, 4]


def nested(**fields: Any) -> dict[str, Any]:
    return {"model_type": "gemma4", "text_config": text_only(**fields)}


def rope(**full: Any) -> dict[str, Any]:
    return text_only(rope_parameters={"sliding_attention": _SLIDING, "full_attention": full})


REFUSED = {
    "no model type": {"vocab_size": 3},
    "gemma 3": {"model_type": "gemma3", "text_config": {}},
    "gemma 3n": {"model_type": "gemma3n"},
    "gemma 2": {"model_type": "gemma2"},
    "a drafter": {"model_type": "gemma4_assistant"},
    "a diffusion model": {"model_type": "diffusion_gemma"},
    "another model": {"model_type": "llama"},
    "no text config": {"model_type": "gemma4"},
    "a text config of another model": nested(model_type="gemma3_text"),
    "quantised": text_only(quantization_config={"quant_method": "bitsandbytes", "bits": 4}),
    "another activation": text_only(hidden_activation="silu"),
    "biases": text_only(attention_bias=True),
    "an untied head": text_only(tie_word_embeddings=False),
    "a boolean written as a string": text_only(attention_k_eq_v="true"),
    "a size written as a string": text_only(hidden_size="8"),
    "a size written as a boolean": text_only(num_hidden_layers=True),
    "a size written as a fraction": text_only(head_dim=4.0),
    "a negative size": text_only(vocab_size=-1),
    "an absurd size": text_only(hidden_size=10**15),
    "an absurd number of layers": text_only(num_hidden_layers=10**9, layer_types=None),
    "an odd head size": text_only(head_dim=5),
    "heads without a common ratio": text_only(num_attention_heads=3, num_key_value_heads=2),
    "layer types of another length": text_only(layer_types=["full_attention"] * 3),
    "an unknown layer type": text_only(layer_types=["chunked_attention", "full_attention"]),
    "layer types that are no list": text_only(layer_types="full_attention"),
    "all layers sharing": text_only(num_kv_shared_layers=2),
    "sharing without a donor": text_only(num_kv_shared_layers=1),
    "an unknown rope type": rope(rope_type="yarn", rope_theta=1e6, factor=4.0),
    "a rope type without theta": rope(rope_type="default"),
    "a rope that turns more than the head": rope(**{**_FULL, "partial_rotary_factor": 1.5}),
    "a partial linear rope": rope(**{**_FULL, "rope_type": "linear", "factor": 2.0}),
    "rope parameters of no layer type": text_only(rope_parameters=_SLIDING),
    "a negative cap": text_only(final_logit_softcapping=-1.0),
    "an epsilon of zero": text_only(rms_norm_eps=0),
    "an unknown direction": text_only(use_bidirectional_attention="left"),
    "experts without a number": text_only(enable_moe_block=True, top_k_experts=2),
    "more experts used than there are": text_only(
        enable_moe_block=True, num_experts=4, top_k_experts=5, moe_intermediate_size=3
    ),
    "a layer key out of range": text_only(per_layer_config={"2": {"head_dim": 8}}),
    "a layer key that is no number": text_only(per_layer_config={"one": {"head_dim": 8}}),
    "an override of something else": text_only(per_layer_config={"1": {"sliding_window": 3}}),
    "layers of one type that differ": text_only(
        layer_types=["full_attention"] * 2, per_layer_config={"0": {"head_dim": 6}}
    ),
    "a token id that is a string": text_only(eos_token_id="</s>"),
    "architectures that are a string": text_only(architectures="Gemma4ForCausalLM"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unusable_configs_are_refused_by_name(case: str) -> None:
    with pytest.raises(ValueError, match=r"^config\.json: ") as error:
        parse_config(REFUSED[case])
    assert_is_snapshot("config", case, str(error.value))


HOSTILE = {
    "not JSON": b'{"model_type": ',
    "not UTF-8": b'{"model_type": "\xff"}',
    "not an object": b'["gemma4"]',
    "a key twice": b'{"model_type": "gemma4", "model_type": "gemma3"}',
    "a key twice inside": b'{"model_type": "gemma4_text", "rope_parameters": {"a": 1, "a": 2}}',
    "not a number": b'{"model_type": "gemma4_text", "rms_norm_eps": NaN}',
    "infinite": b'{"model_type": "gemma4_text", "rms_norm_eps": -Infinity}',
    "too large a fraction": b'{"model_type": "gemma4_text", "rms_norm_eps": 1e999}',
    "too large an integer": b'{"vocab_size": 9223372036854775808}',
    "a huge integer": b'{"vocab_size": ' + b"9" * 100_000 + b"}",
    "nested deeply": b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "too long": b'{"a": "' + b"x" * (5 << 20) + b'"}',
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_json_is_refused(tmp_path: Path, case: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(HOSTILE[case])
    with pytest.raises(ValueError, match=r"config\.json: ") as error:
        read_config(path)
    assert_is_snapshot("config", case, str(error.value), folder=tmp_path)


def test_no_single_changed_field_raises_anything_but_value_error() -> None:
    strange = [None, True, -1, 0, 1, 7, 10**18, 0.5, "", "x", [], [None], {}, {"a": 1}]
    base = {"model_type": "gemma4", "text_config": text_config_values("26b")}
    base["text_config"]["rope_parameters"] = {
        "sliding_attention": _SLIDING,
        "full_attention": _FULL,
    }
    for section in (base, base["text_config"], base["text_config"]["rope_parameters"]):
        for name in list(section):
            kept = section[name]
            for value in strange:
                section[name] = value
                try:
                    json.dumps(parse_config(base).raw)
                except ValueError:
                    pass
            section[name] = kept
